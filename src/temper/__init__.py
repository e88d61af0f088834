"""Temper: one toolkit for everything done to a model between its initialisation and its use.

    import temper
    tuned = temper.tune("house:lm", "rows.jsonl", method="lora", epochs=2)
    print(temper.evaluate(tuned.last.model, "rows.jsonl").last.figures)
    temper.run(temper.load("recipe.yaml"))

Every engine is a function here; `temper.engines()` lists them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_HOME = {"Problem": "parts", "engines": "parts", "load": "recipe", "Store": "store", "Context": "context"}


class _Callable(ModuleType):
    """A module that is also the function a user expects: `temper.run(plan)`, `temper.tune(model, data)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        if name in importlib.import_module("temper.parts").engines():
            return importlib.import_module("temper.run").one_step(name, *args, **kwargs)
        return getattr(self, name)(*args, **kwargs)


class _Package(ModuleType):
    """Python sets a submodule as an attribute of its package when it is imported; here it becomes callable on the way."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == f"temper.{name}":
            value.__class__ = _Callable
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Names are looked up when first asked for, so that `import temper` costs nothing."""
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("temper-ml")
        if name in _HOME:
            return getattr(importlib.import_module(f"temper.{_HOME[name]}"), name)
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"temper.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"temper.{name}":
                    raise
        raise AttributeError(f"module temper has no attribute {name}")

    def __dir__(self) -> list[str]:
        engines = importlib.import_module("temper.parts").engines()
        return sorted([*_HOME, *engines, "run", "recipe", "__version__"])


sys.modules[__name__].__class__ = _Package
