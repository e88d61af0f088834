"""Studies: recipes x settings x seeds -> figures with intervals -> a finding.

    name: lora-or-full
    recipe: base.yaml                    # or a recipe's mapping
    vary:
      full: {tune.method: full}
      lora: {tune.method: lora}
    seeds: 5
    budget: {updates: 100}
    measure: {accuracy: task.tune.accuracy}
    finding:
      claims:
        - {better: lora, than: full, margin: -0.02}

`compare`, `study`, `ablate` and `reproduce` are this one mechanism: `reading` checks the file, `trials` tunes every arm alike, `running`
makes the runs, `evidence` puts uncertainty on their figures, `findings` holds them against the rule, `cards` keeps the verdicts.
"""

from temper import parts
from temper.parts import Problem, nearest, plain
from temper.study.conducting import Conducted, conduct, out_of, ready
from temper.study.reading import Study, load, read, study
from temper.study.running import Cell, Job, Ways


def method(word: str) -> tuple[str, str]:
    """Engine and name of a method: `tune.lora`, `tune lora`, or `lora` where only one engine has it. Raises `Problem`."""
    known = {f"{engine}.{name}": (engine, name) for engine in parts.engines() for name in parts.methods(engine)}
    wanted = plain(word.replace(" ", "."))
    same = [pair for full, pair in known.items() if wanted in (plain(full), plain(pair[1]))]
    if len(same) == 1:
        return same[0]
    if same:
        raise Problem(f"several engines have a method `{word}`; say which: {', '.join('.'.join(pair) for pair in same)}")
    raise Problem(f"no method `{word}`{nearest(word, [*known, *(name for _, name in known.values())])}")


__all__ = ["Cell", "Conducted", "Job", "Study", "Ways", "conduct", "load", "method", "out_of", "read", "ready", "study"]
