"""The mixers: one line each. Names are resolved late, so that a plan needs no torch."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridize.errors import RecipeError
from hybridize.mixers.configs.base import MixerConfig

if TYPE_CHECKING:
    from hybridize.mixers.base import Mixer


class Entry(NamedTuple):
    """Class names of a mixer; its modules are `hybridize.mixers.configs.<name>` and `hybridize.mixers.<name>`."""

    config_class: str
    mixer_class: str | None
    """None: the teacher's layer stays."""


MIXERS: dict[str, Entry] = {
    "full_attention": Entry("FullAttentionConfig", None),
    "sliding_window": Entry("SlidingWindowConfig", "SlidingWindow"),
    "token_eviction": Entry("TokenEvictionConfig", "TokenEviction"),
    "gated_delta_net": Entry("GatedDeltaNetConfig", "GatedDeltaNet"),
    "native_sparse_attention": Entry("NativeSparseAttentionConfig", "NativeSparseAttention"),
}


def _entry(name: str) -> Entry:
    if name not in MIXERS:
        raise RecipeError(f"unknown mixer {name!r}.", where="mixer", hint=f"Known: {', '.join(MIXERS)}.")
    return MIXERS[name]


def config_class(name: str) -> type[MixerConfig]:
    """The configuration class of a mixer (torch-free)."""
    entry = _entry(name)
    module = importlib.import_module(f"hybridize.mixers.configs.{name}")
    return getattr(module, entry.config_class)  # type: ignore[no-any-return]


def mixer_class(name: str) -> type[Mixer] | None:
    """The module class of a mixer; None for `full_attention`, which keeps the teacher's layer."""
    entry = _entry(name)
    if entry.mixer_class is None:
        return None
    module = importlib.import_module(f"hybridize.mixers.{name}")
    return getattr(module, entry.mixer_class)  # type: ignore[no-any-return]


def config_from_dict(values: Mapping[str, Any]) -> MixerConfig:
    """The inverse of `MixerConfig.to_dict`.

    Raises:
        RecipeError: unknown mixer or key, or a value out of range.
    """
    options = dict(values)
    cls = config_class(str(options.pop("mixer", "")))
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(
            f"unknown key {unknown[0]!r}.", where=cls.name, hint=f"Known: {', '.join(sorted(known)) or 'none'}."
        )
    return cls(**options)
