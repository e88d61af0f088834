"""Models and tokenizers from and to folders: Hugging Face folders and PEFT folders, safetensors alone, no code of theirs run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.lazy import nn, peft, safetensors_torch, torch, transformers
from temper.models import folders
from temper.models.deltas import is_adapted, merge, to_plain_lora
from temper.models.deltas.tuners import register
from temper.parts import Problem, nearest, shown
from temper.passport import Artefact, family

if TYPE_CHECKING:
    from temper.models.constraints import Constraint

Source = Artefact | Path | str
"""An artefact, a folder, or a hub name."""


def load_model(source: Source, *, dtype: str = "float32", device: str = "cpu", constraints: bool = True) -> nn.Module:
    """A model of the family that its folder names (causal, masked, encoder-decoder, classifier), or a `PeftModel` on one, in evaluation
    mode.

    dtype: `float32`, `bfloat16`, `float16` or `auto` (as stored). constraints: put the masks and grids that travel with a
    model back on, so that they hold in training; without, the weights are what they are (on mask and grid) and the model
    is faster. A folder in the compressed-tensors format gives dense weights; in other quantised formats it is loaded by
    transformers as it stands.

    An adapter is loaded onto its base: the artefact's own base, else what the adapter names; where that is an adapter
    too, it is merged first (an adapter sits on what its base computes). It computes with W + delta, as under peft alone. Where it
    was trained on a base held in NF4, that is held so again, from float32, to the same bits.

    Raises `Problem` on weights that are missing or left over, and on code that the folder would bring along.
    """
    from temper.models import nf4

    folder = _folder(source)
    if folders.kind_of(folder) == "model":
        return _load_plain(folder, dtype, constraints).to(device).eval()
    folders.weight_files(folder)  # refuses pickles
    in_nf4 = nf4.read(folder)
    base = merge(load_model(_base(source, folder), dtype="float32" if in_nf4 else dtype, device=device, constraints=False))
    if in_nf4:
        base = nf4.quantise(base, **in_nf4).to(_dtype("float32" if dtype == "auto" else dtype))
    return _load_adapter(base, folder).eval()


def held(source: Source) -> dict[str, Constraint]:
    """Module -> the mask or grid that the weights of a model's folder obey, without loading it. Empty for an adapter."""
    from temper.models import compressed
    from temper.models.constraints import load_constraints

    folder = _folder(source)
    return compressed.read(folder)[1] if compressed.is_compressed(folder) else load_constraints(folder)


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a model's folder; of an adapter's folder without one, its base's."""
    folder = _folder(source)
    if folders.tokenizer_hash(folder) is None:
        if folders.kind_of(folder) == "adapter":
            return load_tokenizer(_base(source, folder))
        raise Problem(f"{folder} has no tokenizer; put `tokenizer.json` and `tokenizer_config.json` into it")
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def save(model: nn.Module, tokenizer: Any, folder: Path, *, base_name: str = "", dtype: str | None = None) -> None:
    """`save_adapter` of an adapted model, else `save_model`."""
    if is_adapted(model):
        save_adapter(model, tokenizer, folder, base_name)
    else:
        save_model(model, tokenizer, folder, dtype=dtype)


