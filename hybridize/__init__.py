"""hybridize: pretrained Transformers into hybrids.

The verbs of the command line are also functions of the same names (`from hybridize.plan import plan` for the first).
They are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = {
    "convert": "hybridize.model.convert",
    "register": "hybridize.model.register",
    "distill": "hybridize.distillation.run",
    "export": "hybridize.model.export",
    "evaluate": "hybridize.evaluation.runner",
}

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
