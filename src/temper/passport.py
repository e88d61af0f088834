"""What an artefact is, and what a step accepts and gives.

A passport says what a thing on disk descends from and in what form it is; an engine's `passport(spec, parents)` says
what a step would give for such parents, or refuses, before any compute is spent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper.parts import Problem

DATA = ("text", "completion", "chat", "preference")
"""The shapes of data, as TRL documents them."""
KINDS = ("model", "adapter", "figures", *DATA)
UNKNOWN = "?"
"""A hash that is not known before the step has run."""

_ENCODER_DECODER = re.compile(
    r"(M?T5|UMT5|LongT5|T5Gemma2?|SwitchTransformers|M?Bart|PLBart|Mvp|LED|BigBirdPegasus|PegasusX?|ProphetNet|Blenderbot(Small)?|M2M100|"
    r"NllbMoe|FSMT)ForConditionalGeneration|MarianMTModel"
)


_ENDINGS = {"ForMaskedLM": "masked", "ForSequenceClassification": "classifier", "ForTokenClassification": "classifier"}

LANGUAGE = ("causal", "masked", "encoder-decoder")
"""How models predict text; see `family`."""
FAMILIES = (*LANGUAGE, "classifier")
"""How models predict."""


def family(architecture: str | None) -> str:
    """How a model of this class predicts: `masked`, what is hidden from it; `encoder-decoder`, a second text; `classifier`, a label of a
    text or of each of its words; else `causal`, the next token."""
    name = architecture or ""
    found = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
    return found or ("encoder-decoder" if _ENCODER_DECODER.fullmatch(name) else "causal")


@dataclasses.dataclass(frozen=True)
class Passport:
    """What an artefact is.

    kind: model, adapter, figures, or a shape of data. parents: role -> artefact id. base: hash of the weights that an
    adapter sits on, or of a model's own. tokenizer, template: their hashes, None where there is none. numbers: `float32`,
    `bfloat16`, `int4-g32-sym`. mask: share of weights kept where a mask holds, else None. adapters: ids of the adapters
    in it or under it, oldest first. reference: id of the policy that it was aligned against. architecture: transformers'
    class name. parameters: how many.
    """

    kind: str
    parents: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    numbers: str | None = None
    mask: float | None = None
    adapters: tuple[str, ...] = ()
    reference: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    origin: str = ""
    licences: tuple[str, ...] = ()

    @property
    def quantised(self) -> bool:
        return bool(self.numbers) and self.numbers.startswith(("int", "nf"))

    def dump(self) -> dict[str, Any]:
        made = dataclasses.asdict(self)
        return {**made, "parents": dict(self.parents), "adapters": list(self.adapters), "licences": list(self.licences)}

    @staticmethod
    def load(raw: Mapping[str, Any]) -> Passport:
        return Passport(**{**raw, "adapters": tuple(raw["adapters"]), "licences": tuple(raw["licences"])})


@dataclasses.dataclass(frozen=True)
class Input:
    """What an engine takes in one role.

    kinds: of artefact or shapes of data. many: a list is taken. optional: may be missing. default: what a recipe
    means when it is silent: `last` (the step before that gave such a kind), `model` or `data` (the recipe's own), or nothing. families:
    of models, which are taken.
    """

    kinds: tuple[str, ...]
    many: bool = False
    optional: bool = False
    default: str = ""
    about: str = ""
    families: tuple[str, ...] = ("causal",)

    @property
    def is_data(self) -> bool:
        return all(kind in DATA for kind in self.kinds)

    def accept(self, role: str, passport: Passport) -> None:
        """Refuses a kind, or a model of a family, that the engine does not take."""
        if passport.kind not in self.kinds:
            wanted = " or ".join(f"`{kind}`" for kind in self.kinds)
            raise Problem(f"takes {wanted}; {passport.origin or 'what is given'} is `{passport.kind}`", (role,))
        if (found := family(passport.architecture)) not in self.families:
            raise Problem(
                f"takes {' or '.join(self.families)} models; {passport.origin or 'what is given'} is {found} ({passport.architecture}) and "
                f"{_UNLIKE[found]}, or give a causal one",
                (role,),
            )


_UNLIKE = {
    "causal": "writes from left to right",
    "masked": "does not write from left to right; train it with `pretrain` or `tune`",
    "encoder-decoder": "does not write from left to right; train it with `pretrain` or `tune`",
    "classifier": "gives labels, not text; train it with `tune`, measure it with `evaluate`",
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number with its uncertainty: the interval's ends, how many examples stand behind it, its unit, which way is better."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    better: str | None = None

    def dump(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        interval = f" [{self.low:.4g}, {self.high:.4g}]" if self.low is not None and self.high is not None else ""
        return f"{self.value:.4g}{interval}{' ' + self.unit if self.unit else ''}"


_FIGURE = re.compile(r"(?:(?P<model>.+?)\.)?(?P<figure>[^.\[\]]+(?:\[[^=\]]+=.*\])?)")


def whose(name: str) -> tuple[str, str]:
    """A figure's name in two: `tune.accuracy[task=sort]` is of `tune` and is `accuracy[task=sort]`. The first is empty where no model is
    named."""
    found = _FIGURE.fullmatch(name)
    return (found["model"] or "", found["figure"]) if found else ("", name)


@dataclasses.dataclass(frozen=True)
class Artefact:
    """What a step left: an immutable folder with a passport.

    id: its key in the store, or a hash of a folder from outside. path: holds `model/` (a Hugging Face or PEFT folder) or
    other files. base: for an adapter, the artefact that it sits on. content: hash of its files without the record of how
    they were made.
    """

    id: str
    path: Path
    passport: Passport
    base: Artefact | None = None
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    content: str = ""
    name: str = ""

    @property
    def model(self) -> Path:
        """The Hugging Face or PEFT folder."""
        inside = self.path / "model"
        return inside if inside.is_dir() else self.path


@dataclasses.dataclass(frozen=True)
class Output:
    """What an engine's `run` returns; the files are in `context.out`.

    passport: where it differs from what was predicted. base: what a new adapter sits on; None: the incoming model, or
    what the incoming adapter sits on.
    """

    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    passport: Passport | None = None
    base: Artefact | None = None


class Inputs(dict[str, Any]):
    """Role -> artefact, list of artefacts, or data source; also as attributes. A missing optional input is None."""

    def __getattr__(self, role: str) -> Any:
        if role.startswith("_"):
            raise AttributeError(role)
        return self.get(role)


def child(parent: Passport, role: str = "model", **changes: Any) -> Passport:
    """A passport that descends from another: the same but for `changes`; hashes of weights unknown until made."""
    fresh: dict[str, Any] = {"base": UNKNOWN, "parents": {}, "origin": ""}
    return dataclasses.replace(parent, **{**fresh, **changes})
