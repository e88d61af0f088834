"""Bad recipes, each with the exact message that its author sees: file, line, column, step, value, rule, remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from temper.parts import Problem
from temper.preflight import check
from temper.recipe import read
from temper.store import Store

# (what is wrong, the recipe, --set, the message)
READING: list[tuple[str, str, tuple[str, ...], str]] = [
    (
        "empty",
        """\
""",
        (),
        "recipe.yaml:1:1: a recipe is a mapping with `steps:`; this is null",
    ),
    (
        "list at top",
        """\
- tune
""",
        (),
        'recipe.yaml:1:1: a recipe is a mapping with `steps:`; this is ["tune"]',
    ),
    (
        "text at top",
        """\
tune
""",
        (),
        'recipe.yaml:1:1: a recipe is a mapping with `steps:`; this is "tune"',
    ),
    (
        "bad yaml",
        """\
steps: [tune
""",
        (),
        "recipe.yaml:2:1: expected ',' or ']', but got '<stream end>'",
    ),
    (
        "tab",
        """\
steps:
	- tune
""",
        (),
        "recipe.yaml:2:1: found character '\\t' that cannot start any token",
    ),
    (
        "duplicate key",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      epochs: 1
      epochs: 2
""",
        (),
        'recipe.yaml:6:7: found duplicate key "epochs"; keep one',
    ),
    (
        "python tag",
        """\
steps: !!python/object:os.system [ls]
""",
        (),
        'recipe.yaml:1:1: the tag "tag:yaml.org,2002:python/object:os.system" is not allowed; write plain values',
    ),
    (
        "own tag",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {epochs: !mine 3}
""",
        (),
        'recipe.yaml:4:20: step `tune`, `epochs`: the tag "!mine" is not allowed; write plain values',
    ),
    (
        "unknown top key",
        """\
modle: house:lm
steps:
  - tune
""",
        (),
        """\
recipe.yaml:1:8: `modle`: a recipe has no key `modle`; did you mean `model`?
recipe.yaml:3:5: step `tune`, `model`: the recipe has no `model:` of its own; add one, or name a step
recipe.yaml:3:5: step `tune`, `data`: the recipe has no `data:` of its own; add one, or name a file here""",
    ),
    (
        "no steps",
        """\
data: rows.jsonl
model: house:lm
""",
        (),
        "recipe.yaml: a recipe needs `steps:`, a list of at least one step",
    ),
    (
        "empty steps",
        """\
data: rows.jsonl
model: house:lm
steps: []
""",
        (),
        "recipe.yaml:3:1: a recipe needs `steps:`, a list of at least one step",
    ),
    (
        "steps not a list",
        """\
data: rows.jsonl
model: house:lm
steps: tune
""",
        (),
        "recipe.yaml:3:8: a recipe needs `steps:`, a list of at least one step",
    ),
    (
        "bad name",
        """\
name: 3 things
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        'recipe.yaml:1:7: `name`: "3 things": a name has letters, digits, dots and hyphens, and begins with a letter',
    ),
    (
        "name not text",
        """\
name: 7
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        "recipe.yaml:1:7: `name`: 7: a text is asked for",
    ),
    (
        "bad seed",
        """\
seed: -1
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        "recipe.yaml:1:7: `seed`: -1: a seed is a whole number, 0 or more",
    ),
    (
        "seed true",
        """\
seed: true
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        "recipe.yaml:1:7: `seed`: true: a seed is a whole number, 0 or more",
    ),
    (
        "use not a list",
        """\
use: mine.py
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        'recipe.yaml:1:6: `use`: "mine.py": `use` is a list of Python files',
    ),
    (
        "use missing file",
        """\
use: [yours.py]
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        'recipe.yaml:1:7: `use`: no file "FOLDER/yours.py"; give the path of a Python file, relative to the recipe',
    ),
    (
        "use broken file",
        """\
use: [broken.py]
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        "recipe.yaml:1:7: `use`: broken.py does not import: ModuleNotFoundError: No module named 'nothing_of_the_kind'",
    ),
    (
        "env unset",
        """\
env: [TEMPER_TEST_NOT_SET]
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        "recipe.yaml:1:7: `env`: the variable TEMPER_TEST_NOT_SET is not set; export TEMPER_TEST_NOT_SET=... before the run",
    ),
    (
        "env not named",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {data: '${env:HOME}/rows.jsonl'}
""",
        (),
        "recipe.yaml:4:18: step `tune`, `data`: the variable HOME is not named under `env:`; add `env: [HOME]` to the recipe",
    ),
    (
        "unknown variable",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {data: '${topic}.jsonl'}
""",
        (),
        "recipe.yaml:4:18: step `tune`, `data`: nothing is called `${topic}`",
    ),
    (
        "bad export",
        """\
export: tuned
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        "recipe.yaml:1:9: `export`: no step `tuned`; did you mean `tune`?",
    ),
    (
        "export number",
        """\
export: 3
data: rows.jsonl
model: house:lm
steps:
  - tune
""",
        (),
        "recipe.yaml:1:9: `export`: 3: `export` is last, all, none, or a list of steps",
    ),
    (
        "unknown engine",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tuna: {method: lora}
""",
        (),
        "recipe.yaml:4:5: step `tuna`: no engine `tuna`; did you mean `tune`?",
    ),
    (
        "engine far off",
        """\
data: rows.jsonl
model: house:lm
steps:
  - xyzzy: {}
""",
        (),
        "recipe.yaml:4:5: step `xyzzy`: no engine `xyzzy`; there is `align` · `each` · `evaluate` · `pretrain` · `quantize` · `repeat` · `tune`",
    ),
    (
        "two engines in a step",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
    align: {}
""",
        (),
        "recipe.yaml:4:5: a step is written `engine: {settings}`, with one engine; here is 2 keys: tune, align",
    ),
    (
        "number as a step",
        """\
data: rows.jsonl
model: house:lm
steps:
  - 3
""",
        (),
        "recipe.yaml:4:5: a step is written `engine: {settings}`, with one engine; here is 3",
    ),
    (
        "settings as text",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: lora
""",
        (),
        'recipe.yaml:4:11: step `tune`: "lora": settings of a step are a mapping, `{key: value}`',
    ),
    (
        "unknown method",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {method: lroa}
""",
        (),
        "recipe.yaml:4:20: step `tune`, `method`: engine `tune` has no method `lroa`; did you mean `lora`?",
    ),
    (
        "unknown setting",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {epoch: 3}
""",
        (),
        "recipe.yaml:4:19: step `tune`, `epoch`: `tune` has no slot or setting `epoch`; did you mean `epochs`?",
    ),
    (
        "setting of wrong type",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {epochs: many}
""",
        (),
        'recipe.yaml:4:20: step `tune`, `epochs`: "many": a number is asked for',
    ),
    (
        "true is no number",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {epochs: true}
""",
        (),
        "recipe.yaml:4:20: step `tune`, `epochs`: true: a number is asked for",
    ),
    (
        "below the range",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {clip: 0}
""",
        (),
        "recipe.yaml:4:18: step `tune`, `clip`: 0: must be above 0",
    ),
    (
        "bad choice",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {precision: bf61}
""",
        (),
        'recipe.yaml:4:23: step `tune`, `precision`: "bf61" is not a choice; did you mean `bf16`?',
    ),
    (
        "two lengths",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {epochs: 1, updates: 10}
""",
        (),
        "recipe.yaml:4:5: step `tune`: updates 10 and epochs 1: a run's length is given once; leave one out",
    ),
    (
        "keep after the end",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {updates: 10, keep: [20]}
""",
        (),
        "recipe.yaml:4:5: step `tune`: keep 20: the run ends after update 10; keep an earlier one, or train longer",
    ),
    (
        "keep not a list",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {updates: 10, keep: 5}
""",
        (),
        "recipe.yaml:4:31: step `tune`, `keep`: 5: a list is asked for",
    ),
    (
        "unknown part",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {delta: loraa}
""",
        (),
        "recipe.yaml:4:19: step `tune`, `delta`: slot `delta` has no part `loraa`; did you mean `lora`?",
    ),
    (
        "unknown setting of a part",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta: {lora: {rnak: 4}}
""",
        (),
        "recipe.yaml:5:28: step `tune`, `delta.lora.rnak`: part `lora` has no setting `rnak`; did you mean `rank`?",
    ),
    (
        "part's setting of wrong type",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta:
        lora:
          rank: '8'
""",
        (),
        'recipe.yaml:7:17: step `tune`, `delta.lora.rank`: "8": a whole number is asked for',
    ),
    (
        "part's setting out of range",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta: {lora: {rank: 0}}
""",
        (),
        "recipe.yaml:5:28: step `tune`, `delta.lora.rank`: 0: must be above 0",
    ),
    (
        "share above 1",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta: {lora: {dropout: 1.5}}
""",
        (),
        "recipe.yaml:5:31: step `tune`, `delta.lora.dropout`: 1.5: must be at most 1",
    ),
    (
        "two parts where one goes",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta: [lora, full]
""",
        (),
        "recipe.yaml:5:7: step `tune`, `delta`: slot `delta` takes one part, not a list",
    ),
    (
        "two names in a part",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta: {lora: {}, full: {}}
""",
        (),
        "recipe.yaml:5:7: step `tune`, `delta`: a part is written `name` or `{name: {setting: value}}`, with one name; here are 2",
    ),
    (
        "settings of a part as a number",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta: {lora: 8}
""",
        (),
        "recipe.yaml:5:21: step `tune`, `delta.lora`: 8: settings of `lora` are a mapping such as {rank: 8}",
    ),
    (
        "number in a slot",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {base: 8}
""",
        (),
        "recipe.yaml:4:18: step `tune`, `base`: 8: slot `base` takes the name of a part; there is `as-loaded` · `merged` · `nf4`",
    ),
    (
        "empty a slot that must not be",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {loss: none}
""",
        (),
        "recipe.yaml:4:18: step `tune`, `loss`: slot `loss` cannot be empty; there is `causal` · `fill-middle` · `label` · `load-balance` · `masked` · `prefix` · `rationale` · `span-mixture`",
    ),
    (
        "phases where none may be",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta:
        phased: [[0.5, lora], [end, full]]
""",
        (),
        "recipe.yaml:6:9: step `tune`, `delta.phased`: slot `delta` may not change over a run; name one part",
    ),
    (
        "bad end of a phase",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      schedule:
        phased: [[soon, cosine], [end, linear]]
""",
        (),
        'recipe.yaml:6:19: step `tune`, `schedule.phased`: "soon" is no point of a run; write a share such as 0.5, steps such as 200, "2M tokens", or end',
    ),
    (
        "phases out of order",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      schedule:
        phased: [[0.5, cosine], [0.2, linear]]
""",
        (),
        "recipe.yaml:6:34: step `tune`, `schedule.phased`: phases must end one after another",
    ),
    (
        "ramp where none may be",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      delta: {lora: {rank: {ramp: [4, 8]}}}
""",
        (),
        "recipe.yaml:5:22: step `tune`, `delta.lora.rank`: `rank` of `lora` may not change over a run; give one number",
    ),
    (
        "ramp of three",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      schedule: {cosine: {floor: {ramp: [0, 1, 2]}}}
""",
        (),
        "recipe.yaml:5:35: step `tune`, `schedule.cosine.floor.ramp`: [0, 1, 2]: a ramp is written `ramp: [first, last]` with two numbers",
    ),
    (
        "function missing",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {loss: 'mine.py:wiegh'}
""",
        (),
        "recipe.yaml:4:18: step `tune`, `loss`: mine.py has no function `wiegh`; did you mean `weigh`?",
    ),
    (
        "function's file missing",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {loss: 'yours.py:weigh'}
""",
        (),
        'recipe.yaml:4:18: step `tune`, `loss`: no file "FOLDER/yours.py"; give the path of a Python file, relative to the recipe',
    ),
    (
        "unknown step as model",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
  - align: {model: tunne}
""",
        (),
        "recipe.yaml:5:20: step `align`, `model`: `tunne` is neither a step before this one nor a folder; did you mean `tune`?",
    ),
    (
        "later step as model",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {model: align}
  - align: {}
""",
        (),
        "recipe.yaml:4:19: step `tune`, `model`: `align` is neither a step before this one nor a folder; no step comes before this one",
    ),
    (
        "checkpoint not kept",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {updates: 10, keep: [5]}
  - align: {model: tune@6}
""",
        (),
        "recipe.yaml:5:20: step `align`, `model`: `tune` keeps no checkpoint 6; there is `5`",
    ),
    (
        "no checkpoints",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {updates: 10}
  - align: {model: tune@5}
""",
        (),
        "recipe.yaml:5:20: step `align`, `model`: `tune` keeps no checkpoints; add `keep: [5]` to it",
    ),
    (
        "model missing",
        """\
data: rows.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:3:5: step `tune`, `model`: the recipe has no `model:` of its own; add one, or name a step",
    ),
    (
        "data missing",
        """\
model: house:lm
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:3:5: step `tune`, `data`: the recipe has no `data:` of its own; add one, or name a file here",
    ),
    (
        "unknown house model",
        """\
model: house:ln
data: rows.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:1:8: `model`: no house model `house:ln`; did you mean `house:lm`?",
    ),
    (
        "unknown house data",
        """\
model: house:lm
data: house:libary
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:2:7: `data`: no house data `libary`; did you mean `library`?",
    ),
    (
        "unknown task",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {data: 'task:sort-word'}
""",
        (),
        "recipe.yaml:4:18: step `tune`, `data`: slot `task` has no part `sort-word`; did you mean `sort-words`?",
    ),
    (
        "no such file",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {data: row.jsonl}
""",
        (),
        'recipe.yaml:4:18: step `tune`, `data`: no file or folder "row.jsonl"; did you mean `rows.jsonl`?; data are a path (relative to the recipe), `hub:owner/name`, `house:NAME` or `task:NAME`',
    ),
    (
        "unknown setting of a source",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune:
      data: {file: {path: rows.jsonl, holdoot: 0.1}}
""",
        (),
        "recipe.yaml:5:48: step `tune`, `data.file.holdoot`: part `file` has no setting `holdoot`; did you mean `holdout`?",
    ),
    (
        "list of models where one goes",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {model: [house:lm, house:lm]}
""",
        (),
        "recipe.yaml:4:12: step `tune`, `model`: `model` takes one, not a list",
    ),
    (
        "number as model",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {model: 3}
""",
        (),
        "recipe.yaml:4:19: step `tune`, `model`: 3: name a step, a folder, a hub model or house:lm",
    ),
    (
        "two steps of one name",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
  - tune: {}
""",
        (),
        "recipe.yaml:5:5: step `tune`: two steps are called `tune`; give this one a `name:`",
    ),
    (
        "reserved name",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {name: last}
""",
        (),
        'recipe.yaml:4:18: step `last`, `name`: "last": a step\'s name has letters, digits, dots and hyphens, and is none of last, model, data, house',
    ),
    (
        "repeat without times",
        """\
data: rows.jsonl
model: house:lm
steps:
  - repeat: {steps: [tune]}
""",
        (),
        "recipe.yaml:4:5: null: `times` is a whole number above 0, the most repetitions",
    ),
    (
        "repeat times 0",
        """\
data: rows.jsonl
model: house:lm
steps:
  - repeat: {times: 0, steps: [tune]}
""",
        (),
        "recipe.yaml:4:21: `times`: 0: `times` is a whole number above 0, the most repetitions",
    ),
    (
        "repeat without steps",
        """\
data: rows.jsonl
model: house:lm
steps:
  - repeat: {times: 2}
""",
        (),
        "recipe.yaml:4:5: `repeat` needs `steps:`, a list of at least one step",
    ),
    (
        "repeat unknown key",
        """\
data: rows.jsonl
model: house:lm
steps:
  - repeat: {time: 2, steps: [tune]}
""",
        (),
        "recipe.yaml:4:20: `time`: `repeat` has no key `time`; did you mean `times`?",
    ),
    (
        "bad until",
        """\
data: rows.jsonl
model: house:lm
steps:
  - repeat: {times: 2, until: soon, steps: [tune]}
""",
        (),
        'recipe.yaml:4:31: `until`: "soon": write `until: step.figure >= number`',
    ),
    (
        "until of no step",
        """\
data: rows.jsonl
model: house:lm
steps:
  - repeat: {times: 2, until: evalute.accuracy > 0.5, steps: [tune, evaluate]}
""",
        (),
        "recipe.yaml:4:31: `until`: `evalute` is neither a step before this one nor a folder; did you mean `evaluate`?",
    ),
    (
        "repeat in repeat",
        """\
data: rows.jsonl
model: house:lm
steps:
  - repeat: {times: 2, steps: [{repeat: {times: 2, steps: [tune]}}]}
""",
        (),
        "recipe.yaml:4:33: `repeat` does not stand in a `repeat`; give one of them more times",
    ),
    (
        "each over nothing",
        """\
data: rows.jsonl
model: house:lm
steps:
  - each: {over: [], steps: [tune]}
""",
        (),
        "recipe.yaml:4:12: `over`: `over` is empty; name at least one item",
    ),
    (
        "each over a number",
        """\
data: rows.jsonl
model: house:lm
steps:
  - each: {over: 3, steps: [tune]}
""",
        (),
        "recipe.yaml:4:18: `over`: 3: `over` is a list of words or numbers, or a mapping of names to values",
    ),
    (
        "each item twice",
        """\
data: rows.jsonl
model: house:lm
steps:
  - each: {over: [a, a], steps: [tune]}
""",
        (),
        'recipe.yaml:4:12: `over`: ["a", "a"]: an item stands twice',
    ),
    (
        "last after each",
        """\
data: rows.jsonl
model: house:lm
steps:
  - each: {over: [a, b], steps: [tune]}
  - align: {}
""",
        (),
        "recipe.yaml:5:5: step `align`, `model`: `last` has branches here; name one, such as `tune[b]`",
    ),
    (
        "branch not named",
        """\
data: rows.jsonl
model: house:lm
steps:
  - each: {over: [a, b], steps: [tune]}
  - align: {model: tune}
""",
        (),
        "recipe.yaml:5:20: step `align`, `model`: `tune` has branches; write `tune[a]` or `tune[b]`",
    ),
    (
        "unknown branch",
        """\
data: rows.jsonl
model: house:lm
steps:
  - each: {over: [a, b], steps: [tune]}
  - align: {model: 'tune[c]'}
""",
        (),
        "recipe.yaml:5:20: step `align`, `model`: `tune[c]` is neither a step before this one nor a folder; did you mean `tune[b]`?",
    ),
    (
        "set without equals",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
""",
        ("tune.epochs",),
        '--set: "tune.epochs": write step.key=value, or key=value for the recipe\'s own keys',
    ),
    (
        "set unknown step",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
""",
        ("tone.epochs=3",),
        "--set: no step `tone`; did you mean `tune`?",
    ),
    (
        "set unknown top key",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
""",
        ("sed=3",),
        "--set: no key `sed` in a recipe; did you mean `seed`?",
    ),
    (
        "set bad value",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
""",
        ("tune.epochs=many",),
        '--set: step `tune`, `epochs`: "many": a number is asked for',
    ),
    (
        "set unknown setting",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {}
""",
        ("tune.delta.lora.rnak=4",),
        "--set: step `tune`, `delta.lora.rnak`: part `lora` has no setting `rnak`; did you mean `rank`?",
    ),
    (
        "quantize bits",
        """\
data: rows.jsonl
model: house:lm
steps:
  - quantize: {grid: {integer: {bits: 40}}}
""",
        (),
        "recipe.yaml:4:39: step `quantize`, `grid.integer.bits`: 40: must be at most 8",
    ),
    (
        "metric twice",
        """\
data: rows.jsonl
model: house:lm
steps:
  - evaluate: {metric: [acuracy]}
""",
        (),
        "recipe.yaml:4:25: step `evaluate`, `metric`: slot `metric` has no part `acuracy`; did you mean `accuracy`?",
    ),
    (
        "aim",
        """\
data: rows.jsonl
model: house:lm
steps:
  - tune: {aim: 3}
""",
        (),
        "recipe.yaml:4:17: step `tune`, `aim`: 3: `aim` is a list of figures' names",
    ),
]

# found by `temper check`, from the inputs and their passports
CHECKING: list[tuple[str, str, tuple[str, ...], str]] = [
    (
        "figures as a model",
        """\
model: tiny
data: ask.jsonl
steps:
  - evaluate: {name: figs, method: answers}
  - tune: {model: figs}
""",
        (),
        "recipe.yaml:5:19: step `tune`, `model`: takes `model` or `adapter`; what is given is `figures`",
    ),
    (
        "preference rows to tune",
        """\
model: tiny
data: pairs.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`, `data`: takes `text` or `completion` or `chat`; pairs.jsonl is `preference`",
    ),
    (
        "completion rows to dpo",
        """\
model: tiny
data: ask.jsonl
steps:
  - align: {method: dpo}
""",
        (),
        "recipe.yaml:4:5: step `align`, `source`: takes preference rows; ask.jsonl holds completion rows: give such rows, or write `source: attempts`",
    ),
    (
        "pairs to attempts",
        """\
model: tiny
data: pairs.jsonl
steps:
  - align: {method: checked-dpo}
""",
        (),
        "recipe.yaml:4:5: step `align`, `source`: takes completion or chat rows; pairs.jsonl holds preference rows: give such rows, or write `source: given`",
    ),
    (
        "text to attempts",
        """\
model: tiny
data: text.jsonl
steps:
  - align: {method: checked-dpo}
""",
        (),
        "recipe.yaml:4:5: step `align`, `data`: takes `preference` or `completion` or `chat`; text.jsonl is `text`",
    ),
    (
        "accuracy of text",
        """\
model: tiny
data: text.jsonl
steps:
  - evaluate: {method: accuracy}
""",
        (),
        "recipe.yaml:4:5: step `evaluate`, `metric`: `accuracy` needs questions and `text` data ask nothing; give completion or chat rows, or measure perplexity",
    ),
    (
        "chat without a template",
        """\
model: untemplated
data: chat.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`, `data`: chats need a chat template and the model's tokenizer has none; put a chat_template.jinja into the model's folder, or give rows with `prompt` and `completion`",
    ),
    (
        "chat without a template, measured",
        """\
model: untemplated
data: chat.jsonl
steps:
  - evaluate: {}
""",
        (),
        "recipe.yaml:4:5: step `evaluate`, `model`: untemplated has no chat template, and the data are chats; give rows with `prompt` and `completion` as texts, or put a chat_template.jinja into the model's folder",
    ),
    (
        "chat without a template, aligned",
        """\
model: untemplated
data: chat.jsonl
steps:
  - align: {method: checked-dpo}
""",
        (),
        "recipe.yaml:4:5: step `align`, `data`: chats need a chat template and the model's tokenizer has none; put a chat_template.jinja into the model's folder, or give rows with `prompt` and `completion`",
    ),
    (
        "no supervised token",
        """\
model: tiny
data: mute.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`: mute.jsonl: none of its 57 chat rows holds a supervised token; raise max_length, or give conversations with assistant turns",
    ),
    (
        "column misspelt",
        """\
model: tiny
data: typo.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`, `data`: typo.jsonl has the columns `promt`, `completion`, which make no shape (text: text · completion: prompt, completion · chat: messages · preference: prompt, chosen, rejected); did you mean `prompt`?; rename with `columns: {wanted: present}`",
    ),
    (
        "column missing in a row",
        """\
model: tiny
data: hole.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`, `data`: hole.jsonl, line 7: no column `completion`, which completion rows need; it has the columns `prompt`",
    ),
    (
        "number in a text column",
        """\
model: tiny
data: number.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`, `data`: number.jsonl, line 1, column `completion`: 0; a text or a list of messages is asked for",
    ),
    (
        "torn line",
        """\
model: tiny
data: torn.jsonl
steps:
  - tune: {}
""",
        (),
        'recipe.yaml:4:5: step `tune`, `data`: torn.jsonl, line 2: not JSON (Unterminated string starting at at column 17): "{"prompt": "a", "compl"',
    ),
    (
        "empty file",
        """\
model: tiny
data: empty.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`, `data`: empty.jsonl has no rows; at least one is needed",
    ),
    (
        "pickled weights",
        """\
model: weights
data: ask.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`: FOLDER/weights holds pickled weights alone (pytorch_model.bin), and reading a pickle can run any code; choose a revision with safetensors, or convert it where that is safe: load it with transformers and `save_pretrained`",
    ),
    (
        "empty folder",
        """\
model: nothing
data: ask.jsonl
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:4:5: step `tune`: FOLDER/nothing holds neither `config.json` nor `adapter_config.json`",
    ),
    (
        "gptq without data",
        """\
model: tiny
steps:
  - quantize: {method: gptq}
""",
        (),
        "recipe.yaml:3:5: step `quantize`, `data`: calibrate `samples` needs data; give the step `data`, or the recipe a `data:` of its own",
    ),
    (
        "gptq without calibration",
        """\
model: tiny
data: text.jsonl
steps:
  - quantize: {method: gptq, calibrate: none}
""",
        (),
        "recipe.yaml:4:5: step `quantize`, `objective`: the part in slot `objective` needs `inputs`, which no other part gives",
    ),
    (
        "quantised twice",
        """\
model: tiny
data: text.jsonl
steps:
  - quantize: {name: one}
  - quantize: {name: two}
""",
        (),
        "recipe.yaml:5:5: step `two`, `model`: the model is int4-g32-sym already; quantise the model that it was made from",
    ),
    (
        "full on an adapter",
        """\
model: tiny
data: ask.jsonl
steps:
  - tune: {method: lora}
  - align: {method: checked-dpo, delta: full}
""",
        (),
        "recipe.yaml:5:5: step `align`, `base`: an adapter comes in, and delta `full` trains the weights under it; write `base: merged`",
    ),
    (
        "adapter into pretraining",
        """\
model: tiny
data: text.jsonl
steps:
  - tune: {}
  - pretrain: {model: tune}
""",
        (),
        "recipe.yaml:5:23: step `pretrain`, `model`: takes `model`; what is given is `adapter`",
    ),
    (
        "merged on a quantised base",
        """\
model: tiny
data: text.jsonl
steps:
  - quantize: {}
  - tune: {}
  - tune: {name: more, base: merged}
""",
        (),
        "recipe.yaml:6:30: step `more`, `base`: merging an adapter into int4-g32-sym weights would leave their grid; let it go on (`base: as-loaded`), or merge it before quantising",
    ),
    (
        "derive of a task without words",
        """\
model: tiny
data: {derive: {task: arithmetic, source: text.jsonl}}
steps:
  - tune: {}
""",
        (),
        "recipe.yaml:2:8: `data.derive`: task `arithmetic` asks nothing about words; there is `reverse-letters` · `reverse-words` · `sort-letters` · `sort-words`",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Path, untemplated: Path) -> Path:
    """Rows with every fault that a check should find, and models beside them."""
    made = tmp_path_factory.mktemp("recipes")

    def rows(name: str, made_of: list[dict]) -> None:
        (made / name).write_text("".join(json.dumps(row) + "\n" for row in made_of))

    sixty = range(60)
    rows("rows.jsonl", [{"prompt": f"p{i}", "completion": f" c{i}"} for i in range(40)])
    rows("ask.jsonl", [{"prompt": f"sort {i} =", "completion": f" {i}"} for i in sixty])
    rows("chat.jsonl", [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in sixty])
    rows("mute.jsonl", [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in sixty])
    rows("pairs.jsonl", [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in sixty])
    rows("text.jsonl", [{"text": f"def f{i}(): pass"} for i in sixty])
    rows("typo.jsonl", [{"promt": f"p{i}", "completion": " c"} for i in sixty])
    rows("hole.jsonl", [{"prompt": f"p{i}", **({"completion": " c"} if i != 6 else {})} for i in sixty])
    rows("number.jsonl", [{"prompt": f"p{i}", "completion": i} for i in sixty])
    (made / "torn.jsonl").write_text('{"prompt": "a", "completion": " b"}\n{"prompt": "a", "compl\n')
    (made / "empty.jsonl").write_text("")
    (made / "mine.py").write_text("def weigh(x):\n    return x\n")
    (made / "broken.py").write_text("import nothing_of_the_kind\n")
    (made / "weights").mkdir()
    (made / "weights" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (made / "weights" / "pytorch_model.bin").write_bytes(b"x")
    (made / "nothing").mkdir()
    (made / "tiny").symlink_to(tiny)
    (made / "untemplated").symlink_to(untemplated)
    return made


@pytest.mark.parametrize(("text", "sets", "message"), [one[1:] for one in READING], ids=[one[0] for one in READING])
def test_a_bad_recipe_is_refused_when_read(text, sets, message, folder, monkeypatch):
    monkeypatch.delenv("TEMPER_TEST_NOT_SET", raising=False)
    with pytest.raises(Problem) as caught:
        read(text, "recipe.yaml", folder, sets)
    assert str(caught.value).replace(str(folder), "FOLDER") == message


@pytest.mark.parametrize(("text", "sets", "message"), [one[1:] for one in CHECKING], ids=[one[0] for one in CHECKING])
def test_a_bad_recipe_is_refused_when_checked(text, sets, message, folder):
    with pytest.raises(Problem) as caught:
        check(read(text, "recipe.yaml", folder, sets), Store(folder / "store"))
    assert str(caught.value).replace(str(folder), "FOLDER") == message


def test_there_are_enough_of_them():
    assert len(READING) + len(CHECKING) >= 60
