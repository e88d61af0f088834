"""The commands. Each takes `--json`; results go to stdout, progress and messages to stderr.

Exit code 0: done. 1: the work failed. 2: the request was wrong. Heavy imports happen inside commands.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from temper import world
from temper.parts import Problem, engines, nearest
from temper.passport import whose

app = typer.Typer(
    name="temper",
    help="Everything done to a model between its initialisation and its use: one recipe, steps that fit, methods made of parts.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Change a recipe: step.key=value, or key=value at its top.", metavar="KEY=VALUE")
]
StoreAt = Annotated[Path | None, typer.Option("--store", help="The store's folder (default: TEMPER_STORE, or the user's cache).")]
OutAt = Annotated[Path | None, typer.Option("--out", help="Where the report and exported folders go.")]


def main() -> None:
    """The entry point: turns errors into one clear message and an exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")  # for those who write against them
    if not world.is_main():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 the main process speaks for all; errors are everyone's
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except Problem as problem:
        for one in problem.all:
            _err(f"error: {one}")
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        _err(f"{interrupt or 'interrupted'}; the same command goes on from the last checkpoint")
        sys.exit(130)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # the command line itself was wrong
            _err(f"error: {error.format_message()}")  # type: ignore[attr-defined]
            sys.exit(2)
        if type(error).__name__ == "Abort":
            sys.exit(130)
        if type(error).__name__ == "Failed":
            _err(f"error: {error}")
            if error.__cause__ is not None:
                import traceback

                traceback.print_exception(error.__cause__)
            _err("what was done up to the last checkpoint is kept; the same command goes on from there")
            sys.exit(1)
        raise
    finally:
        world.leave()


def _err(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, default=str)
    print()


def _store(at: Path | None) -> Any:
    from temper.store import Store

    return Store(at)


