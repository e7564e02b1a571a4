"""Rotary position embedding inside of another kernel, as queries and keys are loaded.

There the numbers of a head lie side by side, not in pairs: the partner of each is read from the head once more, by then
from the processor's cache. What comes out equals what `kernel.py` stores, up to the last bit before it is rounded: the
compiler decides which of the two products is fused with their sum.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Tables(NamedTuple):
    """cos and sin, how far apart the rows and the tokens of either lie, and R; R = 0: nothing is rotated."""

    cos: Tensor
    sin: Tensor
    row: int
    token: int
    size: int


def tables_of(rotary: tuple[Tensor, Tensor] | None, absent: Tensor) -> Tables:
    """cos, sin `[B or 1, T, R]` as a kernel takes them; absent: any tensor, for where there are none."""
    if rotary is None:
        return Tables(absent, absent, 0, 0, 0)
    cos, sin = rotary
    if cos.stride(2) != 1 or _steps(cos) != _steps(sin) or sin.stride(2) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return Tables(cos, sin, *_steps(cos), cos.shape[2])


def _steps(x: Tensor) -> tuple[int, int]:
    row, token = (0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 1))
    return row, token


@triton.jit  # type: ignore[untyped-decorator]
def load_angles(cos_ptr, sin_ptr, columns, there, R: tl.constexpr):
    """cos and sin of a token, in the shape of the columns; sin with the sign that a number's partner gets."""
    cos = columns.to(tl.float32)
    sin = cos
    if R > 0:
        inside = (columns < R) & there
        cos = tl.load(cos_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        sin = tl.where(columns < R // 2, -sin, sin)
    return cos, sin


@triton.jit  # type: ignore[untyped-decorator]
def load_rotated(x_ptr, columns, inside, cos, sin, R: tl.constexpr):
    """Numbers `columns` of the heads at x_ptr, of which the first R are rotated; 0 where not inside."""
    x = tl.load(x_ptr + columns, mask=inside, other=0.0)
    if R > 0:
        partner = tl.where(columns < R // 2, columns + R // 2, columns - R // 2)
        other = tl.load(x_ptr + partner, mask=inside & (columns < R), other=0.0)
        rotated = x.to(tl.float32) * cos + other.to(tl.float32) * sin
        x = tl.where(columns < R, rotated.to(x.dtype), x)
    return x
