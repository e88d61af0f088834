"""The report: what it may say of figures, that it leaks nothing and loads nothing, and how it looks in a browser."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.parts import Problem
from temper.passport import Figure
from temper.report import RunReport, read, shorten, write
from temper.report.charts import Axis, curves, dots, lanes, log_ticks, ticks
from temper.report.html import Html, join, tag
from temper.report.stages import change, compared
from temper.report.words import count, duration, measure, number, size

NARROW = "\u202f"


def figure(value, half, n=1000, unit="", better=None):
    return {"value": value, "low": max(0.0, value - half), "high": value + half, "n": n, "unit": unit, "better": better}


def life_of_a_model() -> dict:
    """A run as a recipe of four stages gives it, with made-up figures."""
    draw = random.Random(0)

    def curve(updates, start, end, noise, held_out=False):
        rows = []
        for update in range(1, updates + 1):
            middle = end + (start - end) * math.exp(-6 * update / updates)
            rows.append({"step": update, "loss": middle + draw.gauss(0, noise), "lr": 3e-3, "tokens": 4096 * update})
            if held_out and update % 80 == 0:
                rows.append({"step": update, "held_out_loss": middle + 0.1})
        return rows

    def step(name, engine, method, seconds, memory, size, **more):
        artefact = hashlib.sha256(name.encode()).hexdigest()
        common = {"status": "made", "seconds": seconds, "peak_memory": memory, "bytes": size, "artefact": artefact, "kind": "model"}
        return {"name": name, "engine": engine, "method": method, **common, **more}

    def evaluate(of):
        figures = {"perplexity": figure(9.1, 0.2, 412, "", "lower")}
        parents = {"model": of, "data": "house:library"}
        return step(f"evaluate-{of}", "evaluate", "", 4.2, 540_000_000, 4100, kind="figures", parents=parents, figures=figures)

    def filled(slot, part, doc, changed=False, **given):
        return {"slot": slot, "question": "", "part": part, "doc": doc, "settings": given, "meanings": {}, "changed": changed}

    def stage(name, purpose, aim, perplexity, accuracy, calibration):
        figures = {
            "library/perplexity": figure(perplexity, 0.21, 412, "", "lower"),
            "sorting/accuracy": figure(accuracy, 0.028, 1000, "share", "higher"),
            "sorting/calibration_error": figure(calibration, 0.011, 1000, "share", "lower"),
        }
        return {"step": name, "purpose": purpose, "aim": aim, "figures": figures}

    numbers = {"parameters": 1_310_720, "numbers": "float32"}
    lora = [
        filled("where", "linear", "All linear layers.", skip=["lm_head"]),
        filled("delta", "lora", "W + (alpha / r) B A.  Hu et al. 2021.\n\nLonger.", True, rank=16),
    ]
    pretrain = step("pretrain", "pretrain", "causal-lm", 118.4, 1_204_000_000, 5_243_000, parents={"data": "house:library"}, **numbers)
    pretrain["curve"] = curve(620, 7.6, 2.31, 0.09, held_out=True)
    pretrain["decisions"] = {"precision": {"value": "float32", "reason": "this processor has no bfloat16 matrix instructions"}}
    pretrain["passport"] = {"kind": "model", "tokenizer": "9f3a" * 16, "mask": None}
    tune = step("tune", "tune", "lora", 41.0, 903_000_000, 212_000, parents={"model": "pretrain", "data": "house:sorting"}, **numbers)
    tune |= {"kind": "adapter", "curve": curve(180, 3.9, 0.41, 0.05), "spec": lora, "notes": ["4 rows were too long"]}
    pairs = step("pairs", "data", "", 9.7, 512_000_000, 96_000, kind="preference", parents={"model": "tune"})
    above = {"model": "tune", "data": "pairs", "reference": "tune"}
    align = step("align", "align", "dpo", 33.2, 1_010_000_000, 212_000, kind="adapter", parents=above, **numbers)
    align["curve"] = curve(90, 0.69, 0.31, 0.03)
    quantize = step("quantize", "quantize", "gptq", 12.9, 655_000_000, 1_204_000, parents={"model": "align"}, numbers="int4-g32-sym")
    steps = [pretrain, evaluate("pretrain"), tune, evaluate("tune"), pairs, align, evaluate("align"), quantize, evaluate("quantize")]
    return {
        "name": "quickstart",
        "created": "2026-11-20T10:41:07Z",
        "seed": 0,
        "about": "The whole life of a small language model.",
        "recipe": "name: quickstart\nsteps:\n  - pretrain:\n      data: house:library\n",
        "rerun": "temper quickstart",
        "seconds": 236.4,
        "steps": steps,
        "machine": {"processor": "x86-64, avx2", "cores": 2},
        "versions": {"temper": "0.1.0", "torch": "2.13.0"},
        "stages": [
            stage("pretrain", "Learns the language of the library.", ["library/perplexity"], 10.07, 0.021, 0.312),
            stage("tune", "Learns to sort.", ["accuracy"], 12.62, 0.713, 0.071),
            stage("align", "Prefers checked answers.", ["sorting/accuracy"], 12.84, 0.846, 0.118),
            stage("quantize", "Stores weights in 4 bits.", ["size"], 13.31, 0.834, 0.109),
        ],
    }


class Outline(HTMLParser):
    """Reads a page strictly: every element closed in order; collects elements, their attributes and text."""

    EMPTY = {"meta", "br", "col"}

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, name, attrs):
        self.elements.append((name, dict(attrs)))
        if name not in self.EMPTY:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open.pop() == name

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.text += data.replace(NARROW, " ").replace("\u00a0", " ") + "\n"

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for one, attributes in self.elements if one == name]


def paged(tmp_path: Path, run: dict) -> str:
    write(run, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf8")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return paged(tmp_path_factory.mktemp("report"), life_of_a_model())


# ---------------------------------------------------------------- the page as a document


def test_page_asks_the_network_for_nothing(page):
    outline = Outline(page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    for name, attributes in outline.elements:
        assert name not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(meta["content"] for meta in outline.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    assert script
    allowed = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{allowed}'" in policy


def test_page_is_small_and_quickly_made(tmp_path):
    run = life_of_a_model()
    times = []
    for _ in range(3):
        begun = time.process_time()  # of the processor: other work on the machine does not count
        write(run, tmp_path / "report.html")
        times.append(time.process_time() - begun)
    assert min(times) < 0.3
    assert (tmp_path / "report.html").stat().st_size < 150_000


def test_page_has_an_outline(page):
    outline = Outline(page)
    assert outline.named("html")[0]["lang"] == "en"
    levels = [int(name[1]) for name, _ in outline.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert set(levels) == {1, 2, 3}
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [link["href"] for link in outline.named("a")] == [f"#{section['id']}" for section in outline.named("section")]
    for section in outline.named("section"):
        assert section["aria-labelledby"] in ids


def test_every_chart_has_words(page):
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert 'aria-hidden="true"' in drawing or re.match(r"<svg[^>]*role=\"img\"[^>]*><title>[^<]+</title>", drawing)
    assert "<title>tune: 71.3\u202f%, interval 68.5\u202f% to 74.1\u202f%</title>" in page


def test_names_never_become_markup(tmp_path):
    hostile = "<script>alert(1)</script>\"'onmouseover=alert(2)&<b>"
    run = life_of_a_model()
    text = json.dumps(run).replace('"tune"', json.dumps(hostile)).replace("house:library", "</code></pre><img src=x onerror=alert(3)>")
    run = json.loads(text)
    run |= {"name": hostile, "about": hostile, "rerun": hostile, "machine": {hostile: hostile}, "notes": [hostile], "interval": hostile}
    run["steps"][0]["decisions"] = {hostile: {"value": hostile, "reason": hostile}}
    run["steps"][0]["passport"] = {hostile: {hostile: hostile}}
    run["steps"][0]["curve"][0][hostile + "loss"] = 1.0
    outline = Outline(paged(tmp_path, run))
    assert len(outline.named("script")) == 1
    assert not outline.named("img")
    assert not outline.named("b") or all(not attributes for attributes in outline.named("b"))
    assert not [key for _, attributes in outline.elements for key in attributes if key.startswith("on")]
    assert outline.text.count(hostile) > 10


@given(st.lists(st.text(), max_size=4))
def test_tag_escapes_everything_but_html(words):
    made = tag("p", *words, title=words[0] if words else None)
    outline = Outline(made)
    assert [name for name, _ in outline.elements] == ["p"]
    assert tag("i", Html("<b>x</b>")) == "<i><b>x</b></i>"
    assert join("<", None, [Html("<br>"), "&"]) == "&lt;<br>&amp;"


# ---------------------------------------------------------------- what a report keeps to itself


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: /home/ada/models/llama", "model: …/llama"),
        ("/srv/data/rows.jsonl:12: bad row", "…/rows.jsonl:12: bad row"),
        ("see '~/x/my.yaml'", "see '…/my.yaml'"),
        (r"C:\Users\ada\rows.csv", "…/rows.csv"),
        ("file:///tmp/run/report.html", "…/report.html"),
        ("/home/ada/runs/", "…/"),
        ("[/a/b, /c/d]", "[…/b, …/d]"),
        ("path=/a/b;/c/d", "path=…/b;…/d"),
        ("hub model org/name, and/or 3/4", "hub model org/name, and/or 3/4"),
        ("recipes/quickstart.yaml and ./a/b and ../a/b", "recipes/quickstart.yaml and ./a/b and ../a/b"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("tokens / s", "tokens / s"),
    ],
)
def test_absolute_paths_are_shortened(text, expected):
    assert shorten({text: [text, (text, 1)]}) == {expected: [expected, [expected, 1]]}
    assert shorten(Path("/home/ada/x")) == "…/x"


def test_report_holds_no_paths_and_no_host_name(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "ada-workstation")
    monkeypatch.setattr(platform, "node", lambda: "ada-workstation")
    run = life_of_a_model()
    run["recipe"] = f"model: {tmp_path}/llama\ndata: /home/ada/rows.jsonl\n"
    run["steps"][0]["notes"] = [f"read {tmp_path}/rows.jsonl"]
    run["steps"][0]["settings"] = {"file": str(tmp_path / "x" / "y.json")}
    run["steps"][0]["parents"] = {"data": "/home/ada/rows.jsonl"}
    page = paged(tmp_path, run)
    for text in (page, (tmp_path / "report.json").read_text(encoding="utf8")):
        assert str(tmp_path) not in text
        assert "/home/ada" not in text
        assert "ada-workstation" not in text
        assert "…/rows.jsonl" in text


def test_json_beside_the_page_is_the_whole_input(tmp_path):
    run = life_of_a_model()
    run["steps"][0]["curve"][3]["loss"] = math.nan
    run["stages"][0]["figures"]["library/perplexity"]["high"] = math.inf
    write(run, tmp_path / "report.html")
    text = (tmp_path / "report.json").read_text(encoding="utf8")
    back = read(json.loads(text, parse_constant=pytest.fail))
    assert back.stages[0].figures["library/perplexity"].high == math.inf
    back.steps[0].curve[3]["loss"] = run["steps"][0]["curve"][3]["loss"]
    assert back == read(run)
    write(back, tmp_path / "again.html")
    assert isinstance(back, RunReport)
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf8")) == json.loads(text)


def test_wrong_input_is_refused():
    run = life_of_a_model()
    with pytest.raises(Problem, match=r"`steps\.1\.speed`: Unexpected keyword argument"):
        read(run | {"steps": [run["steps"][0], run["steps"][1] | {"speed": 3}]})
    with pytest.raises(Problem, match=r"`stages\.0\.step`: `tuned` is no step of this run; did you mean `tune`\?"):
        read(run | {"stages": [run["stages"][1] | {"step": "tuned"}]})
    with pytest.raises(Problem, match=r"`steps\.0\.status`: Input should be 'made' or 'from the store'"):
        read(run | {"steps": [run["steps"][0] | {"status": "cached"}]})


def test_importing_and_writing_loads_nothing_heavy(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(life_of_a_model()))
    code = (
        "import json, sys; from pathlib import Path; from temper.report import write;"
        f"write(json.loads(Path({str(tmp_path / 'run.json')!r}).read_text()), Path({str(tmp_path / 'out.html')!r}));"
        "print([name for name in ('torch', 'numpy', 'transformers', 'peft', 'plotly', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_styles_travel_in_the_package():
    root = Path(__file__).parents[1]
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["src/temper"]  # with every file in it that git does not ignore
    asked = [str(path) for path in (root / "src" / "temper").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}]
    assert any(path.endswith("study.css") for path in asked)
    assert not subprocess.run(["git", "check-ignore", *asked], cwd=root, capture_output=True, text=True, check=False).stdout
    assert {name: (root / name).is_dir() for name in wheel["force-include"]} == {"studies": True, "cards": True}


# ---------------------------------------------------------------- what may be said of figures


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        ((0.5, 0.45, 0.55, "higher"), (0.7, 0.65, 0.75, "higher"), "better"),
        ((0.7, 0.65, 0.75, "higher"), (0.5, 0.45, 0.55, "higher"), "worse"),
        ((9.0, 8.8, 9.2, "lower"), (10.0, 9.8, 10.2, "lower"), "worse"),
        ((9.0, 8.8, 9.2, "lower"), (8.0, 7.8, 8.2, "lower"), "better"),
        ((0.5, 0.45, 0.55, "higher"), (0.6, 0.55, 0.65, "higher"), "no clear change"),  # the ends touch
        ((0.5, 0.45, 0.55, None), (0.7, 0.65, 0.75, None), "higher"),
        ((0.7, 0.65, 0.75, None), (0.5, 0.45, 0.55, None), "lower"),
        ((5.0e6, None, None, "lower"), (1.2e6, None, None, "lower"), "better"),
        ((5.0e6, None, None, "lower"), (5.01e6, None, None, "lower"), "no clear change"),
        ((0.5, 0.45, 0.55, "higher"), (0.9, None, None, "higher"), None),  # no interval, nothing said
        ((1.0e-15, 0.9e-15, 1.1e-15, "lower"), (8.0e-16, 7.9e-16, 8.1e-16, "lower"), "no clear change"),  # only rounding
        ((math.inf, 1.0, math.inf, "lower"), (2.0, 1.9, 2.1, "lower"), None),
    ],
)
def test_only_intervals_apart_are_a_change(before, now, word):
    first, second = (Figure(value, low, high, 100, "", better) for value, low, high, better in (before, now))
    moved = change(first, second)
    assert (moved and moved.word) == word
    assert change(None, second) is None


def test_sizes_are_compared_between_whole_models_only():
    rows = {row.stage.step: row for row in compared(read(life_of_a_model()))}
    assert rows["tune"].changes["size"] is None
    moved = rows["quantize"].changes["size"]
    assert moved
    assert (moved.word, moved.before.value) == ("better", 5_243_000)


def test_each_stage_says_what_it_gained_and_what_it_cost(page):
    text = re.sub(r"\n+", "\n", Outline(page).text)
    tune = text[text.index("Learns to sort.") : text.index("Prefers checked answers.")]
    assert "sorting · accuracy\n71.3 %\n↑ better\nfrom 2.1 % · interval 68.5 to 74.1 % · n = 1000" in tune
    assert "Better\nsorting · calibration error 31.2 % → 7.1 %" in tune
    assert "Worse\nlibrary · perplexity 10.1 → 12.6" in tune
    align = text[text.index("Prefers checked answers.") : text.index("Stores weights in 4 bits.")]
    assert "No clear change\nlibrary · perplexity\n" in align
    assert "One model through 4 stages: pretrain → tune → align → quantize, in 3 min 56 s." in text


def test_a_second_run_says_that_the_store_answered(tmp_path):
    run = life_of_a_model()
    for step in run["steps"]:
        step["status"] = "from the store"
    text = Outline(paged(tmp_path, run | {"seconds": 1.9})).text
    assert "in 1.9 s. Nothing had to be made: every step came from the store." in text
    run["steps"][-1]["status"] = "made"
    assert "8 of 9 steps came from the store." in Outline(paged(tmp_path, run)).text


def test_a_bare_run_still_gives_a_page(tmp_path):
    run = {"name": "x", "created": "2026-11-20T10:41:07Z", "seed": 3, "recipe": ""}
    run["steps"] = [{"name": "one", "engine": "tune", "status": "made", "seconds": 1.0}]
    outline = Outline(paged(tmp_path, run))
    assert "1 step: one." in outline.text
    assert [link["href"] for link in outline.named("a")] == ["#costs", "#lineage", "#settings", "#again"]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(12.345), "12.3"),
        (number(0.012345), "0.0123"),
        (number(1234.5), "1 234"),
        (number(-3.0), "−3.00"),
        (number(8192), "8 192"),
        (number(0.0), "0"),
        (number(3.2e-7), "3.20e-07"),
        (number(math.nan), "not finite"),
        (measure(0.7125, "share"), "71.2 %"),
        (measure(0.0042, "share"), "0.42 %"),
        (measure(0.00001, "share"), "<0.01 %"),
        (measure(1e-15, "share"), "0 %"),
        (measure(0.0, "share"), "0.0 %"),
        (measure(12.34, "nats"), "12.3 nats"),
        (measure(1_204_000, "bytes"), "1.20 MB"),
        (duration(0.84), "0.8 s"),
        (duration(42.6), "43 s"),
        (duration(59.7), "1 min 00 s"),
        (duration(243), "4 min 03 s"),
        (duration(3599.8), "1 h 00 min"),
        (duration(7500), "2 h 05 min"),
        (size(812), "812 B"),
        (size(999_600), "1.00 MB"),
        (size(5_243_000), "5.24 MB"),
        (count(812), "812"),
        (count(1_310_720), "1.31 M"),
        (count(7e9), "7.00 B"),
    ],
)
def test_numbers_as_people_read_them(text, expected):
    assert text.replace(NARROW, " ") == expected


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e9))
def test_ticks_are_round_and_cover(low, span):
    high = low + span
    made = ticks(low, high)
    steps = [b - a for a, b in itertools.pairwise(made)]
    assert made[0] <= low + 1e-6 * span
    assert made[-1] >= high - 1e-6 * span
    assert 2 <= len(made) <= 8
    assert max(steps) - min(steps) < 1e-6 * max(steps) + 1e-9


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30), st.booleans())
def test_axis_maps_any_values_into_its_stretch(first, second, tight):
    low, high = sorted((first, second))
    axis = Axis(low, high, 10, 110, tight=tight)
    assert 9.9 <= axis(low) <= axis(high) <= 110.1
    assert len(axis.labels("share")) == len(axis.ticks)


@given(st.floats(1e-6, 1e6), st.floats(31, 1e6))
def test_log_ticks_cover(low, ratio):
    made = log_ticks(low, low * ratio)
    assert made[0] <= low * 1.00001
    assert made[-1] >= low * ratio * 0.99999
    assert made == sorted(made)
    assert Axis(low, low * ratio, 0, 100)(low) >= -0.01


# ---------------------------------------------------------------- charts


def test_curve_draws_the_mean_of_neighbours():
    drawing = curves("loss", [("loss", [(float(x), 2.0 if x % 2 else 4.0) for x in range(120)])], bins=60)
    (line,) = re.findall(r'<polyline points="([^"]+)" class="line s0"', drawing)
    heights = {point.split(",")[1] for point in line.split()}
    assert len(line.split()) == 60
    assert heights == {str(Axis(2.0, 4.0, 176.0, 12.0)(3.0))}
    assert "steps 0 to 1: loss 3.00 (2.00 to 4.00)" in drawing
    assert 'class="value s0">3.00</text>' in drawing


def test_curve_leaves_out_what_is_not_finite(tmp_path):
    run = life_of_a_model()
    run["steps"] = [run["steps"][0] | {"curve": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.0}]}]
    page = paged(tmp_path, run | {"stages": []})
    assert "nan" not in page
    (line,) = re.findall(r'<polyline points="([^"]+)" class="line s0"', page)
    assert len(line.split()) == 2


@pytest.mark.parametrize("line", [[(1.0, 2.0)], [(0.0, 0.0)], [(1.0, 3.0), (2.0, 3.0)], [(5.0, -1.0), (9.0, 400.0)]])
def test_curve_of_odd_shapes(line):
    Outline(curves("loss", [("loss", line), ("held_out_loss", line)]))


def test_axes_say_their_unit_on_both_scales():
    assert Axis(0.001, 0.9, 0, 100).labels("share") == [f"{text}{NARROW}%" for text in ("0.1", "1", "10", "100")]
    assert Axis(-0.5, 0.5, 0, 100).labels("share") == [f"{text}{NARROW}%" for text in ("−50", "−25", "0", "25", "50")]
    assert Axis(3e6, 9e6, 0, 100).labels("bytes")[0] == f"2.00{NARROW}MB"


def test_labels_at_the_end_of_lines_keep_apart():
    drawing = curves("loss", [(name, [(0.0, 5.0), (9.0, end)]) for name, end in (("loss", 1.0), ("a_loss", 1.02), ("b_loss", 1.01))])
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="value s\d"', drawing))
    assert len(heights) == 3
    assert all(b - a >= 12.9 for a, b in itertools.pairwise(heights))


def test_dots_put_values_on_the_axis():
    drawing = dots("accuracy", [("a", 0.25, 0.2, 0.3), ("b", 0.75, None, None), ("c", 0.0, 0.0, 1.0)], "share")
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawing)]
    axis = Axis(0.0, 1.0, 84.0, 360 - (14 + 7.0 * len("75.0 %")))
    assert places == [axis(0.25), axis(0.75), axis(0.0)]
    assert drawing.count('class="span"') == 2


@settings(max_examples=60)
@given(st.data())
def test_lineage_lines_never_run_through_another_node(data):
    total = data.draw(st.integers(1, 12))
    parents = [sorted(data.draw(st.sets(st.integers(0, node - 1), max_size=3))) if node else [] for node in range(total)]
    drawing = lanes(parents, ["red"] * total)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    assert len(places) == total
    assert len(re.findall(r"<path", drawing)) == sum(map(len, parents))
    for x, start, end in re.findall(r'd="M([\d.]+),([\d.]+)V([\d.]+)', drawing):
        on_the_way = [place for place in places if place[0] == float(x) and float(start) < place[1] < float(end)]
        assert not on_the_way


def test_lineage_says_where_inputs_come_from(page):
    text = Outline(page).text
    assert "model from tune, data from pairs, reference from tune" in text
    assert "model from pretrain, data from house:sorting" in text


def test_several_inputs_of_one_role_are_named_together(tmp_path):
    run = life_of_a_model()
    run["steps"][-1]["parents"] = {"model.0": "pretrain", "model.1": "tune", "data": "house:library"}
    assert "model from pretrain and tune, data from house:library" in Outline(paged(tmp_path, run)).text


def test_few_updates_have_whole_ticks():
    drawing = curves("loss", [("loss", [(float(x), 1.0 / x) for x in range(1, 11)])])
    assert re.findall(r'y="192.0" text-anchor="middle" class="tick">([^<]+)<', drawing) == ["0", "3", "6", "9"]
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(0.0, 0.0) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-3, 3, whole=True) == [-4, -2, 0, 2, 4]


# ---------------------------------------------------------------- colours


def _contrast(first: str, second: str) -> float:
    """WCAG 2.2 contrast ratio of two colours written #rrggbb."""

    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(first), light(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_every_colour_of_text_is_readable_in_both_schemes(page):
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)]
    assert len(schemes) == 2
    for scheme in schemes:
        for name in ("ink", "soft", "good", "bad", "t0", "t1", "t2", "t3", "t4"):
            assert _contrast(scheme[name], scheme["paper"]) >= 4.5, name


