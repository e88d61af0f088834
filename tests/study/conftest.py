"""A study of a tiny model, in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from temper.study import Study, read

STUDY = """
name: rates
about: does a higher rate learn faster?
recipe:
  model: {tiny}
  data: {{file: {{path: rows.jsonl, holdout: 0.25}}}}
  steps:
    - tune: {{name: warm, method: full, updates: 2, evaluate_every: none, precision: float32, batching: {{bucketed: {{size: 4}}}}, seed: 7}}
    - tune: {{model: warm, method: full, evaluate_every: none, precision: float32, updates: 3, batching: {{bucketed: {{size: 4}}}}}}
    - evaluate: {{name: text, model: tune, method: perplexity, limit: 12, resample: {{bootstrap: {{samples: 50}}}}}}
vary:
  low: {{tune.optimizer.adamw.lr: 1.0e-5}}
  high: {{tune.optimizer.adamw.lr: 3.0e-2}}
seeds: 2
measure:
  nats: text.tune.nats_per_token
  perplexity: text.tune.perplexity
finding:
  claims:
    - {{better: high, than: low, margin: 0.01}}
"""


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("study")
    made = [{"prompt": f"sort {i} {i % 7} =", "completion": f" {i % 7} {i}"} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


@pytest.fixture
def written(rows: Path, tiny: Path):
    """The study's text, changed."""

    def make(*changes: tuple[str, str]) -> str:
        text = STUDY.format(tiny=tiny)
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        return text

    return make


@pytest.fixture
def study(rows: Path, written):
    def make(*changes: tuple[str, str]) -> Study:
        return read(written(*changes), "study.yaml", rows)

    return make