def _table(headings: list[str], rows: list[list[str]], title: str | None = None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _width(headings: list[str], rows: list[list[str]]) -> int:
    """Columns that a table takes in which no cell but the last is cut or wrapped."""
    return sum(3 + max(map(len, column)) for column in list(zip(headings, *rows))[:-1]) + 20


# ---------------------------------------------------------------------------------------------------------- runs


def _run(plan: Any, out: Path, store_at: Path | None, as_json: bool) -> None:
    from temper import preflight
    from temper.explaining import why
    from temper.progress import Display
    from temper.run import run

    store = _store(store_at)
    cached = all(reason.state == "from the store" for reason in why(plan, store))
    if not cached:
        for warning in preflight.check(plan, store).warnings if world.is_main() else ():
            _err(f"note: {warning}")
    with Display(sys.stderr if world.is_main() else sys.stdout) as display:
        result = run(plan, store, out=out, show=display.show, say=display.say, began=display.began, ended=display.ended)
    if as_json:
        _print(
            {
                "run": result.run,
                "seconds": result.seconds,
                "report": str(result.report),
                "folders": {name: str(folder) for name, folder in result.folders.items()},
                "steps": [
                    {
                        "name": name,
                        "artefact": made.artefact.id,
                        "status": made.status,
                        "seconds": made.record["seconds"],
                        "figures": {key: figure.dump() for key, figure in made.artefact.figures.items()},
                    }
                    for name, made in result.made.items()
                ],
            }
        )
        return
    headings, rows = _figures_table(result)
    if rows:
        _table(headings, rows)
    for name, folder in result.folders.items():
        print(f"  {name:<16} {folder}")
    print(f"  {'report':<16} {result.report}")
    if result.anew == 0:
        print(f"  every step was already made: answered from the store in {result.seconds:.1f} s")
    else:
        print(f"  {result.anew} of {len(result.made)} steps made anew in {result.seconds:.0f} s; artefacts in {store.root}")


def _figures_table(result: Any) -> tuple[list[str], list[list[str]]]:
    """Stages in rows; in columns the figures that the steps aim at, else the first of each evaluation. The report has all."""
    stages: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    for made in result.made.values():
        if made.artefact.passport.kind == "figures":
            for name, figure in made.artefact.figures.items():
                stage, metric = whose(name)
                stages.setdefault(stage, {})[f"{made.step.name} {metric}"] = figure
                first.setdefault(made.step.name, f"{made.step.name} {metric}")
    aims = {aim for step in result.plan.steps for aim in step.aim}
    columns = list(dict.fromkeys(column for row in stages.values() for column in row if column in aims)) or list(first.values())
    sizes = {n: sum(f["bytes"] for k, f in made.record["files"].items() if k.startswith("model/")) for n, made in result.made.items()}
    rows = []
    for name, row in stages.items():
        cells = [f"{row[column].value:.4g}{_interval(row[column])}" if column in row else "" for column in columns]
        rows.append([name, f"{sizes[name] / 1e6:.2f} MB" if name in sizes else "", *cells])
    return ["stage", "size on disk", *columns], rows


def _interval(figure: Any) -> str:
    return f" [{figure.low:.3g}, {figure.high:.3g}]" if figure.low is not None and figure.high is not None else ""


@app.command()
def quickstart(out: OutAt = None, store: StoreAt = None, sets: Sets = None, as_json: Json = False) -> None:
    """The whole life of a small model on this machine, no download: pre-train, tune, align, quantise, evaluate, report."""
    from temper.recipe import load

    _run(load("quickstart", sets or ()), out or Path("temper-out/quickstart"), store, as_json)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or the name of one that ships with Temper.")],
    sets: Sets = None,
    out: OutAt = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Runs a recipe with live progress; prints where the artefacts and the report are."""
    from temper.recipe import load

    plan = load(recipe, sets or ())
    _run(plan, out or Path("temper-out") / plan.name, store, as_json)


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, or the name of one that ships with Temper.")],
    sets: Sets = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Everything knowable before running: inputs, passports, supervised tokens, peak memory, the final save."""
    from temper import preflight
    from temper.recipe import load

    found = preflight.check(load(recipe, sets or ()), _store(store))
    if as_json:
        _print(dataclasses.asdict(found))
        return
    rows = [[one.name, one.engine, one.takes, one.gives, one.state, one.memory_text] for one in found.steps]
    _table(["step", "engine", "takes", "gives", "state", "peak memory"], rows)
    for warning in found.warnings:
        print(f"note: {warning}")
    print("nothing stands in the way")


@app.command()
def why(
    step: Annotated[str | None, typer.Argument(help="A step; without it, all of them.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", "-r", help="The recipe (default: quickstart).")] = None,
    sets: Sets = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Says why a step would run again, or would not."""
    from temper.explaining import why as explain
    from temper.recipe import load

    found = explain(load(recipe or Path("quickstart"), sets or ()), _store(store), step)
    if as_json:
        _print([dataclasses.asdict(one) for one in found])
        return
    for one in found:
        print(f"{one.step}: {one.state}")
        for reason in one.because[:12]:
            print(f"  {reason}")
        if len(one.because) > 12:
            print(f"  and {len(one.because) - 12} more")


# ----------------------------------------------------------------------------------------------------- knowledge


@app.command()
def methods(
    engine: Annotated[str | None, typer.Argument(help="An engine; without it, all.")] = None,
    name: Annotated[str | None, typer.Argument(help="A method; prints its parts, settings and a ready recipe.")] = None,
    as_json: Json = False,
) -> None:
    """The table of methods by slots; one method: parts, formulas, paper, a ready recipe."""
    from temper import methods as words

    if as_json:
        _print(words.one(engine, name) if engine and name else words.all_methods(engine))
    elif engine and name:
        print(words.page(engine, name))
    else:
        for one in [engine] if engine else engines():
            headings, rows = words.table(one)
            if _width(headings, rows) > shutil.get_terminal_size().columns:
                headings, rows = words.narrow(headings, rows)
            _table(headings, rows, title=f"{one}: {words.summary(one)}")


@app.command()
def papers(
    query: Annotated[list[str] | None, typer.Argument(help="Words of a title, a name or an id.")] = None,
    engine: Annotated[str | None, typer.Option(help="Only one engine's.")] = None,
    built: Annotated[bool, typer.Option("--built", help="Only what is built today.")] = False,
    as_json: Json = False,
) -> None:
    """The catalogue of papers and where each lives."""
    from temper.papers import nearest as near
    from temper.papers import papers as search

    found = search(" ".join(query) if query else None, engine=engine, built=built or None)
    if as_json:
        _print([dataclasses.asdict(one) for one in found])
        return
    if found:
        rows = [[one.id, f"{one.engine}.{one.name}", "yes" if one.built else "", one.verdict, one.title] for one in found]
        _table(["id", "engine.name", "built", "card", "title"], rows)
        print(f"{len(found)} papers")
        return
    close = [f"{one.id} {one.title}" for one in near(" ".join(query or ()))]
    print("no paper has all these words" + (f"; near are {' · '.join(close)}" if close else ""))


@app.command()
def schema(out: Annotated[Path | None, typer.Argument(help="The file to write (default: stdout).")] = None) -> None:
    """Writes the JSON Schema of recipes, for editors."""
    from temper.context import write
    from temper.recipe import schema_text

    if out is None:
        print(schema_text(), end="")
    else:
        write(out, schema_text())
        _err(f"wrote {out}; begin a recipe with `# yaml-language-server: $schema={out.name}`")


# ------------------------------------------------------------------------------------------------------ evidence

Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that make runs side by side; 0: this one alone.")]
Ray = Annotated[str | None, typer.Option("--ray", help="A Ray cluster's address, `auto`, or `local`.", metavar="ADDRESS")]
MethodName = Annotated[str, typer.Argument(help="A method: tune.lora, or lora where only one engine has it.", metavar="METHOD")]


def _conduct(study: Any, out: Path, store_at: Path | None, workers: int, ray: str | None, rerun: str, complete: Any = None) -> Any:
    """Runs a study with a line for every run. complete: adds to the report before it is written."""
    from temper.progress import Display
    from temper.report.study import write
    from temper.study import Ways, conduct

    called = {figure: name for name, figure in study.measure.items()}
    with Display(sys.stderr) as display:

        def told(cell: Any, done: int, count: int) -> None:
            seconds = sum(step.costs["seconds"] for step in cell.steps.values() if step.made)
            shown = [f"{called.get(name, name)} {figure.value:.4g}" for name, figure in cell.figures.items()]
            figures = " · ".join([*shown[:3], *(["…"] if len(shown) > 3 else [])])
            what = f"{'trial of ' if cell.job.trial else ''}{cell.job.arm}, seed {cell.job.seed}"
            display.line(f"{done}/{count} {what}", f"{seconds:.1f} s" if cell.made else "from the store", cell.failed or figures)

        def began(job: Any, step: Any, index: int, count: int) -> None:
            display.place(f"{job.arm}, seed {job.seed}: {step.name}")

        done = conduct(study, Ways(_store(store_at), workers, ray, display.show, display.say, began, told), rerun)
    if complete is not None:
        done = dataclasses.replace(done, report=complete(done))
    write(done.report, out / "report.html")
    return done


def _tell_study(done: Any, out: Path, as_json: bool, **more: Any) -> None:
    from temper.report import finite

    report = done.report
    if as_json:
        _print({**finite(dataclasses.asdict(report)), "report": str(out / "report.html"), **more})
        return
    costs = [name for name in ("seconds", "bytes") if any(name in arm.costs for arm in report.arms)]
    measures = report.measures[:4]  # the page has all
    headings = ["arm", *measures, *({"seconds": "time", "bytes": "size"}[name] for name in costs)]
    rows = [
        [
            arm.name,
            *(f"{arm.figures[name].value:.4g}{_interval(arm.figures[name])}" for name in measures),
            *(_cost(name, arm.costs.get(name)) for name in costs),
        ]
        for arm in report.arms
    ]
    _table(headings, rows)
    if report.comparisons:
        _table(
            ["claim" if report.verdict else "comparison", "difference", "p", ""],
            [
                [one.claim, f"{one.difference:.4g} [{one.low:.3g}, {one.high:.3g}]", f"{one.p_adjusted:.3g}", one.verdict]
                for one in report.comparisons
            ],
        )
    for note in report.notes:
        print(f"note: {note}")
    if len(report.measures) > len(measures):
        print(f"note: {len(report.measures) - len(measures)} more figures stand in the report")
    if report.verdict:
        print(f"  {'verdict':<16} {report.verdict}")
    print(f"  {report.finding}")
    print(f"  {'report':<16} {out / 'report.html'}")


def _cost(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s" if name == "seconds" else f"{value / 1e6:.2f} MB"


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="A study file, or one that ships with Temper; without it, these are listed.")] = None,
    ready: Annotated[bool, typer.Option("--check", help="Only say what would run and what it could find.")] = False,
    workers: Workers = 0,
    ray: Ray = None,
    out: OutAt = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Compares recipes at an equal budget, over seeds: intervals, paired tests, costs, a finding."""
    from temper import study as studies
    from temper.papers import shipped
    from temper.study import cards

    if name is None:
        found = {f"{path.parent.name}.{path.stem}": studies.load(path) for path in sorted(shipped("studies").glob("*/*.yaml"))}
        if as_json:
            _print([{"study": word, "about": one.about, "claim": one.claim, "paper": one.paper} for word, one in found.items()])
        else:
            _table(["study", "about"], [[word, one.about] for word, one in found.items()])
        return
    made = studies.load(name if Path(name).is_file() else cards.find(name))
    if ready:
        found = studies.ready(made, studies.Ways(_store(store)))
        if as_json:
            _print(found)
        else:
            for key, value in found.items():
                print(f"{key}: {value}")
        return
    folder = out or studies.out_of(made)
    _tell_study(_conduct(made, folder, store, workers, ray, f"temper study {name}"), folder, as_json)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="A study file: a recipe, what varies, what is measured.")],
    workers: Workers = 0,
    ray: Ray = None,
    out: OutAt = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """The same as `study`, for a file of one's own."""
    from temper import study as studies

    made = studies.load(file)
    folder = out or studies.out_of(made)
    _tell_study(_conduct(made, folder, store, workers, ray, f"temper compare {file}"), folder, as_json)


