"""Tiles of heads and of states, to registers and back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def head_of(ptr, token, heads, head, SIZE: tl.constexpr):
    """Where a head of this token begins in `[B·T, heads, SIZE]`.

    What follows from there is 32 bits wide: 64-bit offsets of whole tiles would fill the registers.
    """
    return ptr + (token.to(tl.int64) * heads + head) * SIZE


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(base, row, column, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix with `SIZE` columns side by side; columns beyond them are 0."""
    if PADDED:
        tile = tl.load(base + (row[:, None] + column[None, :]), mask=column[None, :] < SIZE, other=0.0)
    else:
        tile = tl.load(base + (row[:, None] + column[None, :]))
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def load_columns(base, column, value, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """These value columns of a state `[K, V]`; 0 beyond it."""
    if (K == BK) & (V % BV == 0):
        tile = tl.load(base + (column[:, None] * V + value[None, :]))
    else:
        inside = (column[:, None] < K) & (value[None, :] < V)
        tile = tl.load(base + (column[:, None] * V + value[None, :]), mask=inside, other=0.0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def store_columns(base, state, column, value, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The other way round."""
    if (K == BK) & (V % BV == 0):
        tl.store(base + (column[:, None] * V + value[None, :]), state)
    else:
        inside = (column[:, None] < K) & (value[None, :] < V)
        tl.store(base + (column[:, None] * V + value[None, :]), state, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def read_state(
    ptr, index, heads, head, column, value, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Value columns of a head's state in `[*, heads, K, V]`, in fp32; zeros where the index is negative."""
    state = tl.zeros([BK, BV], dtype=tl.float32)
    if index >= 0:
        base = ptr + (index * heads + head).to(tl.int64) * (K * V)
        state = load_columns(base, column, value, K, V, BK, BV).to(tl.float32)
    return state


@triton.jit  # type: ignore[untyped-decorator]
def write_state(
    ptr, index, heads, head, state, column, value, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """The other way round; nothing is written where the index is negative."""
    if index >= 0:
        base = ptr + (index * heads + head).to(tl.int64) * (K * V)
        store_columns(base, state, column, value, K, V, BK, BV)


@triton.jit  # type: ignore[untyped-decorator]
def segment_row(segments_ptr, segment):
    """A row of `Tables.segments`."""
    row = segments_ptr + segment * 6
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)


@triton.jit  # type: ignore[untyped-decorator]
def load_square(ptr, tile, place, C: tl.constexpr):
    """A chunk's matrix in `[NC, HS, C, C]`."""
    return tl.load(ptr + tile * (C * C) + (place[:, None] * C + place[None, :]))
