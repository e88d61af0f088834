"""An artefact leaves the store: a plain Hugging Face (or PEFT) folder with a model card of its lineage, figures and licences."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from temper.context import write
from temper.models.classifiers import POOLING
from temper.parts import Problem, shown
from temper.passport import Artefact, Passport, family
from temper.store import Store, digest

MARK = "temper.json"
"""In an exported folder: which artefact it is. A folder without it is the user's own and is never overwritten."""


def export(artefact: Artefact, folder: Path, store: Store, *, merged: bool = False, lora: int | Literal["exact"] | None = None) -> Path:
    """Writes an artefact as a folder that `transformers` or `peft` load without this package.

    merged: an adapter is folded into its base first. lora: an adapter of whatever type becomes plain LoRA, exact or of this rank at
    most; what that loses of each module's change is in the folder's `temper.json`, under `export` and `lost`. Written beside and
    renamed; raises `Problem` where `folder` holds something else. Of two runs that export to one folder, the second waits.
    """
    if artefact.passport.kind != "adapter" and lora is not None:
        raise Problem(f"{shown(artefact.name or artefact.id[:12])} is a {artefact.passport.kind} and no adapter; leave out `--lora`")
    if merged and lora is not None:
        raise Problem("merged into its base an adapter is none any more; give `--merged` or `--lora`")
    with store.lock(f"export-{digest(str(Path(folder).resolve()))[:16]}"):
        return _export(artefact, Path(folder), store, merged, lora)


def lost(folder: Path) -> dict[str, float]:
    """Of an adapter that was exported as plain LoRA: module -> relative error of its change, where it is not exact."""
    return json.loads((folder / MARK).read_text(encoding="utf8"))["export"].get("lost", {})


def _export(artefact: Artefact, folder: Path, store: Store, merged: bool, lora: int | Literal["exact"] | None) -> Path:
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise Problem(f"{shown(folder.name)} holds files that no export wrote; choose another folder, or empty it")
    said: dict[str, Any] = {"artefact": artefact.id, "content": artefact.content, "merged": merged, **({"lora": lora} if lora else {})}
    there = json.loads((folder / MARK).read_text(encoding="utf8")).get("export", {}) if (folder / MARK).is_file() else {}
    if {key: value for key, value in there.items() if key != "lost"} == said:
        return folder
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.parent.mkdir(parents=True, exist_ok=True)
    if merged and artefact.passport.kind == "adapter":
        from temper.models import io
        from temper.models.deltas import merge

        io.save_model(merge(io.load_model(artefact)), io.load_tokenizer(artefact), beside)
    elif lora is not None:
        said["lost"] = _as_lora(artefact, beside, None if lora == "exact" else lora)
    elif (artefact.path / "model").is_dir() or artefact.passport.kind in ("model", "adapter"):
        shutil.copytree(artefact.model, beside)
    else:
        shutil.copytree(artefact.path, beside, ignore=shutil.ignore_patterns("record", "artefact.json"))
    write(beside / MARK, json.dumps({"export": said, "passport": artefact.passport.dump()}, indent=1))
    if artefact.passport.kind in ("model", "adapter"):
        write(beside / "README.md", card(dataclasses.replace(artefact, path=beside), lineage(artefact, store), merged))
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old)
    else:
        beside.rename(folder)
    return folder


def _as_lora(artefact: Artefact, folder: Path, rank: int | None) -> dict[str, float]:
    from temper.models import folders, io, nf4
    from temper.models.deltas import algebra

    model: Any = io.load_model(artefact)
    change = algebra.factors(model, rank=rank)
    name = folders.read_json(artefact.model / "adapter_config.json").get("base_model_name_or_path") or ""
    algebra.save(change, model.unload(), folder, name)
    nf4.save(folder, model)  # on which numbers it was trained
    io.load_tokenizer(artefact).save_pretrained(folder)
    return {module: round(error, 8) for module, error in change.errors.items()}


def upload(artefact: Artefact, name: str, store: Store, *, merged: bool = False, lora: int | Literal["exact"] | None = None) -> str:
    """Exports to a repository on the hub, private unless it exists. Returns its address."""
    import tempfile

    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        made = export(artefact, Path(folder) / "model", store, merged=merged, lora=lora)
        (made / MARK).unlink()
        try:
            huggingface_hub.create_repo(name, private=True, exist_ok=True)
            huggingface_hub.upload_folder(folder_path=made, repo_id=name)
        except huggingface_hub.errors.HfHubHTTPError as error:
            raise Problem(
                f"the hub refused {shown(name)}: {error}; log in with `hf auth login` and check that you may write there"
            ) from error
        except (huggingface_hub.errors.OfflineModeIsEnabled, OSError) as error:
            raise Problem(f"the hub cannot be reached ({type(error).__name__}); export to a folder instead") from error
    return f"https://huggingface.co/{name}"


