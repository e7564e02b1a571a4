"""What models are called in a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def model_name(model: Mapping[str, Any]) -> str:
    """The last part of the folder's name that tells one model from another: "demo" of runs/demo/export."""
    parts = _parts(model)
    return parts[-2] if len(parts) > 1 and parts[-1] == "export" else parts[-1]


def distinct_names(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each of several models; those that share one are told apart by their folders, else by numbers."""
    names = [model_name(model) for model in models]
    for name in [name for name, count in Counter(names).items() if count > 1]:
        same = [i for i, other in enumerate(names) if other == name]
        longer = ["/".join(_parts(models[i])[-3:]) for i in same]
        for number, (i, path) in enumerate(zip(same, longer, strict=True), 1):
            names[i] = path if len(set(longer)) == len(longer) else f"{name} ({number})"
    return names


def _parts(model: Mapping[str, Any]) -> list[str]:
    return [part for part in str(model["spec"]).split("/") if part] or ["model"]
