"""Heavy libraries, imported when first touched.

Recipes are checked, keys computed and `--help` printed without torch. A module that holds parts writes
`from temper.lazy import torch` and may use it inside functions only; a test asserts that importing any
such module leaves torch unloaded. Classes that derive from `torch.nn.Module` live in modules without parts.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets as datasets
    import numpy as numpy
    import peft as peft
    import safetensors.torch as safetensors_torch
    import tokenizers as tokenizers
    import torch as torch
    import torch.nn.functional as F
    import transformers as transformers
    from torch import nn as nn
else:

    class _Lazy(ModuleType):
        """A module that imports itself at the first attribute asked of it."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") and name.endswith("__"):
                raise AttributeError(name)  # introspection (pydantic, pickle, doctest) must not trigger an import
            return getattr(sys.modules.get(self.__name__) or importlib.import_module(self.__name__), name)

    datasets = _Lazy("datasets")
    numpy = _Lazy("numpy")
    peft = _Lazy("peft")
    safetensors_torch = _Lazy("safetensors.torch")
    tokenizers = _Lazy("tokenizers")
    torch = _Lazy("torch")
    nn = _Lazy("torch.nn")
    F = _Lazy("torch.nn.functional")
    transformers = _Lazy("transformers")

__all__ = ["F", "datasets", "nn", "numpy", "peft", "safetensors_torch", "tokenizers", "torch", "transformers"]
