"""The commands of studies, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from temper import cli, papers
from temper.study import cards


@pytest.fixture
def temper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a command: (exit code, stdout, stderr)."""
    monkeypatch.setenv("TEMPER_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["temper", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def test_compare_study_ablate_and_reproduce(temper, written, rows, tmp_path, monkeypatch):
    (rows / "mine.yaml").write_text(written(("seeds: 2", "seeds: 1")))
    file = str(rows / "mine.yaml")

    code, out, _ = temper("study", file, "--check")
    assert (code, "runs: 2" in out) == (0, True)

    code, out, err = temper("compare", file)
    assert code == 0
    assert "2/2 high, seed 0" in err
    assert "report" in out
    assert {path.name for path in (tmp_path / "temper-out" / "rates").iterdir()} == {
        f"report.{kind}" for kind in ("html", "json", "md", "csv")
    }
    told = json.loads((tmp_path / "temper-out" / "rates" / "report.json").read_text())
    assert told["rerun"] == f"temper compare …/{Path(file).name}"
    assert told["verdict"] in out

    code, out, _ = temper("study", file, "--json")
    assert json.loads(out)["arms"][0]["runs"][0]["status"] == "from the store"

    code, out, _ = temper("ablate", "tune.pissa", "--study", file, "--json", "--out", str(tmp_path / "ablation"))
    assert code == 0
    assert {one["replaced"] for one in json.loads(out)["contributions"]} == {"tune.delta: lora(rank=16)", "tune.init: pissa"}

    studies = tmp_path / "studies" / "tune"
    studies.mkdir(parents=True)
    (studies / "rates.yaml").write_text(written(("seeds: 2", "seeds: 1"), ("rows.jsonl", str(rows / "rows.jsonl"))))
    for module in (papers, cards):
        monkeypatch.setattr(module, "shipped", lambda name: tmp_path / name)
    for attempt in (1, 2):
        code, out, _ = temper("reproduce", "rates", "--json")
        assert code == 0
        card = json.loads(Path(json.loads(out)["card"]).read_text())
        assert (card["engine"], card["method"], len(card["attempts"])) == ("tune", "rates", attempt)
    code, out, _ = temper("study")
    assert (code, "tune.rates" in out) == (0, True)


def test_wrong_requests_exit_with_2(temper, written, rows):
    (rows / "wrong.yaml").write_text(written(("better: high", "better: hihg")))
    code, _, err = temper("compare", str(rows / "wrong.yaml"))
    assert (code, "wrong.yaml:20:" in err, "did you mean `high`" in err) == (2, True, True)
    code, _, err = temper("study", "lroa")
    assert (code, "did you mean `lora`" in err) == (2, True)
    code, _, err = temper("ablate", "piss")
    assert (code, "did you mean `pissa`" in err) == (2, True)
    code, _, err = temper("reproduce", "piss")
    assert (code, "no study `piss`" in err) == (2, True)