def lineage(artefact: Artefact, store: Store) -> list[Mapping[str, Any]]:
    """What an artefact descends from through models, oldest first: records of the store, and passports from outside."""
    found: list[Mapping[str, Any]] = []
    key = artefact.id.partition("@")[0]
    while store.has(key):
        record = store.record(key)
        found.append(record)
        key = str(record["passport"]["parents"].get("model", "")).partition("@")[0]
    if key:
        found.append({"name": key[:12], "engine": "", "method": "", "passport": Passport("model").dump(), "figures": {}, "outside": True})
    return found[::-1]


_USES = {
    "causal": ("text-generation", "AutoModelForCausalLM"),
    "masked": ("fill-mask", "AutoModelForMaskedLM"),
    "encoder-decoder": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "classifier": ("text-classification", "AutoModelForSequenceClassification"),
    "token classifier": ("token-classification", "AutoModelForTokenClassification"),
}
"""The hub's name for what a family of models does, and what loads one."""


def _pooled(artefact: Artefact) -> str:
    """What a reader of a text's label does, where transformers alone gives each token's logits."""
    file = artefact.model / "config.json"
    how = json.loads(file.read_text(encoding="utf8")).get(POOLING) if file.is_file() else None
    return f"It labels texts: take the {how} of its logits over a text's tokens, padding left out." if how else ""


def _ours(artefact: Artefact) -> str:
    """What must be imported first for an adapter of a type that peft lacks; plain LoRA, as which it may leave, needs nothing."""
    from temper.models.deltas.tuners import KINDS

    file = artefact.model / "adapter_config.json"
    kind = json.loads(file.read_text(encoding="utf8")).get("peft_type") if file.is_file() else None
    return f", after `import temper.peft`: peft alone has no type {kind}" if kind in KINDS else ""


def card(artefact: Artefact, line: Sequence[Mapping[str, Any]], merged: bool) -> str:
    """A model card: front matter that the hub reads, then lineage and figures as tables."""
    from ruamel.yaml import YAML

    passport = artefact.passport
    licences = sorted({one for record in line for one in record["passport"]["licences"]} | set(passport.licences))
    adapter = passport.kind == "adapter" and not merged
    kind = family(passport.architecture)
    task, loader = _USES["token classifier" if (passport.architecture or "").endswith("ForTokenClassification") else kind]
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": ["temper"], "pipeline_tag": task}
    if len(licences) == 1:
        front["license"] = licences[0]
    import io as text

    stream = text.StringIO()
    YAML(typ="safe").dump(front, stream)
    rows = "\n".join(
        f"| {index} | {record['name']} | {record['engine'] or 'from outside'} {record['method']} | {record['passport']['numbers'] or ''} |"
        for index, record in enumerate(line, 1)
    )
    figures = "\n".join(f"| {name} | {figure} |" for name, figure in artefact.figures.items())
    terms = f"Licences of its parents: {', '.join(licences)}." if licences else "Its parents state no licence."
    loads = (
        f"Load it with `peft.PeftModel.from_pretrained(base, folder)`{_ours(artefact)}."
        if adapter
        else f"Load it with `transformers.{loader}.from_pretrained(folder)`. {_pooled(artefact)}".strip()
    )
    return f"""---
{stream.getvalue().strip()}
---

# {artefact.name or artefact.id[:12]}

{loads} {terms}

| | |
|---|---|
| artefact | `{artefact.id[:24]}` |
| kind | {"model" if merged else passport.kind} |
| architecture | {passport.architecture or ""} |
| parameters | {passport.parameters or ""} |
| numbers | {passport.numbers or ""} |
| share of weights kept by a mask | {passport.mask if passport.mask is not None else "no mask"} |
| aligned against | {passport.reference[:24] if passport.reference else "nothing"} |

## Lineage

| | step | made by | numbers |
|---|---|---|---|
{rows}

## Figures

| figure | value |
|---|---|
{figures or "| none measured by this step | |"}
"""
