"""All of a call but its tensors, worked out once for calls that agree in it.

Sizes, strides, tiles and the arguments of every launch follow from a few numbers; a training step of a short text would
else spend longer on working them out than in the kernels.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch

from ..dispatch import is_hopper, is_nvidia
from .backward import BackwardPlan
from .forward import Strides, forward_launch
from .layout import Geometry
from .lists import ListPlan
from .tiles import VARIABLE, tiles_for

CHUNK = 512
LONG_CHUNK = 1024
LONG = 8192
"""Query rows that share a list of retained keys under a cap: a shorter chunk has fewer entries that only some of its
queries see, a longer one fewer partial gradients. From LONG tokens on few entries change in a chunk."""

MOST = 512
"""Plans kept; texts of ever new lengths make ever new ones."""


class PlanKey(NamedTuple):
    """What a plan depends on.

    Attributes:
        geometry: sizes. dtype, strides: of q, k and v.
        score_strides, score_dtype: of the scores that the lists are made of; None: sinks only.
        sinks, budget: as in retained_attention. scale: on q·k.
        device: index of the GPU, −1 for the CPU. tiles: the override of the table of tiles.
    """

    geometry: Geometry
    dtype: torch.dtype
    strides: tuple[Strides, Strides, Strides]
    score_strides: tuple[int, ...] | None
    score_dtype: torch.dtype | None
    sinks: int
    budget: int | None
    scale: float
    device: int
    tiles: str | None


class Plan:
    """The lists and kernels of calls with the same key.

    Attributes:
        lists: None where nothing can be retained: all lies in the window.
    """

    def __init__(self, key: PlanKey) -> None:
        geometry, self._key = key.geometry, key
        self.tiles = tiles_for(geometry.head_size, geometry.group, key.dtype, key.tiles)
        self.lists: ListPlan | None = None
        some = (key.score_strides is not None or key.sinks > 0) and key.budget != 0
        if some and (geometry.prefix > 0 or geometry.window < geometry.keys):
            block = self.tiles.forward.rows // geometry.group
            chunk = max(1, (CHUNK if geometry.time <= LONG else LONG_CHUNK) // block) * block
            self.lists = ListPlan(
                geometry, key.score_strides, sinks=key.sinks, budget=key.budget, block=block, chunk=chunk
            )
        self.forward = forward_launch(
            geometry,
            self.lists,
            key.dtype,
            key.strides,
            key.scale,
            self.tiles.forward,
            on_nvidia=key.device >= 0 and is_nvidia(),
            on_hopper=is_hopper(key.device),
        )
        self._backward: dict[tuple[object, ...], BackwardPlan] = {}

    def backward(
        self,
        d_output_strides: Strides,
        score_strides: tuple[int, ...] | None,
        score_dtype: torch.dtype | None,
        has_d_log_sum_exp: bool,
    ) -> BackwardPlan:
        """The kernels of the backward pass; the strides and dtype are those of the scores that get a gradient."""
        index = (d_output_strides, score_strides, score_dtype, has_d_log_sum_exp)
        plan = self._backward.get(index)
        if plan is None:
            if len(self._backward) >= MOST:
                self._backward.clear()
            plan = self._backward[index] = BackwardPlan(
                self._key.geometry,
                self.lists,
                self._key.dtype,
                (*self._key.strides, d_output_strides),
                score_strides,
                self._key.scale,
                self.tiles,
                has_d_log_sum_exp=has_d_log_sum_exp,
            )
        return plan


plan_of = lru_cache(maxsize=MOST)(Plan)
"""The plan of a key, from memory where it has been made."""


def tiles_override() -> str | None:
    """The environment's table of tiles, a part of every key."""
    return os.environ.get(VARIABLE)
