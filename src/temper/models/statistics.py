"""Statistics of a model's linear layers over data: gradients, Fishers, input moments. Whatever is asked for, the data are read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from temper.lazy import nn, torch
from temper.models.sample import evaluating
from temper.models.walk import is_linear
from temper.parts import Problem

Kind = Literal["gradient", "squared-gradient", "fisher", "covariance", "moment", "mean"]
"""Of a layer with weight [out, in] and inputs x [in]:

- `gradient` [out, in]: of the loss, mean over its targets;
- `squared-gradient` [out, in]: sum over batches of the square of the batch's mean gradient;
- `fisher` [out, in]: mean over examples of the square of the gradient of the example's summed loss, at the data's own targets;
- `covariance` [in, in]: mean over tokens of x x', not centred;
- `moment` [in]: mean of x^2;
- `mean` [in]: mean of x.
"""
_BACKWARD = ("gradient", "squared-gradient", "fisher")


class Asked:
    """One request. Called, it gives module -> statistic; the first to be called reads the data for all requests so far."""

    def __init__(self, owner: Statistics, kind: Kind, samples: int, modules: Sequence[str] | None):
        self.kind: Kind = kind
        self.samples, self.modules = samples, modules
        self.seen = 0
        """Examples that went into it, once it is filled: fewer than `samples` where the data hold no more."""
        self._owner = owner
        self._values: dict[str, torch.Tensor] | None = None

    def __call__(self) -> dict[str, torch.Tensor]:
        """Module -> float32 tensor on the model's device, in the order in which modules were named."""
        if self._values is None:
            self._owner._fill()
        assert self._values is not None
        return self._values


