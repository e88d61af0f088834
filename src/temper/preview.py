"""The first rows of data as a model will see them: its template, its tokens, which of them are supervised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from temper.recipe import house
from temper.run import address, run
from temper.store import Store
from temper.tasks.source import source


def preview(data: str, model: str | None, store: Store, *, rows: int, max_length: int, split: str) -> dict[str, Any]:
    """Per row, pieces of text with whether they are supervised. Without a model, the rows' columns as text.

    Raises `Problem` where the data cannot be read or the tokenizer lacks what they need.
    """
    loaded = source(data, Path()).load(split)  # type: ignore[arg-type]
    told: dict[str, Any] = {"name": loaded.name, "rows": len(loaded), "shape": loaded.shape, "split": split, "origin": loaded.origin}
    if model is None:
        columns = {
            "text": ("text",),
            "completion": ("prompt", "completion"),
            "chat": ("messages",),
            "preference": ("prompt", "chosen", "rejected"),
        }
        first = columns[loaded.shape]
        pieces = [[(_plain(row[name]), name != "prompt") for name in first] for row in loaded.rows[:rows]]
        return {**told, "unit": "columns", "examples": pieces}
    import dataclasses

    from temper.models.io import load_tokenizer
    from temper.train.examples import encode
    from temper.train.examples import preview as pieces_of

    tokenizer = load_tokenizer(Path(_folder(model, store)))
    examples = encode(dataclasses.replace(loaded, rows=loaded.rows[:rows]), tokenizer, max_length=max_length)
    return {**told, "unit": "tokens", "examples": pieces_of(examples, tokenizer, 2 * rows if loaded.shape == "preference" else rows)}


def _folder(model: str, store: Store) -> str:
    """A folder with a tokenizer; a house model is trained on its first use."""
    if model.startswith("house:"):
        return str(run(house(model), store).last.model)
    found = Path(address(model, store))
    if found.is_dir():
        return str(found)
    from temper.models import folders

    return str(folders.resolve(model))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