@app.command()
def ablate(
    method: MethodName,
    ground: Annotated[Path | None, typer.Option("--study", help="A study whose recipe, measures and seeds are used.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also every two parts together.")] = False,
    workers: Workers = 0,
    ray: Ray = None,
    out: OutAt = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Which part of a method earns its keep: each is replaced by the default in turn."""
    from temper import study as studies
    from temper.study import ablation, cards

    engine, name = studies.method(method)
    made = ablation.ablation(studies.load(ground or cards.ground(engine)), engine, name, pairs=pairs)
    folder = out or studies.out_of(made)

    def complete(done: Any) -> Any:
        return dataclasses.replace(done.report, contributions=ablation.contributions(done.study, done.judged))

    done = _conduct(made, folder, store, workers, ray, f"temper ablate {method}", complete)
    _tell_study(done, folder, as_json)


@app.command()
def reproduce(
    method: MethodName,
    workers: Workers = 0,
    ray: Ray = None,
    at: Annotated[Path | None, typer.Option("--cards", help="The folder of cards (default: the one that comes with Temper).")] = None,
    out: OutAt = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Runs the study behind a method's card, and writes the card."""
    from temper import study as studies
    from temper.papers import shipped
    from temper.study import cards

    path = cards.find(method)
    made, engine, name, folder = studies.load(path), path.parent.name, path.stem, at or shipped("cards")
    cards.check(made)
    where = out or studies.out_of(made)
    done = _conduct(made, where, store, workers, ray, f"temper reproduce {engine}.{name}")
    written = cards.save(cards.card(done, engine, name, cards.attempts(engine, name, folder)), folder)
    _tell_study(done, where, as_json, card=str(written))
    if not as_json:
        print(f"  {'card':<16} {written}")


# --------------------------------------------------------------------------------------------- data and artefacts


@app.command()
def data(
    path: Annotated[str, typer.Argument(help="A file, a folder, a hub name, house:library or task:NAME.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose tokenizer and template: a folder, a hub name, house:lm, an artefact.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many rows.")] = 3,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens after which a row is cut.")] = 512,
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """The first rows as the model will see them, supervised tokens marked in colour."""
    if split not in ("train", "test"):
        raise Problem(f'"{split}" is not a choice{nearest(split, ("train", "test"))}')
    from temper.preview import preview

    found = preview(path, model, _store(store), rows=rows, max_length=max_length, split=split)
    if as_json:
        _print(found)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(
        f"{found['name']}: {found['rows']} rows of shape {found['shape']}, split {split}; supervised tokens are underlined and green"
    )
    for number, example in enumerate(found["examples"], 1):
        console.rule(f"{number}: {sum(told for _, told in example)} of {len(example)} {found['unit']} supervised", align="left")
        text = Text()
        for token, told in example:
            text.append(token, style="green underline" if told else "dim")
        console.print(text)


@app.command()
def show(
    artefact: Annotated[str, typer.Argument(help="The beginning of a key, a step, or recipe/step.")],
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """What was made, from what, its passport and figures."""
    at = _store(store)
    key = at.find(artefact)
    record = at.record(key)
    if as_json:
        _print(record)
        return
    passport = {name: value for name, value in record["passport"].items() if value not in (None, "", [], {})}
    print(f"{record['name']}: {record['engine']} {record['method']}, made {record['created']} in {record['seconds']:.1f} s")
    print(f"  key      {key}\n  folder   {at.folder(key)}")
    for name, value in passport.items():
        value = ", ".join(f"{k} {v[:12]}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"  {name:<12} {value}")
    for name, figure in at.get(key).figures.items():
        print(f"  {name:<28} {figure}")
    for note in record["notes"]:
        print(f"  note: {note}")
    for name, choice in record["decisions"].items():
        print(f"  {name}: {choice['value']}, because {choice['reason']}")


@app.command()
def runs(store: StoreAt = None, as_json: Json = False) -> None:
    """The runs that the store remembers."""
    found = _store(store).runs()
    if as_json:
        _print(found)
        return
    rows = [
        [one["run"], one["name"], one["state"], f"{one.get('seconds', 0):.0f} s", ", ".join(s["name"] for s in one["steps"])]
        for one in found
    ]
    _table(["run", "recipe", "state", "time", "steps"], rows)


@app.command()
def export(
    artefact: Annotated[str, typer.Argument(help="The beginning of a key, a step, or recipe/step.")],
    to: Annotated[str, typer.Argument(help="A folder, or hub:NAME.", metavar="DIR")],
    merged: Annotated[bool, typer.Option("--merged", help="Fold an adapter into its base first.")] = False,
    lora: Annotated[
        str | None, typer.Option("--lora", help="An adapter of any type as plain LoRA: `exact`, or a rank at most.", metavar="RANK")
    ] = None,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """A plain folder with a model card: lineage, figures, licences of all parents."""
    from temper.models import export as leave

    at = _store(store)
    made = at.get(at.find(artefact))
    if lora is not None and lora != "exact" and not (lora.isdigit() and int(lora) > 0):
        raise Problem(f"--lora {lora}: give `exact`, or a rank such as 16")
    form: dict[str, Any] = {"merged": merged, "lora": int(lora) if lora and lora.isdigit() else lora}
    where = leave.upload(made, to[4:], at, **form) if to.startswith("hub:") else str(leave.export(made, Path(to), at, **form))
    lost = leave.lost(Path(where)) if lora and not to.startswith("hub:") else {}
    if as_json:
        _print({"artefact": made.id, "to": where, **({"lost": lost} if lora else {})})
        return
    print(where)
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        _err(f"{len(lost)} modules are not exact: up to {lost[worst]:.2g} of the change is lost (`{worst}`)")


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Set damaged artefacts aside, so that they are made again.")] = False,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Rereads every checksum of the store."""
    at = _store(store)
    found = at.verify(lambda key, state: None if as_json else print(f"{key[:12]} {state}"))
    bad = {key: state for key, state in found.items() if state != "whole"}
    if repair:
        for key in bad:
            moved = at.set_aside(key)
            _err(f"{key[:12]} is now {moved}")
    if as_json:
        _print(found)
    else:
        print(f"{len(found) - len(bad)} whole, {len(bad)} damaged")
    if bad and not repair:
        raise typer.Exit(1)


@app.command()
def gc(
    keep: Annotated[int, typer.Option("--keep", min=0, help="Latest runs of each recipe whose artefacts stay.")] = 1,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreAt = None,
    as_json: Json = False,
) -> None:
    """Frees the store of what the latest runs do not use."""
    going, size = _store(store).free(keep, dry)
    if as_json:
        _print({"keys": going, "bytes": size, "dry": dry})
    else:
        print(f"{'would free' if dry else 'freed'} {size / 1e6:.1f} MB in {len(going)} artefacts")


# -------------------------------------------------------------------------------------------- one step, no recipe


def _engine_command(name: str) -> Any:
    def command(
        model: Annotated[
            list[str], typer.Argument(help="A folder, a hub name, house:lm, an artefact, or new; then DATA.", metavar="MODEL DATA")
        ],
        method: Annotated[str | None, typer.Option("--method", help="A method: `temper methods ENGINE` lists them.")] = None,
        settings: Annotated[
            list[str] | None, typer.Option("--set", help="A slot or a setting: delta.lora.rank=8.", metavar="KEY=VALUE")
        ] = None,
        seed: Annotated[int, typer.Option(min=0)] = 0,
        out: Annotated[
            Path | None, typer.Option("--out", help="Where the result goes as a plain folder (default: it stays in the store).")
        ] = None,
        store: StoreAt = None,
        as_json: Json = False,
    ) -> None:
        from temper.progress import Display
        from temper.run import one_step

        *models, rows = model if len(model) > 1 else (*model, None)
        with Display(sys.stderr if world.is_main() else sys.stdout) as display:
            result = one_step(
                name,
                [one for one in models if one != "new"],
                rows,
                method=method,
                out=out,
                seed=seed,
                store=_store(store),
                show=display.show,
                say=display.say,
                sets=settings or (),
            )
        made = result.last
        if as_json:
            _print({"artefact": made.id, "folder": str(out or made.path), "figures": {k: f.dump() for k, f in made.figures.items()}})
            return
        for key, figure in made.figures.items():
            print(f"  {key:<28} {figure}")
        print(f"  {name}: {out or made.path}")

    command.__doc__ = f"One {name} step without a recipe."
    return command


for _name in engines():
    app.command(_name, rich_help_panel="Engines", no_args_is_help=True)(_engine_command(_name))
