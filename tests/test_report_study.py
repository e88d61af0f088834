"""A study's report: what it says, that it leaks and loads nothing, its charts, its files, and how it looks in a browser."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import test_report
from temper.parts import Problem
from temper.report.plots import Line, Span, Spot, front, plane, spans
from temper.report.study import StudyReport, read, write
from temper.report.study_charts import band
from temper.report.words import ends, signed
from test_report import Outline

browser = test_report.browser  # the fixture

ARMS = {
    "full": ("All weights learn.", {"tune.method": "full"}, 0.712, 61.0, 1.31e9, 5_243_000),
    "lora": ("Rank 16 on all linear layers.", {"tune.method": "lora", "tune.delta.rank": 16}, 0.704, 43.0, 0.90e9, 212_000),
    "prompt": ("Twenty virtual tokens.", {"tune.method": "prompt-tuning"}, 0.523, 38.0, 0.87e9, 11_000),
}
TEXT = """name: lora-against-full
claim: LoRA learns as well as full tuning, within two points.
recipe: sort.yaml
vary:
  full: {tune.method: full}
  lora: {tune.method: lora, tune.delta.rank: 16}
  prompt: {tune.method: prompt-tuning}
seeds: 5
budget: {updates: 400}
measure: {accuracy: task.tune.accuracy, loss: tune.heldout_loss}
finding:
  claims:
    - {better: lora, than: full, margin: -0.02}
    - {better: full, than: prompt}
