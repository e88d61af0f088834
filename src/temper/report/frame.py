"""What every report's page has: the document with its strict policy, sections with their links, facts at the top, how to run it again."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.report.html import Html, join, pairs, tag


def document(
    title: str, top: Html, sections: Mapping[str, tuple[str, Html | None]], foot: str, styles: Sequence[str] = ("report.css",)
) -> str:
    """The whole page. `sections`: key -> (title, content); those without content are left out. `styles`: files in this folder."""
    kept = {key: value for key, value in sections.items() if value[1]}
    head, style, script = _head(title, styles)
    body = tag(
        "body",
        tag("header", top, tag("nav", [tag("a", key, href=f"#{key.lower()}") for key in kept], aria_label="Sections")),
        tag("main", [_section(key.lower(), words, content) for key, (words, content) in kept.items()]),
        tag("footer", foot),
        script,
    )
    return "<!doctype html>\n" + tag("html", tag("head", head, style), body, lang="en") + "\n"


def _head(title: str, styles: Sequence[str]) -> tuple[list[Html], Html, Html]:
    """Head elements, style and script; the policy lets this very script and nothing from outside run."""
    here = Path(__file__).parent
    style = "".join((here / name).read_text(encoding="utf8") for name in styles)
    script = (here / "report.js").read_text(encoding="utf8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · Temper"),
    ]
    return head, tag("style", Html(style)), tag("script", Html(script))


def _section(key: str, title: str, content: Html | None) -> Html:
    return tag("section", tag("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")


def facts(rows: Sequence[tuple[str, str, str]]) -> Html:
    """The few numbers that sum a page up: (name, value, small print)."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value, tag("small", more))) for name, value, more in rows], class_="facts")


def again(hint: str, command: str, text: str, name: str, versions: Mapping[str, str], machine: Mapping[str, Any]) -> Html:
    """The command, the file (`name` says which), and what it ran on."""
    return join(
        tag("p", hint, class_="hint"),
        tag("pre", tag("code", command), aria_label="Command") if command else None,
        tag("pre", tag("code", text), tabindex="0", aria_label=name) if text else None,
        tag("h3", "Versions") if versions else None,
        pairs(versions),
        tag("h3", "Machine") if machine else None,
        pairs(machine),
    )
