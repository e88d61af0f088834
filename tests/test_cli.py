"""The commands: exit codes, one JSON document on stdout, messages on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from temper import cli
from temper.store import Store

RECIPE = """
name: little
model: tiny
data: rows.jsonl
steps:
  - tune: {updates: 2, batching: {bucketed: {size: 4}}, delta: {lora: {rank: 2}}}
  - evaluate: {model: [model, tune], method: answers, answer: 4, resample: {bootstrap: {samples: 50}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    made = tmp_path_factory.mktemp("cli")
    (made / "tiny").symlink_to(tiny)
    rows = [{"prompt": f"sort {i} =", "completion": f" {i}"} for i in range(60)]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "little.yaml").write_text(RECIPE)
    (made / "bad.yaml").write_text(RECIPE.replace("lora: {rank", "lora: {rnak"))
    return made


@pytest.fixture
def temper(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`temper("show", "tune") -> (exit code, stdout, stderr)`, in the folder, with a store of its own."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TEMPER_STORE", str(folder / "store"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["temper", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return call


def test_run_show_why_export_verify_gc(temper, folder):
    code, out, _ = temper("check", "little.yaml")
    assert code == 0
    assert "nothing stands in the way" in out

    code, out, err = temper("run", "little.yaml", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [step["name"] for step in told["steps"]] == ["tune", "evaluate"]
    assert set(told["steps"][1]["figures"]) >= {"tiny.accuracy", "tune.accuracy"}
    assert Path(told["report"]).is_file()
    assert "tune" in err

    code, out, _ = temper("run", "little.yaml")
    assert code == 0
    assert "every step was already made: answered from the store in" in out

    code, out, _ = temper("why", "tune", "--recipe", "little.yaml")
    assert code == 0
    assert out.startswith("tune: from the store")
    code, out, _ = temper("why", "-r", "little.yaml", "--set", "tune.updates=3", "--json")
    assert json.loads(out)[0]["because"] == ["setting `updates`: 2 -> 3"]

    code, out, _ = temper("show", "little/tune")
    assert code == 0
    assert "adapter" in out
    code, out, _ = temper("show", "tune", "--json")
    assert json.loads(out)["passport"]["kind"] == "adapter"
    code, out, err = temper("show", "tuna")
    assert (code, out) == (2, "")
    assert "did you mean `tune`?" in err

    code, out, _ = temper("export", "tune", "adapter")
    assert code == 0
    assert (folder / "adapter" / "adapter_config.json").is_file()
    code, out, _ = temper("export", "tune", "whole", "--merged", "--json")
    assert code == 0
    assert (folder / "whole" / "model.safetensors").is_file()
    code, out, err = temper("export", "tune", "exact", "--lora", "exact", "--json")
    assert (code, json.loads(out)["lost"]) == (0, {})
    code, out, err = temper("export", "tune", "thin", "--lora", "1")
    assert code == 0
    assert "modules are not exact: up to" in err
    assert json.loads((folder / "thin" / "adapter_config.json").read_text())["r"] == 1
    for words, told in (
        (("--lora", "few"), "--lora few: give `exact`, or a rank such as 16"),
        (("--lora", "2", "--merged"), "give `--merged` or"),
    ):
        code, _, err = temper("export", "tune", "none", *words)
        assert code == 2
        assert told in err
    (folder / "mine").mkdir()
    (folder / "mine" / "letter.txt").write_text("dear")
    code, _, err = temper("export", "tune", "mine")
    assert code == 2
    assert "holds files that no export wrote" in err
    assert (folder / "mine" / "letter.txt").read_text() == "dear"

    code, out, _ = temper("runs", "--json")
    assert [run["name"] for run in json.loads(out)] == ["little", "little"]

    assert temper("verify")[0] == 0
    store = Store(folder / "store")
    weights = store.get(store.find("tune")).model / "adapter_model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    code, out, _ = temper("verify")
    assert code == 1
    assert "does not match its checksum" in out
    assert temper("verify", "--repair")[0] == 0
    assert temper("verify")[0] == 0

    code, out, _ = temper("gc", "--keep", "0", "--json")
    assert code == 0
    assert len(json.loads(out)["keys"]) == 1
    assert store.keys() == []


def test_a_bad_request_exits_with_2_and_names_the_place(temper):
    code, out, err = temper("run", "bad.yaml")
    assert (code, out) == (2, "")
    assert err == "error: bad.yaml:6:78: step `tune`, `delta.lora.rnak`: part `lora` has no setting `rnak`; did you mean `rank`?\n"
    code, _, err = temper("run", "litle.yaml")
    assert code == 2
    assert err == 'error: no recipe "litle.yaml"; did you mean `little.yaml`?\n'
    code, _, err = temper("run")
    assert code == 2
    assert "Missing argument" in err
    code, _, err = temper("methods", "tuna")
    assert code == 2
    assert "did you mean `tune`?" in err
    assert temper("tune", "tiny", "rows.jsonl", "--method", "lroa")[0] == 2


def test_one_step_commands(temper, folder):
    words = ("--set", "updates=2", "--set", "delta.lora.rank=2", "--set", "batching.bucketed.size=4", "--out", "stepped", "--json")
    code, out, err = temper("tune", "tiny", "rows.jsonl", "--method", "lora", *words)
    assert code == 0, err
    assert (folder / "stepped" / "adapter_config.json").is_file()
    assert json.loads(out)["figures"]["updates"]["value"] == 2
    code, out, err = temper("evaluate", "tiny", json.loads(out)["artefact"][:10], "rows.jsonl", "--method", "perplexity")
    assert code == 0, err
    assert out.count("perplexity") == 2


def test_data_shows_rows_as_the_model_sees_them(temper):
    code, out, _ = temper("data", "rows.jsonl", "--model", "tiny", "--rows", "2", "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["shape"], len(told["examples"])) == ("completion", 2)
    pieces = told["examples"][0]
    assert "".join(text for text, _ in pieces).startswith("<|begin|>sort ")
    assert "".join(text for text, supervised in pieces if supervised).endswith("<|end|>")
    assert not pieces[1][1]
    code, out, _ = temper("data", "rows.jsonl")
    assert code == 0
    assert "of shape completion" in out
    code, _, err = temper("data", "rows.jsonl", "--split", "tset")
    assert code == 2
    assert "did you mean `test`?" in err


def test_knowledge(temper, folder):
    code, out, _ = temper("methods")
    assert code == 0
    assert all(f"{engine}:" in out for engine in ("align", "evaluate", "pretrain", "quantize", "tune"))
    code, out, _ = temper("methods", "quantize", "gptq")
    assert code == 0
    assert "paper: GPTQ" in out
    assert "- quantize: {method: gptq" in out
    assert json.loads(temper("methods", "tune", "--json")[1])["tune"]["lora"]["delta"]["lora"]["rank"] == 8
    code, out, _ = temper("papers", "gptq")
    assert code == 0
    assert "P355" in out
    assert temper("schema", "temper.schema.json")[0] == 0
    assert json.loads((folder / "temper.schema.json").read_text())["title"] == "Temper recipe"
