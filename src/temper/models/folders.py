"""What is known of a model's folder from its bytes and its JSON, without torch: for passports of models made elsewhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from temper.models.hub import FILES, resolve, revision_of
from temper.parts import Problem, fill, nearest, shown
from temper.passport import Passport
from temper.store import digest, digest_file

CONSTRAINTS = "temper_constraints.safetensors"
"""The masks and grids that a model's weights obey (written by `constraints.save_constraints`)."""

_FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2"}
_SIDE = re.compile(r"(_scale|_zero_point|_shape|_g_idx|\.scales|\.qzeros|\.g_idx|absmax|quant_map|quant_state\.\S+)$")
"""Tensors that a quantised weight needs besides its codes."""
_HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the safetensors format."""


__all__ = ["Folder", "base_name", "content", "describe", "kind_of", "passport", "resolve", "revision_of", "template_hash", "tokenizer_hash"]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model's or an adapter's folder.

    kind: model or adapter. architecture: transformers' class name (of an adapter: None). parameters: how many numbers.
    weights, tokenizer, template: SHA-256 of what matters in them, None where there is none. numbers: number format
    (`float32`, `int4-g32-sym`). mask: share of weights kept where masks hold. base: what an adapter says it sits on.
    revision: the hub's commit, when it lies in the hub's cache. licence: as its model card says.
    """

    path: Path
    kind: str
    architecture: str | None
    parameters: int
    weights: str
    tokenizer: str | None
    template: str | None
    numbers: str
    mask: float | None = None
    base: str | None = None
    revision: str | None = None
    licence: str | None = None


def describe(folder: Path, digest_of: Callable[[Path], str] | None = None) -> Folder:
    """All of `Folder`. digest_of: SHA-256 of a file (default `file_hash`; one may hand in another that remembers).

    Raises `Problem` where the folder is no model (with the nearest file), holds pickled weights alone, or is not whole.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    config = read_json(folder / ("config.json" if kind == "model" else "adapter_config.json"))
    files = weight_files(folder)
    tensors = {name: one for file in files for name, one in header(file).items()}
    architectures = config.get("architectures") or [None]
    return Folder(
        path=folder,
        kind=kind,
        architecture=architectures[0] if kind == "model" else None,
        parameters=_count(files, tensors, config.get("quantization_config") or {}),
        weights=digest([(digest_of or file_hash)(file) for file in files]),
        tokenizer=tokenizer_hash(folder),
        template=template_hash(folder),
        numbers=_numbers(folder, config, tensors),
        mask=_density(folder),
        base=base_name(folder) if kind == "adapter" else None,
        revision=revision_of(folder),
        licence=_licence(folder),
    )


def passport(folder: Path, origin: str = "", digest_of: Callable[[Path], str] | None = None) -> Passport:
    """The passport of a model or adapter that was made elsewhere. digest_of: as for `describe`."""
    found = describe(folder, digest_of)
    return Passport(
        kind=found.kind,
        base=found.weights,
        tokenizer=found.tokenizer,
        template=found.template,
        numbers=found.numbers,
        mask=found.mask,
        architecture=found.architecture,
        parameters=found.parameters,
        origin=origin,
        licences=(found.licence,) if found.licence else (),
    )


def content(folder: Path, digest_of: Callable[[Path], str] | None = None) -> str:
    """SHA-256 over the names and contents of all files that a model is read from (not its card, not weights in other forms)."""
    folder = Path(folder)
    files = {*weight_files(folder), *(one for pattern in FILES[1:5] for one in folder.glob(pattern)), *folder.glob(CONSTRAINTS)}
    return digest({file.name: (digest_of or file_hash)(file) for file in sorted(files)})


def base_name(folder: Path) -> str:
    """What an adapter's folder says it sits on: a hub name or a path; a path beside the folder is given in full."""
    name = read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise Problem(f"the adapter in {folder} does not say what it sits on; write base_model_name_or_path into its adapter_config.json")
    beside = Path(folder) / name
    return str(beside) if beside.is_dir() else name


def file_hash(file: Path) -> str:
    """SHA-256 of a file; of one in the hub's cache that is named by it, the name."""
    real = file.resolve()
    named = real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name)
    return real.name if named else digest_file(file)