class Statistics:
    """What is asked of a model and data, filled in one pass over the data.

    model: plain, or a `PeftModel`, whose layers are named as in the plain model and whose weights without adapters are meant. modules:
    names of the linear layers that a request without names is about; others among them are passed over. batches: rows padded on the
    right, one example a row (or `unit` rows an example), read until the longest request has its samples; each has `inputs`,
    `input_ids` [B, T] and `supervised` [B, T]. loss: `(model, batch)` -> `total`, the sum over targets, and `count`, their number.

    The model is in evaluation mode during the pass and is left as it was: modes, gradients, what requires them, random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Callable[[], Sequence[str]],
        batches: Callable[[], Iterable[Any]],
        loss: Callable[[Any, Any], Any],
        *,
        unit: int = 1,
    ):
        self._model, self._modules, self._batches, self._loss, self._unit = model, modules, batches, loss, unit
        self._waiting: list[Asked] = []

    def ask(self, kind: Kind, samples: int, modules: Sequence[str] | None = None) -> Asked:
        """Asks for a statistic of the first `samples` examples. modules: names of linear layers; None: the usual ones."""
        if samples < 1:
            raise Problem(f"samples {samples}: a statistic needs at least one example")
        asked = Asked(self, kind, samples, modules)
        self._waiting.append(asked)
        return asked

    def _fill(self) -> None:
        """Reads the data once, for all requests that wait."""
        waiting, self._waiting = self._waiting, []
        unnamed = any(asked.modules is None for asked in waiting)
        usual = [name for name in (self._modules() if unnamed else ()) if is_linear(_plain(_layer(self._model, name)))]
        requests: dict[tuple[Kind, int], _Request] = {}
        named = [list(dict.fromkeys(usual if asked.modules is None else asked.modules)) for asked in waiting]
        for asked, names in zip(waiting, named, strict=True):
            request = requests.setdefault((asked.kind, asked.samples), _Request(asked.kind, asked.samples))
            request.sums.update({name: request.sums.get(name) for name in names})
        reading = _Reading(self._model, list(requests.values()), self._unit)
        device = next(self._model.parameters()).device
        with reading.hooked(), _untouched(self._model, device):
            for batch in self._batches():
                reading.read(batch.to(device), self._loss)
                if not reading.active():
                    break
        values = {key: request.values() for key, request in requests.items()}
        for asked, names in zip(waiting, named, strict=True):
            request = requests[asked.kind, asked.samples]
            asked.seen = request.seen
            asked._values = {name: values[asked.kind, asked.samples][name] for name in names}


@dataclasses.dataclass
class _Request:
    """One kind over the first `samples` examples: sums by module (None at first), and what they are divided by."""

    kind: Kind
    samples: int
    sums: dict[str, torch.Tensor | None] = dataclasses.field(default_factory=dict)
    over: dict[str, int] = dataclasses.field(default_factory=dict)
    seen: int = 0
    take: int = 0
    """Examples of the present batch that go into it."""
    targets: int = 0
    """Targets in them."""

    def add(self, name: str, value: torch.Tensor, over: int) -> None:
        """value: is kept, and not changed."""
        before = self.sums[name]
        self.sums[name] = value.clone() if before is None else before.add_(value)
        self.over[name] = self.over.get(name, 0) + over

    def values(self) -> dict[str, torch.Tensor]:
        """Module -> the statistic; layers that always had the same input share one tensor."""
        found: dict[str, torch.Tensor] = {}
        last: torch.Tensor | None = None
        for name, value in self.sums.items():
            if value is None:
                raise Problem(f"`{name}` was never called while the loss was computed, so there are no statistics of it; leave it out")
            if self.kind != "squared-gradient":
                value.div_(max(1, self.over[name]))
            if last is not None and self.kind not in _BACKWARD and last.shape == value.shape and torch.equal(last, value):
                value = last
            found[name] = last = value
        return found


class _Enough(Exception):
    """All that is asked for has been seen of this batch."""


class _Reading:
    """One pass over the data: what the layers' hooks know of the present batch."""

    def __init__(self, model: Any, requests: list[_Request], unit: int):
        self.model, self.requests, self.unit = model, requests, unit
        self.by_layer: dict[str, list[_Request]] = {}
        for request in requests:
            for name in request.sums:
                self.by_layer.setdefault(name, []).append(request)
        self.layers = {name: _layer(model, name) for name in self.by_layer}
        for name, layer in self.layers.items():
            if not is_linear(_plain(layer)):
                raise Problem(f"statistics are of linear layers, and `{name}` is a {type(_plain(layer)).__name__}; leave it out")
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.paired = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
        body = getattr(inner, "base_model", inner)
        within = set(body.modules())
        self.body = body if body is not inner and all(layer in within for layer in self.layers.values()) else None
        self.bodies: int | None = None  # times that the loss runs the body, once that is known
        self.runs = self.examples = 0
        self.masks: list[torch.Tensor] = []
        self.last: tuple[Any, dict[Any, Any]] = (None, {})
        self.calls: dict[str, int] = {}
        self.heard: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def active(self) -> list[_Request]:
        """Requests that have not all their samples yet."""
        return [request for request in self.requests if request.seen < request.samples]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Within, the layers tell of their inputs and gradients."""
        with ExitStack() as hooks:
            for name, layer in self.layers.items():
                hooks.enter_context(layer.register_forward_hook(self._seen(name)))
            hooks.enter_context(self.model.register_forward_pre_hook(self._masks, with_kwargs=True))
            if (head := self.model.get_output_embeddings()) is not None:  # a loss runs a head that is watched just once, and as a layer
                hooks.enter_context(head.register_forward_pre_hook(lambda *_: None))
            if self.body is not None:
                hooks.enter_context(self.body.register_forward_hook(self._through))
            yield

    def read(self, batch: Any, loss: Callable[[Any, Any], Any]) -> None:
        """Adds one batch to every request that has not all its samples."""
        active, self.examples = self.active(), batch.input_ids.shape[0] // self.unit
        if self.examples > 1 and self.paired:
            raise Problem("which of an encoder-decoder's tokens are padding its inputs do not say; give batches of one example")
        for request in self.requests:
            request.take = min(request.samples - request.seen, self.examples)
        mask = batch.inputs.get("attention_mask")
        self.masks = [mask.bool()] if mask is not None and mask.dim() == 2 else []
        self.last, self.runs = (None, {}), 0
        self.calls.clear()
        self.heard.clear()
        learning = [request for request in active if request.kind in _BACKWARD]
        with torch.set_grad_enabled(bool(learning)):
            try:
                found = loss(self.model, batch)
                self.bodies = self.runs
            except _Enough:
                found = None
            if learning and found is not None:
                for request in learning:
                    request.targets = self._targets(batch, found, request.take, loss)
                found.total.backward()
                with torch.no_grad():
                    for name in list(self.heard):
                        self._settle(name)
        for request in active:
            request.seen += request.take
        self.last = (None, {})

    def _targets(self, batch: Any, found: Any, take: int, loss: Callable[[Any, Any], Any]) -> int:
        """How many targets the batch's first `take` examples have."""
        if take == self.examples:
            return found.count
        if found.count == int(batch.supervised.sum()):
            return int(batch.supervised[: take * self.unit].sum())
        before = [request.take for request in self.requests], dict(self.calls)
        for request in self.requests:  # the loss alone knows: it is asked about these rows, and nobody listens
            request.take = 0
        with torch.no_grad():
            self.bodies, bodies = None, self.bodies
            count = loss(self.model, _first(batch, take * self.unit)).count
        self.bodies, self.calls = bodies, before[1]
        for request, one in zip(self.requests, before[0], strict=True):
            request.take = one
        return count

    # ------------------------------------------------------------------------------------------------------- hooks

    def _masks(self, _model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """What the model is told to see, which the loss may have changed."""
        given = [kwargs[name] for name in ("attention_mask", "decoder_attention_mask") if isinstance(kwargs.get(name), torch.Tensor)]
        self.masks = [one.bool() for one in given if one.dim() == 2] or self.masks

    def _through(self, *_: Any) -> None:
        self.runs += 1
        if self.bodies == 1 and not torch.is_grad_enabled():
            raise _Enough

    def _seen(self, name: str) -> Callable[..., Any]:
        """A hook of one layer's forward pass."""

        def hook(_layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            wanted = [request for request in self.by_layer[name] if request.take]
            if wanted and args[0] is not self.last[0]:
                self.last = (args[0], {})
            x = args[0].detach()
            for request in wanted:
                if request.kind not in _BACKWARD:
                    self._moment(request, name, x)
            if not torch.is_grad_enabled() or not any(request.kind in _BACKWARD for request in wanted):
                return None
            self.calls[name] = self.calls.get(name, 0) + 1
            # nothing below the first layers needs a gradient: the graph begins at their outputs
            begins = not output.requires_grad
            output = output.detach().requires_grad_().clone() if begins else output
            output.register_hook(lambda gradient: self._hear(name, x, gradient))
            return output if begins else None

        return hook

    def _moment(self, request: _Request, name: str, x: torch.Tensor) -> None:
        """Adds a sum over tokens. What layers with the same input have in common is computed once."""
        tokens = self._once((request.take, "tokens"), lambda: self._tokens(name, x, request.take))
        of = {"covariance": lambda: tokens.T @ tokens, "moment": lambda: tokens.square().sum(0), "mean": lambda: tokens.sum(0)}
        request.add(name, self._once((request.take, request.kind), of[request.kind]), len(tokens))

    def _once(self, key: tuple[int, str], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is known of the last input that a layer had."""
        if key not in self.last[1]:
            self.last[1][key] = make()
        return self.last[1][key]

    def _tokens(self, name: str, x: torch.Tensor, take: int) -> torch.Tensor:
        """The inputs of the first examples' tokens, padding left out: float32 [n, in]."""
        mask = next((one for one in self.masks if one.shape == x.shape[:-1]), None)
        if mask is None and not all(bool(one.all()) for one in self.masks):
            raise _unknown(name)
        x = self._first(name, x, take)
        return (x.flatten(0, -2) if mask is None else x[self._first(name, mask, take)]).float()

    def _first(self, name: str, x: torch.Tensor, take: int) -> torch.Tensor:
        """The rows of the first examples, of what has `unit` rows, or one, for each. Experts see tokens that lie flat, without rows."""
        if take == self.examples:
            return x
        self._check_rows(name, x)
        return x[: x.shape[0] // self.examples * take]

    def _check_rows(self, name: str, x: torch.Tensor) -> None:
        if x.shape[0] not in (self.examples, self.examples * self.unit) or "expert" in name:
            raise _unknown(name)

    def _hear(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """A layer's inputs and the gradient of its outputs, of one of its calls."""
        heard = self.heard.setdefault(name, [])
        heard.append((x, gradient.detach()))
        if len(heard) == self.calls[name]:
            with torch.no_grad():
                self._settle(name)

    def _settle(self, name: str) -> None:
        """Adds the gradient of a layer's weight, once all calls of the layer are heard."""
        heard = self.heard.pop(name)
        x, g = heard[0] if len(heard) == 1 else (torch.cat(some, -2) for some in zip(*heard, strict=True))
        whole: dict[int, torch.Tensor] = {}
        for request in self.by_layer[name]:
            take = request.take
            match request.kind:
                case "fisher" if take:
                    for one in range(take):
                        request.add(name, _outer(self._example(name, g, one), self._example(name, x, one)).square_(), 1)
                case "gradient" | "squared-gradient" if take:
                    if take not in whole:
                        whole[take] = _outer(self._first(name, g, take), self._first(name, x, take))
                    if request.kind == "gradient":
                        request.add(name, whole[take], request.targets)
                    else:
                        request.add(name, (whole[take] / max(1, request.targets)).square_(), 0)

    def _example(self, name: str, x: torch.Tensor, one: int) -> torch.Tensor:
        """The rows of one example."""
        if self.examples == 1:
            return x
        self._check_rows(name, x)
        each = x.shape[0] // self.examples
        return x[one * each : (one + 1) * each]


def _outer(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sum_t g_t x_t', float32 [out, in]."""
    return g.flatten(0, -2).float().T @ x.flatten(0, -2).float()


def _unknown(name: str) -> Problem:
    return Problem(f"`{name}` sees tokens without the rows that they come from; give batches of one example")


def _first(batch: Any, rows: int) -> Any:
    """The first rows of a batch."""
    count = batch.input_ids.shape[0]
    held = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    cut = {name: one[:rows] for name, one in held.items() if isinstance(one, torch.Tensor | Sequence) and len(one) == count}
    made = dataclasses.replace(batch, **cut)
    given = {"targets": int(made.supervised.sum()), "tokens": int(made.attention_mask.sum())}
    return dataclasses.replace(made, **given)


def _layer(model: Any, name: str) -> Any:
    """A layer by its name in the plain model."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_submodule(name)


def _plain(layer: Any) -> Any:
    """The layer under an adapter."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, the model evaluates and no parameter takes a gradient; afterwards all is as before, random numbers too."""
    learning = [one for one in model.parameters() if one.requires_grad]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), evaluating(model):
        for one in learning:
            one.requires_grad_(False)
        try:
            yield
        finally:
            for one in learning:
                one.requires_grad_(True)
