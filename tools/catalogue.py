"""Writes src/temper/catalogue.json from a table of papers (JSON lines with at least the keys below), one row a line.

    python tools/catalogue.py papers.jsonl

Rows whose id begins with F (foundations: papers that methods point to and that the table lacks) are kept as they are in the file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

CATALOGUE = Path(__file__).parents[1] / "src" / "temper" / "catalogue.json"
KEYS = ("id", "title", "short", "engine", "name", "unit", "wave")
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain(title: str) -> str:
    r"""A title without LaTeX: `E$^{2}$GAN` -> `E²GAN`, `$\textit{Trans-LoRA}$` -> `Trans-LoRA`; a lone `$500` stays."""
    title = re.sub(r"\$\^\{?(\d+)\}?\$", lambda found: found[1].translate(RAISED), title)
    return re.sub(r"\$\\\w+\{([^{}]*)\}\$", r"\1", title)


def main(source: Path) -> None:
    rows = [json.loads(line) for line in source.read_text(encoding="utf8").splitlines() if line.strip()]
    kept = [row for row in json.loads(CATALOGUE.read_text(encoding="utf8")) if row["id"].startswith("F")] if CATALOGUE.exists() else []
    short = [{key: row[key] for key in KEYS} | {"title": plain(row["title"])} for row in rows]
    lines = [json.dumps(row, ensure_ascii=False) for row in sorted(short + kept, key=lambda row: row["id"])]
    CATALOGUE.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf8")
    print(f"{len(short)} papers and {len(kept)} foundations in {CATALOGUE}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