def save_model(model: nn.Module, tokenizer: Any, folder: Path, *, dtype: str | None = None, shard: str = "5GB") -> None:
    """Writes a plain Hugging Face folder; the model stays as it is and may go on training.

    Constrained weights are written as they compute (P(W)), and the constraints in a sidecar beside them. dtype: of the
    floating-point weights in the folder (default: as they are). shard: largest size of one file. tokenizer: or None.

    Raises `Problem` on an adapted model, and on weights that the architecture does not have or lacks.
    """
    from temper.models.constraints import save_constraints
    from temper.models.parametrizations import constraints, folded

    if is_adapted(model):
        raise Problem("the model carries an adapter; save it with `save_adapter`, or `merge` it first")
    _check_keys(model)
    inner: Any = model
    folder.mkdir(parents=True, exist_ok=True)
    state = _cast(folded(model), dtype)
    with quiet():
        inner.save_pretrained(folder, state_dict=state, max_shard_size=shard)
    if dtype is not None:
        config = folders.read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf8")
    save_constraints(folder, constraints(model))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_adapter(model: nn.Module, tokenizer: Any, folder: Path, base_name: str) -> None:
    """Writes a PEFT folder that `peft` loads alone, on the base as it was before the adapter (see `to_plain_lora`).

    base_name: what the folder says it sits on: a hub name or a relative path. Raises `Problem` for an adapter inside a
    constraint: it computes with P(W + delta), and a PEFT folder means W + delta.
    """
    from temper.models import nf4
    from temper.models.parametrizations import ConstrainedAdapter

    if not is_adapted(model):
        raise Problem("the model carries no adapter; save it with `save_model`")
    for name, module in model.named_modules():
        if isinstance(module, ConstrainedAdapter):
            raise Problem(f"the adapter on `{name}` works inside a mask or grid, which a PEFT folder cannot hold; merge it, save the model")
    if Path(base_name).is_absolute() or ".." in Path(base_name).parts:
        raise Problem(f"base_name {shown(base_name)} is a path of this machine; give a hub name or a relative path without `..`")
    config, tensors = to_plain_lora(model)
    config.base_model_name_or_path = base_name
    config.revision = None
    config.inference_mode = True
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf8")
    # copies, since some types have one tensor in many layers, which safetensors does not take
    plain = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in sorted(tensors.items())}
    safetensors_torch.save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    nf4.save(folder, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' own progress bars off the terminal, where ours are."""
    shown_before = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            transformers.utils.logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------------------ inside


def _folder(source: Source) -> Path:
    return source.model if isinstance(source, Artefact) else folders.resolve(source)


def _base(source: Source, folder: Path) -> Source:
    if isinstance(source, Artefact) and source.base is not None:
        return source.base
    return folders.base_name(folder)


def _load_plain(folder: Path, dtype: str, constraints: bool) -> nn.Module:
    from temper.models import compressed
    from temper.models.constraints import load_constraints
    from temper.models.parametrizations import attach

    folders.weight_files(folder)  # refuses pickles
    config: Any = _config(folder)
    how = {"config": config, "dtype": dtype if dtype == "auto" else _dtype(dtype), "output_loading_info": True}
    obeyed: Mapping[str, Constraint] = load_constraints(folder) if constraints else {}
    dense = None
    if compressed.is_compressed(folder):
        try:
            dense, obeyed = compressed.read(folder, None if dtype == "auto" else _dtype(dtype))
        except Problem:
            if constraints:
                raise
    with quiet():
        if dense is not None:
            del config.quantization_config
            cls: Any = _auto(config)[1][type(config)]
            model, info = cls.from_pretrained(None, state_dict=dense, **how)
        else:
            auto = _auto(config)[0]
            model, info = auto.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **how)
    for what, names in (("lacks", info["missing_keys"]), ("holds, and the architecture has no place for,", info["unexpected_keys"])):
        if names:
            some = ", ".join(f"`{name}`" for name in sorted(names)[:3])
            raise Problem(f"{folder} {what} {len(names)} weights ({some}); its config.json and its weights do not belong together")
    return attach(model, obeyed) if constraints else model


def _config(folder: Path) -> Any:
    """The configuration, of a class that transformers has and uses for language models."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError) as error:
        code = folders.read_json(folder / "config.json").get("auto_map")
        why = "it brings its own code, which is not run" if code else str(error).partition(chr(10))[0]
        raise Problem(f"{folder} has no architecture of transformers: {why}") from error
    if type(config) not in _auto(config)[1]:
        told = ", ".join(config.architectures or [type(config).__name__])
        raise Problem(f"{folder} is no causal language model ({told}); give one of a transformers class `...ForCausalLM`")
    return config


def _auto(config: Any) -> tuple[Any, Any]:
    """What loads a model of the family that a configuration names, and the classes that it loads."""
    name = (config.architectures or [""])[0]
    match family(name):
        case "classifier" if name.endswith("ForTokenClassification"):
            return transformers.AutoModelForTokenClassification, transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
        case "classifier":
            return transformers.AutoModelForSequenceClassification, transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        case "masked":
            return transformers.AutoModelForMaskedLM, transformers.MODEL_FOR_MASKED_LM_MAPPING
        case "encoder-decoder":
            return transformers.AutoModelForSeq2SeqLM, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        case _:
            return transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def _load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    register()  # adapter types of our own
    with quiet():
        model = peft.PeftModel.from_pretrained(base, folder)  # type: ignore[arg-type]
    stored = {name for file in folders.weight_files(folder) for name in folders.header(file)}
    wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if stored != wanted:
        some = ", ".join(f"`{name}`" for name in sorted(stored ^ wanted)[:3])
        raise Problem(f"the adapter in {folder} does not fit its base: {len(stored ^ wanted)} weights stand on one side alone ({some})")
    return model


def _check_keys(model: Any) -> None:
    """Internal keys never leave: the weights are exactly those that the architecture has."""
    with torch.device("meta"):
        wanted = set(type(model)(model.config).state_dict())
    found = set(model.state_dict())
    if found != wanted:
        some = ", ".join(f"`{name}`" for name in sorted(found ^ wanted)[:3])
        raise Problem(f"{type(model).__name__} would be saved with weights that the architecture does not have, or without some: {some}")


def _cast(state: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Floating-point tensors in `dtype`; those that share memory (tied weights) still do."""
    if dtype is None:
        return state
    made: dict[tuple[Any, ...], torch.Tensor] = {}
    cast = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in made:
            made[place] = tensor.to(_dtype(dtype)) if tensor.is_floating_point() else tensor
        cast[name] = made[place]
    return cast


def _dtype(name: str) -> torch.dtype:
    known = ("float32", "bfloat16", "float16", "float64")
    if name not in known:
        raise Problem(f"no number format `{name}` for a model{nearest(name, known)}")
    return getattr(torch, name)