# ---------------------------------------------------------------- in a browser


class Browser:
    """Headless Chromium, spoken to through its pipe in the DevTools protocol."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --remote-debugging-pipe"
    )

    def __init__(self, program: str, profile: str):
        ours, theirs = os.pipe(), os.pipe()  # to the browser (its descriptor 3), from the browser (its descriptor 4)

        def connect() -> None:  # high numbers first, in case a pipe already sits on 3 or 4
            read_end, write_end = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(read_end, 3)
            os.dup2(write_end, 4)

        self.process = subprocess.Popen(
            [program, *self.FLAGS.split(), f"--user-data-dir={profile}"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in = os.fdopen(ours[1], "wb"), os.fdopen(theirs[0], "rb")
        self._rest, self._last = b"", 0
        self.events: list[dict] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = None
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    _session: str | None = None

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            got = os.read(self._in.fileno(), 1 << 16)
            assert got, "the browser went away"
            self._rest += got
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def ask(self, method: str, **params) -> dict:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, width: int, **features: str) -> None:
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features.items()])
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def run(self, expression: str):
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self._session = None
            self.ask("Browser.close")
        self.process.wait(10)


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: how the page looks in a browser was not tested")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        opened = Browser(program, profile)
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_its_window(browser, page, tmp_path, width):
    (tmp_path / "report.html").write_text(page)
    browser.open(tmp_path / "report.html", width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('section > *, header > *, .life > li *')]"
    assert browser.run(f"{shown}.filter(one => one.getBoundingClientRect().right > innerWidth + 1).length") == 0
    browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    asked = [event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert all(url.startswith("file://") and url.endswith("report.html") for url in asked)
    assert not [event for event in browser.events if event.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}]


def test_tables_sort_both_ways(browser, page, tmp_path):
    (tmp_path / "report.html").write_text(page)
    browser.open(tmp_path / "report.html", 1280)
    cells = "[...document.querySelectorAll('#costs tbody tr')].map(row => Number(row.cells[1].dataset.v)).join()"
    press = "document.querySelectorAll('#costs th button')[1].click()"
    state = "document.querySelectorAll('#costs thead th')[1].getAttribute('aria-sort')"
    before = [float(value) for value in browser.run(cells).split(",")]
    browser.run(press)
    assert [float(value) for value in browser.run(cells).split(",")] == sorted(before)
    assert browser.run(state) == "ascending"
    browser.run(press)
    assert [float(value) for value in browser.run(cells).split(",")] == sorted(before, reverse=True)
    assert browser.run(state) == "descending"
    numbers = "[...document.querySelectorAll('#costs tbody tr')].map(row => row.cells[4].dataset.v).join()"
    browser.run("document.querySelectorAll('#costs th button')[4].click()")
    assert re.fullmatch(r"(\d+,)+,*", browser.run(numbers) + ",")  # what has no value comes last


def test_dark_scheme_and_hostile_names_in_a_browser(browser, tmp_path):
    run = life_of_a_model()
    run["name"] = run["steps"][0]["name"] = run["stages"][0]["step"] = "<img src=x onerror=\"document.title='taken'\">"
    write(run, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", 1280, **{"prefers-color-scheme": "dark"})
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 23)"
    assert browser.run("document.images.length") == 0
    assert browser.run("document.title").startswith("<img src=x")
