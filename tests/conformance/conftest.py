"""One thread, and one little world for all experiments."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from world import World


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    other = [{"text": f"go to line {n} and wait for it", "body": f"body {n}"} for n in range(24)]
    (made.folder / "other.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in other))
    texts = [row["text"] for row in made.rows["text"]]
    splits = {name: Dataset.from_dict({"text": some}) for name, some in (("train", texts), ("more", texts[::-2]))}
    DatasetDict(splits).save_to_disk(made.folder / "splits")
    return made