def kind_of(folder: Path) -> str:
    """`model` or `adapter`, by the configuration file that is there."""
    if not folder.is_dir():
        raise Problem(f"no folder {folder}; give a folder with `config.json`, or a hub name such as `owner/model`")
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "model"
    raise Problem(f"{folder} holds neither `config.json` nor `adapter_config.json`{_nearest_file('config.json', folder)}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, sorted. Raises `Problem` on pickles and on missing shards."""
    stem = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name:
                raise Problem(f"{index} names the file {shown(name)}, outside its folder; only files beside it are read")
            if not (folder / name).is_file():
                raise Problem(f"{folder} lacks {name}, which its index names; download it again")
        return [folder / name for name in names]
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    pickles = sorted(one.name for one in folder.glob("*.bin"))
    if pickles:
        raise Problem(
            f"{folder} holds pickled weights alone ({pickles[0]}), and reading a pickle can run any code; choose a revision with "
            "safetensors, or convert it where that is safe: load it with transformers and `save_pretrained`"
        )
    raise Problem(f"{folder} has no {stem}.safetensors{_nearest_file(f'{stem}.safetensors', folder)}")


def header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor -> {"dtype", "shape", "data_offsets"} of a safetensors file, offsets counted from the file's start."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise Problem(f"{file} is no safetensors file: its header would be {length} bytes of {size}; download or save it again")
        try:
            raw = json.loads(opened.read(length))
        except ValueError as error:
            raise Problem(f"{file} is no safetensors file: its header is not JSON ({error}); download or save it again") from error
    raw.pop("__metadata__", None)
    start = 8 + length
    made = {name: {**one, "data_offsets": [start + offset for offset in one["data_offsets"]]} for name, one in raw.items()}
    end = max((one["data_offsets"][1] for one in made.values()), default=start)
    if end != size:
        raise Problem(f"{file} is not whole: {size} bytes where its header says {end}; download or save it again")
    return made


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise Problem(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Problem(f"{file} must hold a JSON object, and holds a {type(found).__name__}")
    return found


# ------------------------------------------------------------------------------------------- tokenizer and template


def tokenizer_hash(folder: Path) -> str | None:
    """SHA-256 of what decides which ids a text becomes, the same before and after the tokenizer is saved again.

    That is `tokenizer.json` without its padding and truncation (a state, not a property), and the tokens that begin,
    end and stand in for text. The padding token is left out: it never reaches a loss.
    """
    whole = folder / "tokenizer.json"
    if whole.is_file():
        model: Any = {key: value for key, value in read_json(whole).items() if key not in ("padding", "truncation")}
    else:
        names = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
        parts = [folder / name for name in names if (folder / name).is_file()]
        if not parts:
            return None
        model = {file.name: digest_file(file) for file in parts}
    config = _json_if_there(folder / "tokenizer_config.json")
    special = {**_json_if_there(folder / "special_tokens_map.json"), **config}
    tokens = {key: _content(special.get(key)) for key in ("bos_token", "eos_token", "unk_token")}
    flags = {key: config[key] for key in ("add_bos_token", "add_eos_token") if config.get(key) is not None}
    return digest([model, tokens, flags])


def template_hash(folder: Path) -> str | None:
    """SHA-256 of the chat template, None where there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    found = _json_if_there(folder / "tokenizer_config.json").get("chat_template")
    found = found or _json_if_there(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {one["name"]: one["template"] for one in found}.get("default")
    return hashlib.sha256(found.encode()).hexdigest() if found else None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _json_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


# ------------------------------------------------------------------------------------------------- counts and formats


def _count(files: list[Path], tensors: Mapping[str, Mapping[str, Any]], quantised: Mapping[str, Any]) -> int:
    """Numbers of the model as it computes: packed codes count as what they unpack to, scales not at all."""
    if not quantised:
        return sum(math.prod(one["shape"]) for one in tensors.values())
    shapes = {name.removesuffix("_shape"): shape for file in files for name, shape in _packed_shapes(file)}
    total = sum(math.prod(shape) for shape in shapes.values())
    for name, one in tensors.items():
        if _SIDE.search(name) or name.removesuffix("_packed") in shapes:
            continue
        packed = 1
        if name.endswith("qweight") and "bits" in quantised:  # GPTQ and AWQ: words of 32 bits
            packed = 32 // quantised["bits"]
        elif one["dtype"] == "U8" and quantised.get("load_in_4bit"):  # bitsandbytes: two codes a byte
            packed = 2
        total += packed * math.prod(one["shape"])
    return total


def _packed_shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    """`...weight_shape` -> the shape of a packed weight before packing: tiny tensors of compressed-tensors, read from the file."""
    with file.open("rb") as opened:
        for name, one in header(file).items():
            if name.endswith("weight_shape"):
                width = {"I64": 8, "I32": 4}[one["dtype"]]
                first, last = one["data_offsets"]
                opened.seek(first)
                raw = opened.read(last - first)
                yield name, [int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width)]


def _numbers(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> str:
    labels = _grid_labels(folder)
    if found := config.get("quantization_config"):
        labels = labels or _quantised(found)
    if labels:
        return "+".join(sorted(labels))
    weight: dict[str, int] = {}
    for one in tensors.values():
        weight[one["dtype"]] = weight.get(one["dtype"], 0) + math.prod(one["shape"])
    most = max(weight, key=lambda dtype: weight[dtype])
    return _FORMATS.get(most, most.lower())


def _quantised(config: Mapping[str, Any]) -> set[str]:
    """Number formats of a `quantization_config`, in the words of `grids`."""
    if config.get("config_groups"):
        return {_label(group["weights"]) for group in config["config_groups"].values() if group.get("weights")}
    if config.get("load_in_4bit"):
        return {f"{config.get('bnb_4bit_quant_type', 'fp4')}-g64"}  # bitsandbytes has this one block size
    method = str(config.get("quant_method", "unknown"))
    if "bits" in config:
        symmetric = config.get("sym", not config.get("zero_point", True))
        size = config.get("group_size", config.get("q_group_size", -1))
        return {_label({"num_bits": config["bits"], "group_size": size, "symmetric": symmetric})}
    return {method}


def _label(weights: Mapping[str, Any]) -> str:
    size = weights.get("group_size")
    group = f"g{size}" if size and size > 0 else weights.get("strategy") or "channel"
    if weights.get("type", "int") == "float":
        return f"fp{weights['num_bits']}-{group}"
    return f"int{weights['num_bits']}-{group}-{'sym' if weights.get('symmetric', True) else 'asym'}"


def _constraint_settings(folder: Path) -> dict[str, Any]:
    """Module -> settings of its constraint, from the sidecar's header."""
    file = folder / CONSTRAINTS
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        raw = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return json.loads(raw.get("__metadata__", {}).get("temper", "{}"))


def _flat(settings: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(prefix of its tensors, settings) of each single constraint in a constraint."""
    if settings["kind"] == "stack":
        return [(f"{index}.", one) for index, one in enumerate(settings["parts"])]
    return [("", settings)]


def _grid_labels(folder: Path) -> set[str]:
    from temper.models.grids import Grid

    found = [one for settings in _constraint_settings(folder).values() for _, one in _flat(settings)]
    return {fill(Grid.__slot__, one["grid"]).label for one in found if one["kind"] == "grid"}  # type: ignore[attr-defined]


def _density(folder: Path) -> float | None:
    """Share kept of all weights that a mask covers."""
    settings = _constraint_settings(folder)
    kept = total = 0
    if settings:
        tensors = header(folder / CONSTRAINTS)
        raw = (folder / CONSTRAINTS).read_bytes()
        for name, constraint in settings.items():
            for prefix, one in _flat(constraint):
                if one["kind"] == "mask":  # bits, the last byte filled up with zeros
                    first, last = tensors[f"{name}:{prefix}keep"]["data_offsets"]
                    kept += int.from_bytes(raw[first:last], "little").bit_count()
                    total += math.prod(one["shape"])
    return kept / total if total else None


def _licence(folder: Path) -> str | None:
    """The `license:` of the model card's header."""
    card = folder / "README.md"
    found = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf8", errors="replace"), re.DOTALL) if card.is_file() else None
    line = re.search(r"^license:\s*(\S+)", found[1], re.MULTILINE) if found else None
    return line[1].strip("\"'") if line else None


def _nearest_file(name: str, folder: Path) -> str:
    return nearest(name, [one.name for one in folder.iterdir() if one.is_file()])
