"""What tests of whole recipes share: a tiny model in a folder, and rows in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of width 32, not trained, with its tokenizer: `<folder>/tiny`."""
    from temper.models import io
    from temper.pretrain.shape import Llama
    from temper.pretrain.tokenizer import ByteBPE

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = ByteBPE(vocabulary=300)(["sort the letters a b c d e =", "def f(x): return x"] * 5)
    io.save_model(Llama(hidden=32, layers=1, heads=2, feed_forward=64, positions=64, deviation=0.2)(tokenizer, 1), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def untemplated(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "untemplated"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
