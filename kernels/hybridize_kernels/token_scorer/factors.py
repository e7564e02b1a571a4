"""The weights of the scorer's convolutions as its kernels read them, made of all layers in one launch.

The kernels multiply numbers of the products' type, and the gradient of a layer's inputs reads each tap's matrix with
its sides exchanged: the channels that are summed over lie along the rows of a product's right factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

BLOCK = 64
"""Sides of a tile; every layer begins at a multiple of it, so that its numbers are as aligned as a tensor's own."""

TOGETHER = 4
"""Layers of a launch: the pointers of a kernel have fixed places."""


class Shape(NamedTuple):
    """Of one layer's weight `[H or 1, kernel · C, C']`: how many matrices `[C, C']` it has, and their sides."""

    matrices: int
    inputs: int
    outputs: int

    @property
    def tiles(self) -> int:
        """Programs that prepare it."""
        return int(self.matrices * triton.cdiv(self.inputs, BLOCK) * triton.cdiv(self.outputs, BLOCK))


class Factors(NamedTuple):
    """Of each layer, in the type of the products: `plain`, in the order of the weight `[H or 1, kernel, C, C']`, and
    `turned`, of `[H or 1, kernel, C', C]`; each may have more numbers behind them. `turned` may be left out."""

    plain: Sequence[Tensor]
    turned: Sequence[Tensor]


def prepare(shapes: tuple[Shape, ...], weights: Sequence[Tensor], dtype: torch.dtype, *, turned: bool) -> Tensor:
    """The numbers of `Factors`, side by side; `parts_of` takes them apart."""
    sizes = _sizes(shapes)
    total = sum(sizes)
    prepared = torch.empty((1 + turned) * total, dtype=dtype, device=weights[0].device)
    for first in range(0, len(shapes), TOGETHER):
        given = [x.contiguous() for x in weights[first : first + TOGETHER]]
        grid, constants = _launch_of(shapes, first, total if turned else 0)
        launch(_prepare_kernel, grid, (*given, *given[:1] * (TOGETHER - len(given)), prepared), (), **constants)
    return prepared


def parts_of(shapes: tuple[Shape, ...], prepared: Tensor) -> Factors:
    """What `prepare` laid side by side."""
    sizes = _sizes(shapes)
    turned = prepared.numel() > sum(sizes)
    parts = prepared.split([*sizes, *sizes] if turned else [*sizes])
    return Factors(parts[: len(sizes)], parts[len(sizes) :])


@lru_cache(maxsize=256)
def _sizes(shapes: tuple[Shape, ...]) -> tuple[int, ...]:
    return tuple(triton.cdiv(s.matrices * s.inputs * s.outputs, BLOCK) * BLOCK for s in shapes)


@lru_cache(maxsize=256)
def _launch_of(shapes: tuple[Shape, ...], first: int, total: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants for the layers from `first` on, as many as a launch takes; total: see the kernel's TURNED."""
    taken = shapes[first : first + TOGETHER]
    constants = {"MATRICES": taken[0].matrices, "LAYERS": len(taken), "TURNED": total, "BLOCK": BLOCK}
    for n in range(TOGETHER):
        shape = taken[n] if n < len(taken) else Shape(0, 1, 1)
        constants |= {f"C{n}": shape.inputs, f"N{n}": shape.outputs, f"START{n}": sum(_sizes(shapes)[: first + n])}
    return (sum(shape.tiles for shape in taken),), constants


@triton.jit  # type: ignore[untyped-decorator]
def _prepare_layer(
    tile,
    w_ptr,  # [MATRICES, C, N]
    out_ptr,  # the same numbers, and TURNED numbers further on [MATRICES, N, C]
    MATRICES: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Does nothing unless the tile is one of this layer's; returns its number counted from the next layer on."""
    blocks_c: tl.constexpr = (C + BLOCK - 1) // BLOCK
    blocks_n: tl.constexpr = (N + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = MATRICES * blocks_c * blocks_n
    if (tile >= 0) & (tile < tiles):
        first = (tile // (blocks_c * blocks_n)).to(tl.int64) * (C * N)
        rows = (tile // blocks_n % blocks_c * BLOCK + tl.arange(0, BLOCK))[:, None]
        columns = (tile % blocks_n * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = (rows < C) & (columns < N)
        w = tl.load(w_ptr + first + (rows * N + columns), mask=inside).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + first + (rows * N + columns), w, mask=inside)
        if TURNED > 0:
            tl.store(out_ptr + TURNED + first + (columns * C + rows), w, mask=inside)
    return tile - tiles


@triton.jit  # type: ignore[untyped-decorator]
def _prepare_kernel(
    w0_ptr,  # [MATRICES, C0, N0]
    w1_ptr,
    w2_ptr,
    w3_ptr,
    out_ptr,
    C0: tl.constexpr,
    N0: tl.constexpr,
    START0: tl.constexpr,
    C1: tl.constexpr,
    N1: tl.constexpr,
    START1: tl.constexpr,
    C2: tl.constexpr,
    N2: tl.constexpr,
    START2: tl.constexpr,
    C3: tl.constexpr,
    N3: tl.constexpr,
    START3: tl.constexpr,
    MATRICES: tl.constexpr,
    LAYERS: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = _prepare_layer(tl.program_id(0), w0_ptr, out_ptr + START0, MATRICES, C0, N0, TURNED, BLOCK)
    if LAYERS > 1:
        tile = _prepare_layer(tile, w1_ptr, out_ptr + START1, MATRICES, C1, N1, TURNED, BLOCK)
    if LAYERS > 2:
        tile = _prepare_layer(tile, w2_ptr, out_ptr + START2, MATRICES, C2, N2, TURNED, BLOCK)
    if LAYERS > 3:
        _prepare_layer(tile, w3_ptr, out_ptr + START3, MATRICES, C3, N3, TURNED, BLOCK)
