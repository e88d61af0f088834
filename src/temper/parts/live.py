"""Slots at work in a run: started in the order of their needs, moved along, saved and restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from temper.parts.changes import Phased, Progress, Ramped
from temper.parts.marks import mark_of
from temper.parts.problems import Problem
from temper.parts.protocols import Question, held, slots


def starting_order(spec: Any, provided: Iterable[str] = (), only: Sequence[str] | None = None) -> list[str]:
    """Slots (or `only` some) in the order of their needs. Raises on a need that none of them meets and nothing provides, or a circle."""
    asked = [name for name in slots(spec) if only is None or name in only]
    needs = {name: {need for one in held(getattr(spec, name)) for need in mark_of(one).needs} for name in asked}
    gives = {name: {gift for one in held(getattr(spec, name)) for gift in mark_of(one).gives} for name in asked}
    have, order, waiting = set(provided), [], list(needs)
    for name, wanted in needs.items():
        for need in sorted(wanted - have - set().union(*gives.values(), set())):
            raise Problem(f"the part in slot `{name}` needs `{need}`, which no other part gives", (name,))
    while waiting:
        ready = [name for name in waiting if needs[name] <= have | gives[name]]
        if not ready:
            circle = ", ".join(f"`{name}` needs {' and '.join(f'`{n}`' for n in sorted(needs[name] - have))}" for name in waiting)
            raise Problem(f"these slots wait for one another: {circle}", (waiting[0],))
        for name in ready:
            have |= gives[name]
            order.append(name)
            waiting.remove(name)
    return order


class LiveSlot:
    """What stands in one slot during a run. Calls go to the live thing of the current phase."""

    def __init__(self, name: str, value: Any, question: Question, context: Any):
        self._name, self._value, self._question, self._context = name, value, question, context
        self._progress = Progress()
        self._phase = -1
        self._enter(0)

    def _enter(self, phase: int) -> None:
        self._phase = phase
        value = self._value.phases[phase][1] if isinstance(self._value, Phased) else self._value
        self._members = list(value) if isinstance(value, (tuple, list)) else [value]
        self._parts = [self._at(member) for member in self._members]
        self._live = [self._start(one) for one in self._parts]
        self._join()

    def _at(self, member: Any) -> Any:
        return member.at(self._progress) if isinstance(member, Ramped) else member

    def _start(self, one: Any) -> Any:
        return one.start(self._context) if hasattr(one, "start") else one

    def _join(self) -> None:
        several = isinstance(self._value, (tuple, list)) or len(self._live) > 1
        self.live = self._question.combine(self._live) if several and self._question.combine else self._live[0]

    def advance(self, progress: Progress) -> None:
        """Moves to `progress`: switches phase, asks ramped parts for their settings of now."""
        self._progress = progress
        if isinstance(self._value, Phased) and (phase := self._value.index(progress)) != self._phase:
            self.close()
            self._enter(phase)
            return
        for index, member in enumerate(self._members):
            if isinstance(member, Ramped) and (now := member.at(progress)) != self._parts[index]:
                self._parts[index] = now
                if hasattr(now, "start"):
                    self._live[index].update(now)
                else:
                    self._live[index] = now
                    self._join()

    def close(self) -> None:
        for one in self._live:
            if hasattr(one, "close"):
                one.close()

    def parameters(self) -> list[Any]:
        return [p for one in self._live if hasattr(one, "parameters") for p in one.parameters()]

    def state_dict(self) -> dict[str, Any]:
        states = {str(i): one.state_dict() for i, one in enumerate(self._live) if hasattr(one, "state_dict")}
        return {"phase": self._phase, "live": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["phase"] != self._phase:
            self.close()
            self._enter(state["phase"])
        for index, one in state["live"].items():
            self._live[int(index)].load_state_dict(one)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.live(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "live":
            raise AttributeError(name)
        return getattr(self.live, name)


class Live:
    """Every slot of a spec, started. An empty slot is None; plain settings are read through."""

    def __init__(self, spec: Any, context: Any, provided: Iterable[str] = (), only: Sequence[str] | None = None):
        self._spec = spec
        self._slots: dict[str, LiveSlot] = {}
        questions = slots(spec)
        for name in starting_order(spec, provided, only):
            value = getattr(spec, name)
            if value is not None:
                question = questions[name].question
                assert question
                self._slots[name] = LiveSlot(name, value, question, context.at(name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._slots:
            return self._slots[name]
        if name in slots(self._spec) and getattr(self._spec, name) is not None:
            raise AttributeError(f"slot {name} was not started")
        return getattr(self._spec, name)

    def __contains__(self, name: str) -> bool:
        """Whether a slot is started here."""
        return name in self._slots

    def adopt(self, other: Live, *names: str) -> None:
        """Takes over slots that were started before, where they are there: they are moved along, saved and closed with these."""
        for name in names:
            if name in other:
                self._slots[name] = other._slots.pop(name)

    def advance(self, progress: Progress) -> None:
        for one in self._slots.values():
            one.advance(progress)

    def parameters(self) -> list[Any]:
        return [p for one in self._slots.values() for p in one.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {name: one.state_dict() for name, one in self._slots.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, one in self._slots.items():
            one.load_state_dict(state[name])

    def close(self) -> None:
        for one in self._slots.values():
            one.close()
