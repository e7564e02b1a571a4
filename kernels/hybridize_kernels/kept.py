"""Tables on the device that calls of the same sizes, or with the same tensor of bounds, make once and share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .dispatch import current_stream, is_capturing

Tables = TypeVar("Tables")


def tables_of_sizes(make: Callable[..., Tables], device: torch.device, *sizes: int | None) -> Tables:
    """`make(device, *sizes)`, from memory where it has been made."""
    key = (make, device, *sizes)
    of_streams = _of_streams(key)
    if not is_capturing(device):
        stream = current_stream(device)
        if stream not in of_streams:
            of_streams[stream] = make(device, *sizes)
        return of_streams[stream]  # type: ignore[no-any-return]
    # A graph reads its tables for as long as it lives, so none that it was given is ever dropped. What was queued
    # before a capture is done when the graph is replayed; what is captured is not: nobody else may be given it.
    if key not in _captured:
        if not of_streams:
            return make(device, *sizes)
        _captured[key] = next(iter(of_streams.values()))
    return _captured[key]  # type: ignore[no-any-return]


def tables_of_bounds(make: Callable[..., Tables], bounds: Tensor, device: torch.device, *sizes: int | None) -> Tables:
    """`make(bounds, device, *sizes)`, from memory where it has been made: a model's layers all have the same tensor."""
    # A graph follows the bounds that it is replayed with. Nobody counts the changes of an inference tensor.
    if is_capturing(device) or bounds.is_inference():
        return make(bounds, device, *sizes)
    known: dict[tuple[Any, ...], Tables] = _known.setdefault(bounds, {})
    key = (make, bounds._version, device, *sizes, current_stream(device))
    if key not in known:
        for old in [other for other in known if other[1] != bounds._version]:
            del known[old]
        known[key] = make(bounds, device, *sizes)
    return known[key]


@lru_cache(maxsize=512)
def _of_streams(key: tuple[Any, ...]) -> dict[int, Any]:
    """Tables by the stream they were made on: another would not wait for them."""
    return {}


_captured: dict[tuple[Any, ...], Any] = {}
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
