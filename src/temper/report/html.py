"""HTML that escapes itself, and the tables made of it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from temper.parts import shown
from temper.report.words import prose


class Html(str):
    """Text that is already HTML. Everything that is not `Html` is escaped by `tag`, so a step's name can never become markup."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`; children and values that are not `Html` are escaped, `None` is left out.

    A trailing underscore of an attribute is dropped and others become hyphens (`class_`, `aria_label`).
    """
    given = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        given.append(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"')
    inside = join(*children)
    return Html(f"<{name}{''.join(given)}>{inside}" + ("" if name in {"meta", "col", "br"} else f"</{name}>"))


def join(*children: object) -> Html:
    """Children one after another: `Html` as it is, other values escaped, `None` left out, lists in order."""
    parts = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else html.escape(str(child)))
    return Html("".join(parts))


def heads(*columns: tuple[str, str | None, bool]) -> Html:
    """A head row of sorting buttons: (title, small print, numeric)."""
    cells = [
        tag("th", tag("button", title, type="button"), tag("small", more) if more else None, scope="col", class_="num" if numeric else None)
        for title, more, numeric in columns
    ]
    return tag("thead", tag("tr", cells))


def table(head: Html, rows: Sequence[Html], caption: str) -> Html:
    """A table that scrolls sideways where the page is narrow; `caption` names it for those who hear the page."""
    return tag(
        "div", tag("table", head, tag("tbody", rows), aria_label=caption), class_="wide", tabindex="0", role="region", aria_label=caption
    )


def plainly(value: Any) -> str:
    """A setting's value: text as it is, the rest in JSON's words."""
    return value if isinstance(value, str) else shown(value)


def pairs(values: Mapping[str, Any]) -> Html:
    """Names and values."""
    return tag("dl", [(tag("dt", prose(name)), tag("dd", plainly(value))) for name, value in values.items()], class_="pairs")
