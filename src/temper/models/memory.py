"""An estimate of the memory that training or running a decoder takes, from its shape alone, for the check before a run."""

from __future__ import annotations

import dataclasses

from temper.parts import Problem, nearest

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for. What the interpreter and its libraries take comes on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def estimate(
    *,
    parameters: int,
    trainable: int,
    optimizer: float,
    batch_tokens: int,
    hidden: int,
    layers: int,
    vocabulary: int,
    precision: str = "float32",
    intermediate: int | None = None,
    weights: str = "float32",
) -> Memory:
    """Peak memory of a step of a Llama-shaped decoder.

    parameters, trainable: how many numbers the model holds, and how many of them are trained (0: it only runs).
    optimizer: numbers that the optimizer keeps for each trained one (AdamW 2, momentum 1, plain SGD 0).
    batch_tokens: tokens of one micro-batch, padding included. hidden, layers, vocabulary, intermediate (default
    4 hidden): the decoder's shape. weights: number format that they are stored in. precision: that of the
    computation; where it is narrower than `weights`, autocast keeps a narrow copy of them.

    With b tokens, width h, MLP width f, and s bytes a number (counted as in Korthikanti et al. 2022, "Reducing Activation
    Recomputation in Large Transformer Models", section 4, for RMSNorm, gated MLPs and attention that keeps no scores):

    - weights: parameters x their size, + parameters x s under autocast
    - gradients, optimizer: trainable x 4 bytes, trainable x optimizer x 4 bytes
    - activations: b (16 h + 7 h s + 4 f s) a layer, under autocast b (16 h + 9 h s + 4 f s). The two norms keep their
      input and the normalised input in float32 (16 h bytes) and their outputs (2 h numbers, under autocast twice); attention
      its queries, keys, values, output, and that laid out for the last projection (5 h); the MLP gate, gate after its
      activation, up and their product (4 f). Without training, one layer's at a time.
    - logits: 3 b V x 4 bytes in training (logits, their log-softmax, its gradient), else 2 b V x 4

    This is what lives at once. The process takes more: an allocator that keeps freed pieces (glibc's) holds up to half as
    much again.
    """
    size, stored = _size(precision), _size(weights)
    autocast = size < stored
    widths = 16 + (9 if autocast else 7) * size
    a_layer = batch_tokens * (widths * hidden + 4 * (intermediate or 4 * hidden) * size)
    return Memory(
        weights=parameters * (stored + size * autocast),
        gradients=trainable * 4,
        optimizer=round(trainable * optimizer * 4),
        activations=a_layer * (layers if trainable else 1),
        logits=batch_tokens * vocabulary * 4 * (3 if trainable else 2),
    )


def _size(name: str) -> int:
    if name not in _BYTES:
        raise Problem(f"no number format `{name}`{nearest(name, _BYTES)}")
    return _BYTES[name]