"""


def example() -> dict:
    """A study as three arms with five seeds give it, with made-up figures."""
    draw = random.Random(0)
    arms, trials = [], []
    for name, (about, changes, accuracy, seconds, memory, size) in ARMS.items():
        runs = []
        for seed in range(5):
            ending, lift, pace = 0.9 - 0.8 * accuracy, draw.gauss(0, 0.012), draw.uniform(45, 70)
            curve = []
            for step in range(4, 401, 4):
                middle = ending - lift + (3.4 - ending) * math.exp(-step / pace)
                curve.append({"step": step, "loss": middle + draw.gauss(0, 0.05), "lr": 1e-3})
                if step % 40 == 0:
                    curve.append({"step": step, "heldout_loss": middle + 0.06})
            costs = {"seconds": seconds * draw.uniform(0.97, 1.03), "updates": 400.0, "tokens": 1_638_400.0, "flops": 6.1e13 * seconds / 60}
            costs |= {"peak_memory": memory, "bytes": float(size)}
            figures = {"accuracy": accuracy + lift, "loss": ending - lift}
            runs.append({"seed": seed, "run": f"{draw.getrandbits(160):040x}", "status": "from the store" if seed < 2 else "made"})
            runs[-1] |= {"figures": figures, "costs": costs, "curve": curve}
        means = {key: sum(run["figures"][key] for run in runs) / 5 for key in ("accuracy", "loss")}
        arm = {"name": name, "about": about, "changes": changes, "runs": runs}
        arm["figures"] = {
            "accuracy": {
                "value": means["accuracy"],
                "low": means["accuracy"] - 0.017,
                "high": means["accuracy"] + 0.016,
                "n": 1000,
                "unit": "share",
            },
            "loss": {"value": means["loss"], "low": means["loss"] - 0.02, "high": means["loss"] + 0.02, "n": 1000, "unit": "nats"},
        }
        arm["figures"]["accuracy"]["better"], arm["figures"]["loss"]["better"] = "higher", "lower"
        arm["costs"] = {key: sum(run["costs"][key] for run in runs) / 5 for key in runs[0]["costs"]}
        tried = []
        for number in range(8):
            rate = 10 ** (-4 + 2 * (number + draw.random()) / 8)
            loss = ending + 0.15 * (math.log10(rate) + 2.8) ** 2 + abs(draw.gauss(0, 0.02))
            settings = {"tune.learning_rate": float(f"{rate:.4g}"), "tune.schedule": draw.choice(["cosine", "constant"])}
            tried.append(
                {"arm": name, "number": number, "rung": 0, "settings": settings, "figure": loss, "seconds": seconds / 4, "chosen": False}
            )
        for one in sorted(tried, key=lambda one: one["figure"])[:3]:
            tried.append(one | {"rung": 1, "figure": one["figure"] - 0.03, "seconds": seconds / 2})
        tried[3]["figure"] = None
        min(tried[8:], key=lambda one: one["figure"])["chosen"] = True
        arm["tuned"] = next(one["settings"] for one in tried if one["chosen"])
        trials += tried
        arms.append(arm)

    def claim(text, better, than, figure, difference, half, margin, unit, verdict, **more):
        common = {"claim": text, "better": better, "than": than, "figure": figure, "difference": difference, "margin": margin, "unit": unit}
        common |= {"low": difference - half, "high": difference + half, "test": "multi-bootstrap", "verdict": verdict}
        return common | {"p": 0.0105, "p_adjusted": 0.021, "effect": 0.62, "effect_name": "Hedges' g", "detectable": 0.013} | more

    comparisons = [
        claim(
            "LoRA learns as well as full tuning, within two points",
            "lora",
            "full",
            "accuracy",
            -0.008,
            0.0105,
            -0.02,
            "share",
            "holds here",
        ),
        claim(
            "full tuning beats prompt tuning by ten points",
            "full",
            "prompt",
            "accuracy",
            0.189,
            0.021,
            0.1,
            "share",
            "holds here",
            p=0.0005,
        ),
        claim("lora is better than full", "lora", "full", "loss", -0.006, 0.016, 0.0, "nats", "unclear", p=0.71, p_adjusted=0.71),
        claim(
            "the exponent of tuning lies above 0.2", "", "", "exponent", 0.243, 0.019, 0.2, "", "holds here", effect=None, detectable=None
        ),
    ]
    rows = [250, 500, 1000, 2000, 4000]
    law = {x: 0.35 + 4.1 * x**-0.31 for x in rows}
    points = [{"x": x, "y": law[x] + draw.gauss(0, 0.006), "low": law[x] - 0.02, "high": law[x] + 0.02, "arm": ""} for x in rows[:4]]
    grid = [200 * 25 ** (at / 30) for at in range(31)]
    line = [{"x": x, "y": 0.35 + 4.1 * x**-0.31, "low": 0.33 + 4.1 * x**-0.32, "high": 0.37 + 4.1 * x**-0.30} for x in grid]
    parameters = {"a": {"value": 4.1, "low": 3.5, "high": 4.9}, "b": {"value": -0.31, "low": -0.35, "high": -0.28}, "c": {"value": 0.35}}
    fit = {"name": "loss by rows", "law": "power-law-offset", "x": "rows", "y": "loss", "points": points, "line": line}
    fit |= {"parameters": parameters, "held_out": {"x": 4000, "y": law[4000] + 0.013, "predicted": law[4000], "low": 0.62, "high": 0.70}}
    return {
        "name": "lora-against-full",
        "created": "2026-11-20T16:41:07Z",
        "about": "LoRA trains a small addition to every linear layer. Does it learn to sort as well as full tuning does?",
        "seconds": 1734.2,
        "rerun": "temper study lora-against-full",
        "text": TEXT,
        "machine": {"processor": "x86-64, avx2", "cores": 2},
        "versions": {"temper": "0.1.0", "torch": "2.13.0"},
        "level": 0.95,
        "seeds": [0, 1, 2, 3, 4],
        "notes": ["The house model is small; larger ones may differ."],
        "held": "updates",
        "budget": 400.0,
        "alike": ["data: house:sorting, 4 000 rows", "tune.batching: packed to 512 tokens", "8 trials for every arm"],
        "measures": ["accuracy", "loss"],
        "verdict": "holds here",
        "finding": "LoRA is at most two points worse than full tuning, in 70 % of the time and 4 % of the disk.",
        "arms": arms,
        "comparisons": comparisons,
        "fits": [fit],
        "trials": trials,
        "contributions": [
            {"replaced": "delta: lora", "by": "none", "difference": 0.041, "low": 0.022, "high": 0.06, "verdict": "helps", "unit": "share"},
            {
                "replaced": "schedule: cosine",
                "by": "constant",
                "difference": 0.004,
                "low": -0.009,
                "high": 0.018,
                "verdict": "unclear",
                "unit": "share",
            },
            {
                "replaced": "init: pissa",
                "by": "normal",
                "difference": 0.052,
                "low": 0.03,
                "high": 0.07,
                "verdict": "helps",
                "unit": "share",
            },
            {
                "replaced": "dropout: 0.1",
                "by": "0",
                "difference": -0.021,
                "low": -0.04,
                "high": -0.002,
                "verdict": "hurts",
                "unit": "share",
            },
        ],
    }


def written(tmp_path, study: dict | StudyReport) -> tuple[str, Outline]:
    write(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    return page, Outline(page)


@pytest.fixture(scope="module")
def study() -> dict:
    return example()


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("study"), study)[0]


def flat(text: str) -> str:
    return re.sub(r"\n+", "\n", text)


# ---------------------------------------------------------------- what the page says


def test_the_finding_comes_first_with_its_verdict(page):
    text = flat(Outline(page).text)
    assert text.index("Holds here\nLoRA is at most two points worse") < text.index("The arms")
    assert "Arms\n3\n15 runs, 6 from the store\nSeeds\n5\n0 to 4\nHeld equal\n400 updates\nfor every arm\nTime\n28 min 54 s\n" in text


def test_every_section_is_there_and_linked(page):
    outline = Outline(page)
    titles = ["Arms", "Comparisons", "Quality", "Contributions", "Laws", "Curves", "Equal", "Trials", "Runs", "Notes", "Again"]
    assert [link["href"] for link in outline.named("a")] == [f"#{title.lower()}" for title in titles]
    assert [section["id"] for section in outline.named("section")] == [title.lower() for title in titles]
    levels = [int(name[1]) for name, _ in outline.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_arms_say_figures_intervals_and_costs(study, page):
    rows = re.findall(r"<tr>.*?</tr>", page[page.index('id="arms"') : page.index('id="comparisons"')])[1:]
    assert [Outline(row).text.split("\n")[0] for row in rows] == list(ARMS)
    for arm, row in zip(study["arms"], rows, strict=True):
        figure = arm["figures"]["accuracy"]
        words = flat(Outline(row).text)
        assert f"{100 * figure['value']:.1f} %\n{100 * figure['low']:.1f} to {100 * figure['high']:.1f} %\n" in words
        keys = re.findall(r'data-v="([^"]*)"', row)
        costs = ("seconds", "updates", "tokens", "flops", "peak_memory", "bytes")
        assert [float(key) for key in keys[1:]] == [
            figure["value"],
            arm["figures"]["loss"]["value"],
            *(arm["costs"][name] for name in costs),
        ]


def test_comparisons_say_verdict_margin_and_test(page):
    text = flat(Outline(page[page.index('id="comparisons"') - 9 : page.index('<section id="quality"')]).text)
    assert (
        "lora against full · accuracy\nholds here\n−0.80 points\n−1.9 to +0.25 points\n−2.0 points\nmulti-bootstrap\n0.011\n0.021\n0.62\n"
        in text
    )
    assert (
        "full against prompt · accuracy\nholds here\n+18.9 points\n+16.8 to +21.0 points\n+10.0 points\nmulti-bootstrap\n<0.001\n" in text
    )
    assert "exponent\nholds here\n0.243\n0.224 to 0.262\n0.200\n" in text  # a number, not a difference


def test_columns_that_no_comparison_fills_are_left_out(study, tmp_path):
    bare = [one | {"p": None, "p_adjusted": None, "effect": None, "detectable": None} for one in study["comparisons"]]
    text, _ = written(tmp_path, study | {"comparisons": bare})
    heads = re.findall(r"<button[^>]*>([^<]+)", text[text.index('id="comparisons"') : text.index('<section id="quality"')])
    assert heads == ["Claim", "Verdict", "Difference", "Margin", "Test"]


def test_contributions_stand_greatest_first(page):
    text = page[page.index('id="contributions"') : page.index('id="laws"')]
    assert re.findall(r'class="name">([^<]+)<', text) == [
        "init: pissa → normal",
        "delta: lora → none",
        "schedule: cosine → constant",
        "dropout: 0.1 → 0",
    ]


def test_laws_say_what_they_predicted(page):
    text = flat(Outline(page).text)
    assert "Held out: at rows 4 000 the law predicted 0.663 nats (0.620 to 0.700 nats), and 0.676 nats was found." in text
    assert "b\n−0.310 · −0.350 to −0.280\n" in text


def test_what_differs_names_the_tuned_settings(page):
    text = flat(Outline(page[page.index('<section id="equal"') : page.index('<section id="trials"')]).text)
    assert "Every arm could spend the same: 400 updates." in text
    assert "lora\n0.00" in text
    assert text.count("chosen by trials") == 6
    assert text.count("as in the recipe") == 2
    assert "data: house:sorting, 4 000 rows" in text


@pytest.mark.parametrize(
    ("held", "budget", "words"),
    [
        ("", None, "Held equal\nnothing\ncosts may differ\n"),
        ("seconds", 90.0, "Held equal\n1 min 30 s\ntime, for every arm\n"),
        ("flops", 6.1e13, "Held equal\n61.0 TFLOP\noperations, for every arm\n"),
        ("memory", 2e9, "Held equal\n2.00 GB\npeak memory, for every arm\n"),
        ("tokens", 1_638_400.0, "Held equal\n1.64 M tokens\nfor every arm\n"),
        ("trials", None, "Held equal\ntrials\nthe same for every arm\n"),
    ],
)
def test_what_was_held_equal(study, tmp_path, held, budget, words):
    assert words in flat(written(tmp_path, study | {"held": held, "budget": budget})[1].text)


# ---------------------------------------------------------------- what a page keeps to itself


def test_page_asks_the_network_for_nothing(page):
    outline = Outline(page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    assert not [name for name, _ in outline.elements if name in {"link", "img", "iframe", "object", "embed", "base", "form"}]
    assert not [given for _, given in outline.elements if "src" in given or [key for key in given if key.startswith("on")]]
    policy = next(meta["content"] for meta in outline.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none';")
    assert len(page) < 200_000


def test_names_never_become_markup(study, tmp_path):
    hostile = "<script>alert(1)</script>\"'onmouseover=alert(2)&<b>|`*_"
    text = json.dumps(study)
    for word in ("lora", "accuracy", "tune.schedule", "cosine", "nats", "multi-bootstrap", "Hedges' g", "rows", "0.1.0"):
        text = text.replace(json.dumps(word), json.dumps(hostile + word))
    run = json.loads(text) | {
        "name": hostile,
        "finding": hostile,
        "about": hostile,
        "rerun": hostile,
        "notes": [hostile],
        "alike": [hostile],
    }
    run["text"] = f"</code></pre>{hostile}"
    _, outline = written(tmp_path, run)
    assert len(outline.named("script")) == 1
    assert all(set(given) <= {"class"} for given in outline.named("b"))
    assert not [key for _, given in outline.elements for key in given if key.startswith("on")]
    assert outline.text.count("<script>alert(1)") > 20
    markdown = (tmp_path / "report.md").read_text(encoding="utf8")
    outside = re.sub(r"(?ms)^(`{3,}).*?^\1$", "", markdown)
    assert not re.search(r"(?<!\\)<", outside)
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in _tables(markdown)[0]}
    assert len(widths) == 1


def test_no_absolute_path_leaves(study, tmp_path):
    arm = study["arms"][0] | {"changes": {"data": f"{tmp_path}/rows.jsonl"}}
    written(tmp_path, study | {"text": f"data: {tmp_path}/rows.jsonl\n", "notes": ["/home/ada/x.yaml"], "arms": [arm, *study["arms"][1:]]})
    for kind in ("html", "json", "md", "csv"):
        text = (tmp_path / f"report.{kind}").read_text(encoding="utf8")
        assert str(tmp_path) not in text
        assert "/home/ada" not in text
        assert "…/rows.jsonl" in text


def test_writing_loads_nothing_heavy(study, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(study))
    code = (
        "import json, sys; from pathlib import Path; from temper.report.study import write;"
        f"write(json.loads(Path({str(tmp_path / 'study.json')!r}).read_text()), Path({str(tmp_path / 'out.html')!r}));"
        "print([name for name in ('torch', 'numpy', 'scipy', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- odd studies


def test_numbers_that_are_none(study, tmp_path):
    odd = json.loads(json.dumps(study))
    odd["arms"][0]["figures"]["accuracy"] |= {"value": math.nan, "low": -math.inf, "high": math.inf}
    odd["arms"][1]["figures"]["loss"] |= {"low": None, "high": None}
    odd["arms"][1]["costs"] = {"seconds": math.inf, "bytes": math.nan}
    odd["arms"][0]["runs"][0]["figures"]["accuracy"] = math.nan
    odd["arms"][0]["runs"][0]["curve"][3]["loss"] = math.inf
    odd["comparisons"][0] |= {"difference": math.nan, "low": None, "high": None, "p": math.nan, "effect": math.inf}
    odd["comparisons"][1] |= {"low": -math.inf, "high": math.inf}
    odd["fits"][0]["points"][0]["y"] = odd["fits"][0]["line"][0]["low"] = math.nan
    odd["fits"][0]["held_out"]["predicted"] = math.nan
    odd["trials"][0]["figure"] = math.inf
    odd["contributions"][0]["difference"] = math.nan
    page, outline = written(tmp_path, odd)
    drawn = re.sub(r"<style>.*?</style>|<script>.*?</script>|<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf)\b", drawn)
    assert "not finite" in outline.text
    text = (tmp_path / "report.json").read_text(encoding="utf8")
    back = read(json.loads(text, parse_constant=pytest.fail))
    assert math.isnan(back.arms[0].figures["accuracy"].value)
    assert back.comparisons[1].high == math.inf


def test_one_arm_one_seed_and_nothing_else(tmp_path):
    bare = {
        "name": "x",
        "created": "2026-11-20T10:41:07Z",
        "measures": ["loss"],
        "arms": [{"name": "only", "figures": {"loss": {"value": 2.0}}}],
    }
    _, outline = written(tmp_path, bare)
    assert [link["href"] for link in outline.named("a")] == ["#arms", "#equal", "#again"]
    bare["arms"][0]["runs"] = [{"seed": 3, "figures": {"loss": 2.0}, "curve": [{"step": 1, "loss": 3.0}]}]
    page, outline = written(tmp_path, bare)
    assert "The run" in outline.text
    assert "polyline" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)  # one point is no curve
    assert (tmp_path / "report.csv").read_text().splitlines() == ["arm,seed,run,status,figure.loss", "only,3,,made,2.0"]


def test_many_arms_stay_apart(study, tmp_path):
    arms = []
    for at in range(24):
        arm = json.loads(json.dumps(study["arms"][at % 3])) | {"name": f"learning_rate={at} and a long name of its own"}
        for figure in arm["figures"].values():
            figure |= {key: figure[key] + at / 200 for key in ("value", "low", "high")}
        arm["costs"]["seconds"] += 3 * at
        arms.append(arm)
    page, outline = written(tmp_path, study | {"arms": arms, "comparisons": [], "fits": [], "trials": [], "contributions": []})
    assert outline.text.count("mean and range over seeds") == 2 * 6  # four arms a chart
    looks = set(re.findall(r'<path d="([^"]+)" transform="translate\(7,7\) scale\(5\)" class="spot (s\d)">', page))
    assert len(looks) == 24  # every arm has a shape and colour of its own
    labels = re.findall(r"<svg.*?</svg>", page[page.index('<section id="quality"') : page.index('<section id="curves"')])
    assert all(not _overlapping(drawing) for drawing in labels)
    assert {re.findall(r'class="label[^>]*>([^<]+)<', drawing)[0].isdigit() for drawing in labels if 'class="label' in drawing} == {True}
    assert "24 learning_rate=23 and a long name of its own" in outline.text  # what the numbers stand for


def _overlapping(drawing: str) -> list[tuple]:
    boxes = []
    for x, y, anchor, text in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" class="label[^>]*>([^<]*)<', drawing):
        start = float(x) - {"start": 0, "middle": 3.5, "end": 7.0}[anchor] * len(text)
        boxes.append((start, float(y) - 10, start + 7.0 * len(text), float(y) + 3))
    return [
        (one, two)
        for one, two in itertools.combinations(boxes, 2)
        if one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
    ]


def test_wrong_input_is_refused(study):
    with pytest.raises(Problem, match=r"`arms\.0\.speed`: Unexpected keyword argument \(see temper\.report\.study\.StudyReport\)"):
        read(study | {"arms": [study["arms"][0] | {"speed": 3}]})
    with pytest.raises(Problem, match=r"`comparisons\.0\.better`: `laura` is no arm of this study; did you mean `lora`\?"):
        read(study | {"comparisons": [study["comparisons"][0] | {"better": "laura"}]})
    with pytest.raises(Problem, match=r"`arms\.1\.name`: two arms are named `full`"):
        read(study | {"arms": [study["arms"][0]] * 2})
    with pytest.raises(Problem, match="`verdict`: Input should be 'holds here'"):
        read(study | {"verdict": "true"})


# ---------------------------------------------------------------- files beside the page


def _tables(markdown: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in markdown.split("\n\n")]
    return [lines for lines in blocks if lines and all(line.startswith("|") for line in lines)]


def test_json_is_the_whole_input(study, tmp_path):
    written(tmp_path, study)
    plain = json.loads((tmp_path / "report.json").read_text(encoding="utf8"))
    assert read(plain) == read(study)
    assert read(study).arms[1].changes == {"tune.method": "lora", "tune.delta.rank": 16}
    written(tmp_path, read(study))  # the dataclasses themselves
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf8")) == plain


def test_csv_reads_back_exactly(study, tmp_path):
    written(tmp_path, study)
    rows = list(csv.DictReader((tmp_path / "report.csv").open(encoding="utf8", newline="")))
    runs = [(arm, run) for arm in study["arms"] for run in arm["runs"]]
    assert len(rows) == len(runs) == 15
    for row, (arm, run) in zip(rows, runs, strict=True):
        assert (row["arm"], int(row["seed"]), row["run"], row["status"]) == (arm["name"], run["seed"], run["run"], run["status"])
        assert {name: float(row[f"figure.{name}"]) for name in run["figures"]} == run["figures"]
        assert {name: float(row[f"cost.{name}"]) for name in run["costs"]} == run["costs"]
        assert row["change.tune.method"] == arm["changes"]["tune.method"]
        assert row["change.tune.delta.rank"] == ("16" if arm["name"] == "lora" else "")
        assert float(row["tuned.tune.learning_rate"]) == arm["tuned"]["tune.learning_rate"]


def test_markdown_holds_finding_and_tables(study, tmp_path):
    written(tmp_path, study)
    markdown = (tmp_path / "report.md").read_text(encoding="utf8")
    assert markdown.startswith("# lora-against-full\n\n**Holds here.** LoRA is at most two points worse")
    assert f"```yaml\n{TEXT.rstrip()}\n```" in markdown
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in lines] for lines in _tables(markdown)]
    assert [lines[0][0] for lines in tables] == ["arm", "arm", "claim", "part", "name", "arm"]
    assert all(len(line) == len(lines[0]) for lines in tables for line in lines)
    assert [line[0] for line in tables[0][2:]] == list(ARMS)
    figure = study["arms"][0]["figures"]["accuracy"]
    assert tables[0][2][1] == f"{100 * figure['value']:.1f} % ({100 * figure['low']:.1f} to {100 * figure['high']:.1f} %)"
    assert len(tables[-1]) == 2 + len(study["trials"])
    assert "loss by rows, held out at 4 000: predicted 0.663 (0.620 to 0.700), found 0.676." in markdown


# ---------------------------------------------------------------- charts


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_front_is_what_nothing_beats(pairs):
    costs, qualities = [float(cost) for cost, _ in pairs], [float(quality) for _, quality in pairs]
    beaten = [
        any((c <= cost and q >= quality) and (c < cost or q > quality) for c, q in zip(costs, qualities, strict=True))
        for cost, quality in zip(costs, qualities, strict=True)
    ]
    found = front(costs, qualities)
    assert sorted(found) == [at for at, lost in enumerate(beaten) if not lost]
    assert [costs[at] for at in found] == sorted(costs[at] for at in found)


def test_quality_against_cost_marks_the_front(study, tmp_path):
    worse = json.loads(json.dumps(study["arms"][0])) | {"name": "slow"}
    worse["costs"] = {name: 1.5 * value for name, value in worse["costs"].items()}
    worse["costs"]["updates"] = study["arms"][0]["costs"]["updates"]
    page, _ = written(tmp_path, study | {"arms": [*study["arms"], worse]})
    charts = re.findall(r"<figure>.*?</figure>", page[page.index('<section id="quality"') : page.index('<section id="contributions"')])
    titles = [re.findall(r"<figcaption>([^<]+)<small>([^<]+)", chart)[0] for chart in charts]
    assert [name for name, _ in titles] == ["Time", "Tokens", "Operations", "Peak memory", "Size on disk"]  # updates are alike
    assert titles[0][1] == "on the front: prompt, lora, full"
    assert re.search(r"<title>slow: [^<]*</title>.*?class=\"spot s3 open\"", charts[0])
    assert not re.search(r"<title>full: [^<]*</title><line[^>]*></line><path[^>]*open", charts[0])
    lower = json.loads(json.dumps(study)) | {"measures": ["loss", "accuracy"]}
    page, _ = written(tmp_path, lower)
    assert "on the front: prompt, lora, full" in page  # less loss is better
    lower["arms"][0]["figures"]["loss"]["value"] = 9.0
    assert "on the front: prompt, lora<" in written(tmp_path, lower)[0]


def test_bands_are_means_and_ranges_over_seeds():
    seeds = [[(float(step), step + seed) for step in range(1, 7)] for seed in (0.0, 1.0, 5.0)]
    assert band(seeds) == [(step, step + 2.0, step, step + 5.0) for step in range(1, 7)]
    assert band(seeds, bins=3) == [(1.5, 3.5, 1.5, 6.5), (3.5, 5.5, 3.5, 8.5), (5.5, 7.5, 5.5, 10.5)]
    assert band([seeds[0], seeds[1][:2]]) == [(1, 1.5, 1, 2), (2, 2.5, 2, 3)]  # only steps that all seeds have
    assert band([[], []]) == []


def test_rows_put_values_on_one_axis():
    drawing = spans("d", [Span("a", "1", 1.0, 0.5, 1.5, bound=0.75), Span("b", "2", -0.5, solid=False)], zero=True, across="nats")
    places = [float(x) for x in re.findall(r'transform="translate\(([-\d.]+),', drawing)]
    (zero, *_), (bound,) = (
        [float(x) for x in re.findall(rf'<line x1="([\d.]+)"[^>]*class="{kind}"', drawing)] for kind in ("zero", "bound")
    )
    assert places[1] < zero < bound < places[0]
    assert (places[0] - zero) / (bound - zero) == pytest.approx(1 / 0.75, abs=0.01)
    assert drawing.count('class="whisker s0"') == 3
    assert 'class="spot s0 open"' in drawing


def test_a_plane_draws_odd_values():
    for x, y in ((0.0, 0.0), (1e-9, 1e9), (-5.0, 3.0)):
        Outline(plane("p", "x", "y", [Spot(x, y, "only", name="a name")], [Line([(x, y, None, None)])]))
    drawing = plane("p", "x", "y", [Spot(float(at), 1.0, "w", name="same") for at in (0, 0, 0)], words=["cosine"])
    assert drawing.count('class="label') == 3  # three names at one place, side by side
    assert not _overlapping(drawing)
    assert ">cosine<" in drawing


def test_differences_as_people_read_them():
    assert [signed(value, "share").replace("\u202f", " ") for value in (0.012, -0.002, 0.0)] == [
        "+1.2 points",
        "−0.20 points",
        "0.0 points",
    ]
    assert signed(-90.0, "s").replace("\u202f", " ") == "−1 min 30 s"
    assert signed(2.5e6, "bytes").replace("\u202f", " ") == "+2.50 MB"
    assert ends(-0.01, 0.025, "share") == "−1.0 to +2.5\u202fpoints"
    assert ends(None, 1.0, "") is None


# ---------------------------------------------------------------- in a browser


@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_its_window(browser, page, tmp_path, width):
    (tmp_path / "report.html").write_text(page)
    browser.open(tmp_path / "report.html", width)
    assert browser.run("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('section > *, header > *, figure, figcaption, svg text')]"
    beyond = f"{shown}.filter(one => !one.closest('.wide')).filter(one => one.getBoundingClientRect().right > innerWidth + 1"
    assert browser.run(f"{beyond} || one.getBoundingClientRect().left < -1).map(one => one.textContent).join('|')") == ""
    browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    asked = [event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert all(url.startswith("file://") and url.endswith("report.html") for url in asked)
    assert not [event for event in browser.events if event.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}]


def test_texts_of_a_chart_do_not_overlap(browser, page, tmp_path):
    (tmp_path / "report.html").write_text(page)
    browser.open(tmp_path / "report.html", 1280)
    touching = browser.run("""[...document.querySelectorAll('svg.chart')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
        return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
            p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 4 && q.top < p.bottom - 4).map(([b]) => a + ' / ' + b));
    }).join('\\n')""")
    assert touching == ""


def test_arms_sort_by_keyboard(browser, page, study, tmp_path):
    (tmp_path / "report.html").write_text(page)
    browser.open(tmp_path / "report.html", 1280)
    browser.run("document.querySelectorAll('#arms th button')[1].focus()")
    names = "[...document.querySelectorAll('#arms tbody tr')].map(row => row.cells[0].childNodes[1].textContent).join()"
    ranked = [arm["name"] for arm in sorted(study["arms"], key=lambda arm: arm["figures"]["accuracy"]["value"])]
    for expected in (ranked, ranked[::-1]):
        for kind in ("keyDown", "keyUp"):
            browser.ask(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r" * (kind == "keyDown")
            )
        assert browser.run(names) == ",".join(expected)


def test_a_study_can_be_read_in_the_dark(browser, page, tmp_path):
    (tmp_path / "report.html").write_text(page)
    browser.open(tmp_path / "report.html", 360, **{"prefers-color-scheme": "dark"})
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 21, 23)"
    assert browser.run("getComputedStyle(document.querySelector('.spot.open')).fill") == "rgb(21, 21, 23)"
