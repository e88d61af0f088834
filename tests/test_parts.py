"""The mechanism of parts: names, settings, lists, phases, ramps, needs, live state, descriptions, schema."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal, Protocol

import jsonschema
import pytest

from temper import parts
from temper.context import Context
from temper.parts import (
    Count,
    Phased,
    Problem,
    Progress,
    Ramped,
    Rate,
    Share,
    Slot,
    Spec,
    ablations,
    build,
    describe,
    documented,
    dump,
    part,
    slot,
    spec,
    starting_order,
)


def total(live):
    return lambda x: sum(one(x) for one in live)


@slot(combine=total)
class Gate(Protocol):
    """How much may it teach? `x -> weight`."""

    def __call__(self, x: float) -> float: ...


@part
class Reliable:
    """Weighs by margin.  Formula: margin x."""

    margin: Rate = 0.4
    """Slope."""

    def __call__(self, x: float) -> float:
        return self.margin * x


@part(name="non-redundant")
class NonRedundant:
    """Counts the first `most`."""

    most: Count = 3
    share: Share = 0.5
    mode: Literal["soft", "hard"] = "soft"

    def __call__(self, x: float) -> float:
        return x if x < self.most else 0.0


class Counter:
    def __init__(self, step: float):
        self.step, self.total, self.closed = step, 0.0, False

    def __call__(self, x: float) -> float:
        self.total += self.step
        return self.total

    def update(self, part) -> None:
        self.step = part.step

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state) -> None:
        self.total = state["total"]

    def close(self) -> None:
        self.closed = True


@part(updates=True)
class Counting:
    """Keeps a sum."""

    step: Rate = 1.0

    def start(self, context) -> Counter:
        return Counter(self.step)


@part
class Stubborn:
    """Keeps state, takes no new settings."""

    step: Rate = 1.0

    def start(self, context) -> Counter:
        return Counter(self.step)


@part(needs=("teacher",))
class Taught:
    """Needs a teacher."""

    def start(self, context):
        teacher = context.want("teacher")
        return lambda x: teacher(x)


# a second slot has a module of its own, as in the house
other = type(sys)("tests_other_slot")
other.__dict__.update(part=part, slot=slot, Protocol=Protocol)
sys.modules["tests_other_slot"] = other
exec(
    '''
from __future__ import annotations

@slot(phased=False)
class Anchor(Protocol):
    """What holds it back?"""
    def __call__(self, x): ...

@part(gives=("teacher",))
class Teacher:
    """Gives a teacher."""
    scale: float = 2.0
    def start(self, context):
        teacher = lambda x: self.scale * x
        context.give("teacher", teacher)
        return teacher

@part
class Plain:
    """Gives nothing."""
    def __call__(self, x): return 0.0

@part(needs=("teacher",), gives=("pupil",))
class Circular:
    """Waits."""
    def start(self, context): return context.want("teacher")
''',
    other.__dict__,
)
Anchor = other.Anchor


@spec
class Toy(Spec):
    """A toy engine."""

    gate: Slot[Gate] = Reliable()
    anchor: Slot[Anchor] | None = None
    epochs: Count = 1
    """How often."""
    ratio: float | None = None


def problem(**raw) -> str:
    with pytest.raises(Problem) as caught:
        build(Toy, raw)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("word", ["non-redundant", "NonRedundant", "non_redundant", "NON REDUNDANT"])
def test_names_match_whatever_their_case_and_hyphens(word):
    assert build(Toy, {"gate": word}).gate == NonRedundant()


def test_settings_are_read_and_the_rest_keep_their_defaults():
    made = build(Toy, {"gate": {"non-redundant": {"most": 5}}, "epochs": 2})
    assert made.gate == NonRedundant(most=5)
    assert made.epochs == 2
    assert made.anchor is None


def test_a_method_lends_its_settings_to_the_same_part_only():
    base = Toy(gate=NonRedundant(most=7, share=0.1))
    assert build(Toy, {"gate": {"non-redundant": {"share": 0.9}}}, base=base).gate == NonRedundant(most=7, share=0.9)
    assert build(Toy, {"gate": {"reliable": {}}}, base=base).gate == Reliable()
    assert build(Toy, {}, base=base) == base


def test_lists_combine():
    made = build(Toy, {"gate": ["reliable", {"reliable": {"margin": 2.0}}]})
    assert made.gate == (Reliable(), Reliable(margin=2.0))
    live = parts.Live(made, Context("s", 0, None, None))
    assert live.gate(10.0) == pytest.approx(24.0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"gate": "relaible"}, "`gate`: slot `gate` has no part `relaible`; did you mean `reliable`?"),
        (
            {"gate": {"reliable": {"margins": 1.0}}},
            "`gate.reliable.margins`: part `reliable` has no setting `margins`; did you mean `margin`?",
        ),
        ({"gate": {"reliable": {"margin": True}}}, "`gate.reliable.margin`: true: a number is asked for"),
        ({"gate": {"reliable": {"margin": "1"}}}, '`gate.reliable.margin`: "1": a number is asked for'),
        ({"gate": {"reliable": {"margin": -1}}}, "`gate.reliable.margin`: -1: must be above 0"),
        ({"gate": {"non-redundant": {"most": 1.5}}}, "`gate.non-redundant.most`: 1.5: a whole number is asked for"),
        ({"gate": {"non-redundant": {"share": 1.5}}}, "`gate.non-redundant.share`: 1.5: must be at most 1"),
        ({"gate": {"non-redundant": {"mode": "sofd"}}}, '`gate.non-redundant.mode`: "sofd" is not a choice; did you mean `soft`?'),
        ({"gate": {"reliable": 3}}, "`gate.reliable`: 3: settings of `reliable` are a mapping such as {margin: 0.4}"),
        (
            {"gate": {"reliable": {}, "counting": {}}},
            "`gate`: a part is written `name` or `{name: {setting: value}}`, with one name; here are 2",
        ),
        (
            {"gate": 3},
            "`gate`: 3: slot `gate` takes the name of a part; there is `counting` · `non-redundant` · `reliable` · `stubborn` · `taught`",
        ),
        ({"gate": []}, "`gate`: slot `gate`: an empty list; name a part"),
        (
            {"gate": None},
            "`gate`: slot `gate` cannot be empty; there is `counting` · `non-redundant` · `reliable` · `stubborn` · `taught`",
        ),
        ({"anchor": ["plain"]}, "`anchor`: slot `anchor` takes one part, not a list"),
        (
            {"gate": ["reliable", "x"]},
            "`gate.1`: slot `gate` has no part `x`; there is `counting` · `non-redundant` · `reliable` · `stubborn` · `taught`",
        ),
        ({"epoch": 2}, "`epoch`: `toy` has no setting `epoch`; did you mean `epochs`?"),
        ({"epochs": 0}, "`epochs`: 0: must be above 0"),
        ({"ratio": "x"}, '`ratio`: "x": a number is asked for'),
        (
            {"gate": other.Plain()},
            "`gate`: part `plain` does not answer slot `gate`; there is `counting` · `non-redundant` · `reliable` · `stubborn` · `taught`",
        ),
    ],
)
def test_bad_settings_are_refused_with_value_rule_and_nearest_word(raw, message):
    assert problem(**raw) == message


def test_all_problems_are_told_at_once():
    with pytest.raises(parts.Problems) as caught:
        build(Toy, {"gate": "x", "epochs": "y"})
    assert len(caught.value.all) == 2


def test_construction_in_python_is_as_strict():
    with pytest.raises(ValueError, match=r"not answer|no part"):
        Toy(gate=other.Plain())
    with pytest.raises(ValueError, match=r"whole number|integer"):
        NonRedundant(most=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Reliable().margin = 3  # type: ignore[misc]


# --------------------------------------------------------------------------------------------- change over a run


def test_a_ramp_reaches_the_part_as_a_plain_number():
    made = build(Toy, {"gate": {"reliable": {"margin": {"ramp": [0.2, 0.6], "until": 0.5}}}})
    assert isinstance(made.gate, Ramped)
    live = parts.Live(made, Context("s", 0, None, None))
    seen = []
    for step in (0, 25, 50, 100):
        live.advance(Progress(step, 100))
        seen.append(live.gate(1.0))
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.6])


def test_a_live_part_is_updated_by_a_ramp_and_keeps_its_state():
    made = build(Toy, {"gate": {"counting": {"step": {"ramp": [1, 3]}}}})
    live = parts.Live(made, Context("s", 0, None, None))
    live.gate(0)
    live.advance(Progress(2, 2))
    assert live.gate(0) == 4.0


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"stubborn": {"step": {"ramp": [1, 2]}}},
            "`gate.stubborn.step`: `stubborn` keeps state and takes no new settings during a run; give one number",
        ),
        (
            {"reliable": {"margin": {"ramp": [1, 2, 3]}}},
            "`gate.reliable.margin.ramp`: [1, 2, 3]: a ramp is written `ramp: [first, last]` with two numbers",
        ),
        ({"reliable": {"margin": {"ramp": [1, -2]}}}, "`gate.reliable.margin.ramp.1`: -2: must be above 0"),
        (
            {"reliable": {"margin": {"ramp": [1, 2], "until": 2}}},
            "`gate.reliable.margin.until`: 2: must be a share of the run, from 0 to 1",
        ),
        (
            {"reliable": {"margin": {"ramp": [1, 2], "shape": "cosin"}}},
            '`gate.reliable.margin.shape`: "cosin" is not a choice; did you mean `cosine`?',
        ),
        (
            {"reliable": {"margin": {"ramp": [1, 2], "untill": 1.0}}},
            "`gate.reliable.margin.untill`: a ramp has no setting `untill`; did you mean `until`?",
        ),
    ],
)
def test_bad_ramps(raw, message):
    assert problem(gate=raw) == message


def test_phases_switch_close_and_are_checkpointed():
    made = build(Toy, {"gate": {"phased": [[10, "counting"], ["end", {"counting": {"step": 5.0}}]]}})
    assert isinstance(made.gate, Phased)
    live = parts.Live(made, Context("s", 0, None, None))
    first = live.gate.live
    assert live.gate(0) == 1.0
    live.advance(Progress(10, 20))
    assert first.closed
    assert live.gate(0) == 5.0
    saved = live.state_dict()
    again = parts.Live(made, Context("s", 0, None, None))
    again.load_state_dict(saved)
    assert again.gate(0) == 10.0


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            [["soon", "reliable"]],
            '`gate.phased.0.0`: "soon" is no point of a run; write a share such as 0.5, steps such as 200, "2M tokens", or end',
        ),
        ([["end"]], '`gate.phased.0`: ["end"]: a phase is written [until, part]'),
        ([[0.5, "relible"]], "`gate.phased.0.1`: slot `gate` has no part `relible`; did you mean `reliable`?"),
        ([[0.5, "reliable"], [100, "reliable"]], "`gate.phased`: phases count in share and steps; use one unit"),
        ([[0.5, "reliable"], [0.4, "reliable"]], "`gate.phased.1.0`: phases must end one after another"),
    ],
)
def test_bad_phases(raw, message):
    assert problem(gate={"phased": raw}) == message


def test_a_slot_that_may_not_change_refuses_phases_and_ramps():
    assert problem(anchor={"phased": [["end", "plain"]]}) == "`anchor.phased`: slot `anchor` may not change over a run; name one part"
    assert (
        problem(anchor={"teacher": {"scale": {"ramp": [1, 2]}}})
        == "`anchor.teacher.scale`: `scale` of `teacher` may not change over a run; give one number"
    )


# --------------------------------------------------------------------------------------------------------- needs


def test_slots_start_in_the_order_of_their_needs():
    made = build(Toy, {"gate": "taught", "anchor": "teacher"})
    assert starting_order(made) == ["anchor", "gate"]
    live = parts.Live(made, Context("s", 0, None, None))
    assert live.gate(3.0) == 6.0


def test_a_need_that_nobody_meets_is_refused():
    made = build(Toy, {"gate": "taught"})
    with pytest.raises(Problem) as caught:
        starting_order(made)
    assert str(caught.value) == "`gate`: the part in slot `gate` needs `teacher`, which no other part gives"
    assert starting_order(made, provided=("teacher",)) == ["gate", "anchor"]


def test_a_circle_of_needs_is_refused():
    @part(needs=("pupil",), gives=("teacher",))
    class Egg:
        """Waits too."""

        def start(self, context): ...

    made = dataclasses.replace(Toy(), anchor=other.Circular())
    object.__setattr__(made, "gate", Egg())
    with pytest.raises(Problem, match="these slots wait for one another"):
        starting_order(made)


# --------------------------------------------------------------------------------------- descriptions and schema


def test_dump_is_canonical_and_reads_back():
    made = build(Toy, {"gate": [{"non-redundant": {"most": 5}}, "reliable"], "anchor": "teacher"})
    assert dump(made)["gate"][0] == {"non-redundant": {"most": 5, "share": 0.5, "mode": "soft"}}
    assert build(Toy, dump(made)) == made


def test_documentation_comes_from_the_dataclass():
    assert documented(Reliable) == {"margin": "Slope."}
    rows = {row.slot: row for row in describe(Toy())}
    assert rows["gate"].question == "How much may it teach? `x -> weight`."
    assert rows["gate"].settings == {"margin": 0.4}
    assert rows["anchor"].part == "none"


def test_ablation_swaps_dependents_together():
    made = build(Toy, {"gate": "taught", "anchor": "teacher"})
    found = ablations(made)
    assert set(found) == {"gate", "anchor+gate"}
    assert found["anchor+gate"] == Toy()
    assert found["gate"].anchor == other.Teacher()


def test_schema_accepts_what_build_accepts():
    definitions: dict = {}
    schema = {**parts.schema(Toy, definitions), "$defs": definitions}
    checker = jsonschema.Draft202012Validator(schema)
    good = [
        {"gate": "reliable"},
        {"gate": {"non-redundant": {"most": 5}}},
        {"gate": ["reliable", "counting"]},
        {"anchor": "none", "epochs": 3},
    ]
    bad = [{"gate": "relaible"}, {"gate": {"reliable": {"margins": 1}}}, {"anchor": ["plain"]}, {"epochs": "x"}, {"what": 1}]
    for one in good:
        build(Toy, one)
        assert not list(checker.iter_errors(one)), one
    for one in bad:
        assert list(checker.iter_errors(one)), one
        with pytest.raises(Problem):
            build(Toy, one)


# ---------------------------------------------------------------------------------------------- a user's own code


def test_a_users_function_stands_in_a_slot(tmp_path):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\n")
    scope = parts.Scope(tmp_path)
    made = build(Toy, {"gate": "mine.py:double"}, scope=scope)
    assert made.gate(4) == 8
    before = dump(made)
    (tmp_path / "mine.py").write_text("def double(x):\n    return 3 * x\n")
    assert dump(build(Toy, {"gate": "mine.py:double"}, scope=scope)) != before
    with pytest.raises(Problem, match="has no function `doubel`; did you mean `double`"):
        build(Toy, {"gate": "mine.py:doubel"}, scope=scope)


def test_use_adds_parts_that_derive_from_the_protocol(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from temper.parts import part\nfrom tests_gate_home import Gate\n\n@part\nclass Tripled(Gate):\n"
        "    '''Times three.'''\n    by: float = 3.0\n    def __call__(self, x):\n        return self.by * x\n"
    )
    home = type(sys)("tests_gate_home")
    home.Gate = Gate  # type: ignore[attr-defined]
    sys.modules["tests_gate_home"] = home
    scope = parts.Scope.of(tmp_path, ["mine.py"])
    made = build(Toy, {"gate": {"tripled": {"by": 4.0}}}, scope=scope)
    assert made.gate(2) == 8.0
    with pytest.raises(Problem, match="did you mean `tripled`"):
        build(Toy, {"gate": "triped"}, scope=scope)
    with pytest.raises(Problem, match="no file"):
        parts.Scope.of(tmp_path, ["yours.py"])


# ------------------------------------------------------------------------------------------------- random streams


def test_streams_depend_on_their_keys_alone():
    context = Context("tune", 3, None, None)
    one, two = context.stream("gate"), context.stream("loss")
    assert one.seed(5, 2) == context.stream("gate").seed(5, 2)
    assert len({one.seed(5, 2), one.seed(2, 5), two.seed(5, 2), Context("tune", 4, None, None).stream("gate").seed(5, 2)}) == 4
    assert 0 <= one.seed(1) < 2**63


def test_installed_packages_add_parts_through_entry_points(monkeypatch):
    @part
    class Plugged(Gate):
        """From another package."""

        by: float = 5.0

        def __call__(self, x: float) -> float:
            return self.by * x

    point = type("Point", (), {"group": Gate.__module__, "value": "other:Plugged", "load": staticmethod(lambda: Plugged)})
    broken = type("Point", (), {"group": "tests_other_slot", "value": "other:Gone", "load": staticmethod(lambda: 1 / 0)})
    from temper.parts import protocols

    monkeypatch.setattr(protocols, "plugins", lambda: (("other", "1.0", point), ("other", "1.0", broken)))
    protocols._plugged.cache_clear()
    try:
        assert build(Toy, {"gate": {"plugged": {"by": 2.0}}}).gate(3.0) == 6.0
        with pytest.raises(
            Problem, match=r"the plug-in .other:Gone. does not load: ZeroDivisionError: division by zero; mend or uninstall it"
        ):
            build(Toy, {"anchor": "plain"})
    finally:
        protocols._plugged.cache_clear()
