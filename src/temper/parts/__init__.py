"""Slots, parts, specs: the one mechanism by which methods are made.

A slot is a `typing.Protocol` that asks one question; a part is a small frozen dataclass that answers it; a spec
is an engine's dataclass with a field per slot. From these dataclasses alone come validation with errors that
name the nearest right word, descriptions, JSON Schema, ablations and canonical settings for cache keys.
"""

from temper.parts.changes import Phased, Progress, Ramp, Ramped, Until
from temper.parts.describing import Described, ablations, describe, documented, engine, engines, method, methods, schema, spec_of, summary
from temper.parts.live import Live, LiveSlot, starting_order
from temper.parts.marks import Count, Function, Mark, Rate, Scope, Share, Spec, is_part, load_file, mark_of, part, spec
from temper.parts.problems import Problem, Problems, collect, nearest, plain, shown, trail
from temper.parts.protocols import Question, Setting, Slot, held, plugins, settings, slot, slots
from temper.parts.reading import build, dump, fill

__all__ = [
    "Count",
    "Described",
    "Function",
    "Live",
    "LiveSlot",
    "Mark",
    "Phased",
    "Problem",
    "Problems",
    "Progress",
    "Question",
    "Ramp",
    "Ramped",
    "Rate",
    "Scope",
    "Setting",
    "Share",
    "Slot",
    "Spec",
    "Until",
    "ablations",
    "build",
    "collect",
    "describe",
    "documented",
    "dump",
    "engine",
    "engines",
    "fill",
    "held",
    "is_part",
    "load_file",
    "mark_of",
    "method",
    "methods",
    "nearest",
    "part",
    "plain",
    "plugins",
    "schema",
    "settings",
    "shown",
    "slot",
    "slots",
    "spec",
    "spec_of",
    "starting_order",
    "summary",
    "trail",
]
