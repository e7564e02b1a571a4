"""The model families that hybridize converts; one adapter and one line each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from hybridize.errors import FamilyError
from hybridize.families.base import AttentionGeometry, AttentionView, FamilyAdapter

FAMILIES: dict[str, str] = {
    "llama": "hybridize.families.llama",
    "qwen2": "hybridize.families.qwen2",
    "qwen3": "hybridize.families.qwen3",
    "mistral": "hybridize.families.mistral",
}
"""model_type in config.json -> module that holds its ADAPTER."""


def family(model_type: str) -> FamilyAdapter:
    """The adapter of a model type; a hybrid's own type (`hybridize_llama`) gives its base family.

    Raises:
        FamilyError: the family is not supported; the message lists those that are.
    """
    module = FAMILIES.get(model_type.removeprefix("hybridize_"))
    if module is None:
        raise FamilyError(
            f"the model family {model_type!r} is not supported.",
            where="config.json: model_type",
            hint=f"Supported: {', '.join(FAMILIES)}. CONTRIBUTING.md shows how to add one (an adapter and a line).",
        )
    adapter: FamilyAdapter = importlib.import_module(module).ADAPTER
    return adapter


def family_of_config(config: Mapping[str, Any]) -> tuple[FamilyAdapter, AttentionGeometry]:
    """Adapter and sizes for a parsed config.json.

    Raises:
        FamilyError: unsupported family, unreadable sizes, or a feature that would be converted wrongly.
    """
    adapter = family(str(config.get("model_type", "")))
    refusals = adapter.refusals(config)
    if refusals:
        raise FamilyError(refusals[0], where="config.json", hint="This checkpoint cannot be converted yet.")
    return adapter, adapter.geometry(config)


__all__ = ["FAMILIES", "AttentionGeometry", "AttentionView", "FamilyAdapter", "family", "family_of_config"]
