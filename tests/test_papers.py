"""The catalogue: its rows, its search, and that every pointer to it resolves."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from temper import papers as module
from temper import parts
from temper.papers import catalogue, nearest, papers, resolve
from temper.parts import Problem, Spec

ROOT = Path(__file__).parents[1]
DESIGNED = (
    "data grow pretrain tune align decode retrieve distill label quantize prune factorize merge edit continual adapt calibrate evaluate"
)
PLACES = {*DESIGNED.split(), "models", "train", "tasks", "docs"}


def test_rows_are_whole():
    rows = catalogue()
    assert len(rows) > 600
    assert len({row.id for row in rows}) == len(rows)
    assert len({module._bare(row.title) for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(r"[PF]\d{3}", row.id)
        assert row.engine in PLACES
        assert row.unit in {"method", "recipe", "study", "metric", "format", "system", "reference"}
        assert row.name or row.unit == "reference"
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*|", row.name), row
        assert len(row.title) > 8
        assert "\\" not in row.title
        assert row.wave in ({0} if row.id.startswith("F") else {1, 2, 3})


def test_table_holds_no_abstracts():
    raw = json.loads((ROOT / "src" / "temper" / "catalogue.json").read_text(encoding="utf8"))
    assert {key for row in raw for key in row} == {"id", "title", "short", "engine", "name", "unit", "wave"}


def test_every_pointer_of_a_method_resolves():
    seen = 0
    for engine in parts.engines():
        for name, spec in parts.methods(engine).items():
            if spec.paper:
                seen += 1
                assert f"{engine} {name}" in next(paper for paper in papers() if paper.id == resolve(spec.paper).id).built
    studies = [one for paper in papers(built=True) for one in paper.built if one.startswith("study ")]
    assert seen == sum(len(paper.built) for paper in papers(built=True)) - len(studies)
    assert seen > 0
    assert "study tune.lora" in studies


def test_every_id_in_the_sources_and_the_docs_is_in_the_catalogue():
    known = {row.id for row in catalogue()}
    for folder, pattern in (("src", "*.py"), ("docs", "*.md"), ("recipes", "*.yaml")):
        for path in (ROOT / folder).rglob(pattern):
            for found in re.findall(r"\b[PF]\d{3}\b", path.read_text(encoding="utf8")):
                assert found in known, f"{path.relative_to(ROOT)} points to {found}"


def test_search_finds_all_words_anywhere_best_first():
    assert papers("gptq")[0].id == "P355"
    assert papers("P355") == papers("GPTQ: accurate")
    assert papers("eata")[0].short == "EATA"
    both = papers("quantization transformers")
    assert both
    assert all("quantization" in paper.title.lower() for paper in both)
    assert papers("qlora")[0].short == "QLoRA"
    assert papers("no such words anywhere") == []
    assert [paper.id for paper in papers()] == sorted(paper.id for paper in papers())


def test_search_by_engine():
    found = papers(engine="Quantize")
    assert {paper.engine for paper in found} == {"quantize"}
    assert papers("gptq", engine="quantize") == [paper for paper in papers("gptq") if paper.engine == "quantize"]
    with pytest.raises(Problem, match=r"no paper lives in `quantise`; did you mean `quantize`\?"):
        papers(engine="quantise")


def test_nothing_found_suggests_the_nearest():
    assert papers("smothrot") == []
    assert "SmoothRot" in [paper.short for paper in nearest("smothrot")]
    assert nearest("zzzzqqqq") == []
    assert len(nearest("adaptation", most=3)) <= 3


def test_built_is_read_off_the_methods_and_verdicts_off_the_cards(monkeypatch, tmp_path):
    specs = {"eata": Spec(paper="Efficient test-time model adaptation without forgetting"), "mine": Spec(), "again": Spec(paper="P002")}
    monkeypatch.setattr(parts, "engines", lambda: ["adapt"])
    monkeypatch.setattr(parts, "methods", lambda engine: specs)
    monkeypatch.setattr(module, "shipped", lambda name: tmp_path / name)
    for at, verdict in enumerate(("holds here", "unclear")):
        write_json(tmp_path / "cards" / "adapt" / f"{at}.json", {"paper": "P002", "verdict": verdict})
    (paper,) = papers(built=True)
    assert (paper.id, paper.built, paper.verdict) == ("P002", ("adapt eata", "adapt again"), "holds here, unclear")
    assert len(papers(built=False)) == len(catalogue()) - 1


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "pointer",
    [
        "P278",
        "S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
        "S2FT efficient scalable and generalizable LLM finetuning by structured sparsity",
    ],
)
def test_pointers_resolve_by_id_and_title(pointer):
    assert resolve(pointer).short == "S2FT"


def test_a_pointer_to_nothing_names_the_nearest():
    with pytest.raises(
        Problem, match=r"no paper “GPTQ: Accurate Quantization for Pre-trained Transformers” .*; did you mean P355, “GPTQ: "
    ):
        resolve("GPTQ: Accurate Quantization for Pre-trained Transformers")
    with pytest.raises(Problem, match=r"give its id or its title in catalogue\.json"):
        resolve("xyz")


def test_catalogue_is_made_from_a_table(tmp_path, capsys):
    tool = runpy.run_path(str(ROOT / "tools" / "catalogue.py"))
    assert tool["plain"]("E$^{2}$GAN, P$^2$ Law, $\\textit{Trans-LoRA}$: for $500") == "E²GAN, P² Law, Trans-LoRA: for $500"
    row = {"id": "P002", "title": "T$^2$", "short": "", "engine": "tune", "name": "t", "unit": "method", "wave": 1, "abstract": "long"}
    (tmp_path / "papers.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "P001"}) + "\n")
    target = tmp_path / "catalogue.json"
    target.write_text(json.dumps([row | {"id": "F001"}, row | {"id": "P900"}]))
    tool["main"].__globals__["CATALOGUE"] = target
    tool["main"](tmp_path / "papers.jsonl")
    made = json.loads(target.read_text(encoding="utf8"))
    assert [one["id"] for one in made] == ["F001", "P001", "P002"]
    assert made[1] == {"id": "P001", "title": "T²", "short": "", "engine": "tune", "name": "t", "unit": "method", "wave": 1}
