"""Training at the machine's speed: what computes a model's layers faster takes their place while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def faster(model: Any, *, device: str, note: Callable[[str], None] = lambda _: None) -> Iterator[bool]:
    """Within, `model` computes the same numbers in less time; after it, the model is as it was. Parameters and their names stay.

    On a CPU:
    - decoders of transformers' usual make (Llama, Mistral, Qwen, Gemma's first, SmolLM and others that compute the same), LoRA by
      peft included: each layer is two nodes of the autograd graph, kernels do what lies between the matrix products, and no padding
      is computed (`decoder`)
    - other models that attend by `sdpa`: a kernel attends (`attention`)
    - memory that a step frees is kept for the next one (`allocator`)

    Layers that somebody listens to by hooks, or that an adapter of another kind changes, compute as they did. On other devices nothing
    changes. note: is told what is not done, and why. Gives whether the layers are the nodes'.
    """
    if device != "cpu":
        yield False
        return
    from temper.train.faster import native
    from temper.train.faster.allocator import keeping_memory
    from temper.train.faster.attention import kernel_for_sdpa
    from temper.train.faster.decoder import beside, decoder

    with ExitStack() as stack:
        stack.enter_context(keeping_memory())
        _, missing = native.library()
        if missing:
            note(f"no kernels, torch's own operations in their place: {missing}")
        else:
            stack.enter_context(kernel_for_sdpa())
        found, why = decoder(model)
        if found is None:
            note(f"layers compute by their own code: {why}")
        else:
            for one in (found, *beside(model)):
                stack.enter_context(one.inside())
        yield found is not None
