"""Adapter types of our own in peft: its enum, its tuners, its layers. What a type shares with the others is here.

A type is three classes and a line. `Config` has the settings that go into `adapter_config.json`; `AdapterLayer` computes;
`Tuner` names both; `register` makes the type known to peft, so that `get_peft_model`, `PeftModel.from_pretrained`,
`get_peft_model_state_dict`, `set_adapter`, `disable_adapter`, `merge_and_unload` and conversion to LoRA work as for peft's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import register_peft_method
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def register(name: str, config: type[Config], model: type[BaseTuner]) -> None:
    """Makes an adapter type known to peft under `name` (upper case, as `adapter_config.json` has it). Again changes nothing.

    All that a layer holds of an adapter is in attributes that begin with `name` in lower case and `_`.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    if PeftType[name] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config, model_cls=model)


@dataclass
class Config(PeftConfig):
    """Where an adapter of our own sits. A type adds its settings and names itself in `kind`."""

    kind: ClassVar[str] = ""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt: names or their ends, or a regex."})
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out: names or their ends, or a regex."}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole beside the adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.kind]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(given := getattr(self, name), (list, tuple)):
                setattr(self, name, set(given))


@dataclass
class RankConfig(Config):
    """A type whose layers have a rank and a scale."""

    r: int = field(default=8, metadata={"help": "Rank."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the adapter's output."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Name or regex of a module -> its rank, where it is not r."}
    )

    def rank_of(self, module: str) -> int:
        """The rank in the module of this name."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A linear layer (`nn.Linear`, `Conv1D`) with adapters whose outputs are added to its own.

    A type names its containers in `adapter_layer_names` (`nn.ParameterDict`, trained) and `other_param_names` (`BufferDict`,
    never trained, or a dict), both keyed by adapter; makes them in `containers`, fills them for one adapter in `fill`, and
    computes in `change`. What is a change of the weight says so in `delta_weight`, and by factors in `low_rank`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters = []
        base: Any = self.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise ValueError(f"{type(self).__name__} adapts linear layers, and this is a {type(base).__name__}")
        self.transposed = isinstance(base, Conv1D)
        sizes = base.weight.shape if self.transposed else (base.in_features, base.out_features)
        self.in_features, self.out_features = tuple[Any, ...](sizes)
        self.containers()

    # what a type answers

    def containers(self) -> None:
        """Makes the empty containers."""
        raise NotImplementedError

    def fill(self, adapter: str, config: Any, name: str) -> None:
        """Fills the containers for an adapter on the module of this name, on the device and in the type of `like()`."""
        raise NotImplementedError

    def change(self, x: Tensor, adapter: str) -> Tensor:
        """What the adapter adds to the output, [..., out], at inputs x [..., in]."""
        raise NotImplementedError

    def delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, [out, in]. Raises `ValueError` where it is no change of the weight."""
        raise ValueError(f"a {type(self).__name__} is no change of a weight, so it cannot be merged")

    def low_rank(self, adapter: str) -> tuple[Tensor, Tensor, float] | None:
        """A [r, in], B [out, r] and the scale with delta_weight = scale B A exactly, or None where there are none."""
        return None

    # what all types share

    def get_base_layer(self) -> Any:
        return super().get_base_layer()

    def update_layer(self, adapter: str, config: Any, name: str) -> None:
        """Adds an adapter."""
        self.fill(adapter, config, name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def like(self) -> dict[str, Any]:
        """Device and type for an adapter's tensors: the base weight's, at least float32."""
        weight = self.get_base_layer().weight
        wide = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        return {"device": weight.device, "dtype": wide}

    def base_weight(self) -> Tensor:
        """The weight of the layer under the adapters, [out, in]."""
        weight = self.get_base_layer().weight.data
        return weight.T if self.transposed else weight

    def has(self, adapter: str) -> bool:
        """Whether this layer carries the adapter."""
        return adapter in self._get_available_adapters()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`delta_weight` in the base weight's orientation, as peft's layers give it."""
        delta = self.delta_weight(adapter)
        return delta.T if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return type(self).delta_weight is not AdapterLayer.delta_weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(f"a batch that mixes adapters cannot run through {type(self).__name__}; run each adapter's rows alone")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if self.has(adapter):
                result = result + self.change(self._cast_input_dtype(x, self.dtype(adapter)), adapter).to(result.dtype)
        return result

    def dtype(self, adapter: str) -> torch.dtype:
        """The type that the adapter computes in."""
        return getattr(self, self.adapter_layer_names[0])[adapter].dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):
            if self.has(adapter):
                merged = self._plus(adapter, 1)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"adapter `{adapter}`: the merged weight is not finite")
                self.get_base_layer().weight.data = merged
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.get_base_layer().weight.data = self._plus(self.merged_adapters.pop(), -1)

    def _plus(self, adapter: str, sign: int) -> Tensor:
        """The base weight with the adapter's change added or taken off; the sum is taken in the wider type."""
        weight = self.get_base_layer().weight.data
        if not weight.is_floating_point():
            raise ValueError(f"{type(self).__name__} cannot be merged into weights in {weight.dtype}")
        with torch.no_grad():
            return (weight + sign * self.get_delta_weight(adapter)).to(weight.dtype).contiguous()


class Tuner(BaseTuner):
    """Puts a type's layers around the modules that its configuration targets. A type names `prefix` and `tuner_layer_cls`."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key)  # type: ignore[attr-defined]
            return
        layer: Any = self.tuner_layer_cls(target)  # type: ignore[call-arg]
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, peft_config, current_key)
        self._replace_module(parent, target_name, layer, target)
