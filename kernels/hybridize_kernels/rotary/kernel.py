"""Rotary position embedding in Triton: queries and keys in one kernel, which is also its own backward pass.

A program owns some tokens and a few heads, of the queries or of the keys; cosines and sines are loaded once for those
heads. Nothing is kept for the backward pass but cosines and sines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launch import launch

VARIABLE = "HYBRIDIZE_ROTARY"
"""Overrides the table, forward and back: `1024,4,4`, in the order of `Tile`'s fields."""


@dataclass(frozen=True)
class Tile:
    """Pairs of numbers of a head (tokens times padded pairs), heads of a program at most, warps."""

    pairs: int
    heads: int
    warps: int


TILE = Tile(1024, 4, 4)


@dataclass(frozen=True)
class Work:
    """Tokens of a tile, its padded pairs and the padded numbers after them, heads of a program, programs, warps."""

    tokens: int
    pairs: int
    rest: int
    heads: int
    programs: int
    warps: int


@lru_cache(maxsize=1024)
def work_of(tokens: int, query_heads: int, key_heads: int, size: int, rotated: int, override: str | None) -> Work:
    """How the heads of `tokens` tokens, `rotated` of whose `size` numbers are rotated, are shared out."""
    tile = Tile(*map(int, override.split(","))) if override else TILE
    pairs = int(triton.next_power_of_2(rotated // 2))
    rest = int(triton.next_power_of_2(size - rotated)) if size > rotated else 0
    tile_tokens = max(1, min(tile.pairs // max(pairs, rest // 2), int(triton.next_power_of_2(tokens))))
    most = max(query_heads, key_heads)
    heads = triton.cdiv(most, triton.cdiv(most, tile.heads))  # in groups as even as may be
    groups = triton.cdiv(query_heads, heads) + triton.cdiv(key_heads, heads)
    return Work(tile_tokens, pairs, rest, heads, groups * triton.cdiv(tokens, tile_tokens), tile.warps)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.rotary`."""
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(q, k, *_tables(cos, sin))
    return rotated


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and of one shape; the row that an expanded batch repeats, once."""
    if cos.stride(0) == sin.stride(0) == 0:
        cos, sin = cos[:1], sin[:1]
    return cos.contiguous(), sin.contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        turned_q, turned_k = _rotate(q, k, cos, sin, backward=False)
        assert turned_q is not None
        assert turned_k is not None
        return turned_q, turned_k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        wants_q, wants_k = ctx.needs_input_grad[:2]
        return *_rotate(dq if wants_q else None, dk if wants_k else None, cos, sin, backward=True), None, None


def _rotate(
    q: Tensor | None, k: Tensor | None, cos: Tensor, sin: Tensor, *, backward: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Both, or the one that is there: the other has no heads."""
    given = [x for x in (q, k) if x is not None]
    if not given:
        return None, None
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    batch, time, _, size = given[0].shape
    rotated = cos.shape[2]
    layouts = [_layout(x) for x in given]
    (x_q, q_token, q_head), (x_k, k_token, k_head) = layouts[0], layouts[-1]
    query_heads, key_heads = (0 if x is None else x.shape[2] for x in (q, k))
    work = work_of(batch * time, query_heads, key_heads, size, rotated, os.environ.get(VARIABLE))
    launch(
        _rotary_kernel,
        (work.programs,),
        (x_q, x_k, cos, sin, outputs[0], outputs[-1]),
        (batch * time, cos.shape[0] * cos.shape[1]),
        HQ=query_heads,
        H=key_heads,
        Q_TOKEN=q_token,
        Q_HEAD=q_head,
        K_TOKEN=k_token,
        K_HEAD=k_head,
        D=size,
        R=rotated,
        HEADS=work.heads,
        BLOCK_T=work.tokens,
        BLOCK_P=work.pairs,
        BLOCK_REST=work.rest,
        BACKWARD=backward,
        num_warps=work.warps,
    )
    return None if q is None else outputs[0], None if k is None else outputs[-1]


def _layout(x: Tensor) -> tuple[Tensor, int, int]:
    """x `[B, T, H, D]`, how far its tokens lie apart and how far its heads: x itself where two strides reach all.

    The strides are constants of the kernel, so they may be those of a projection, but must not hang on T: where heads
    lie further apart than tokens, as in `[B, H, T, D]`, x is copied.
    """
    batch, time, heads, size = x.shape
    from_row, from_token, from_head, step = x.stride()
    token = from_token if time > 1 else from_row
    head = from_head if heads > 1 else size
    in_line = batch == 1 or time == 1 or from_row == time * from_token
    if in_line and (step == 1 or size == 1) and (batch * time == 1 or token >= heads * head):
        return x, token if batch * time > 1 else heads * size, head
    return x.contiguous(), heads * size, size


@triton.jit(do_not_specialize=["tokens", "period"])  # type: ignore[untyped-decorator]
def _rotary_kernel(
    q_ptr,  # [N, HQ, D]
    k_ptr,  # [N, H, D]
    cos_ptr,  # [period, R]
    sin_ptr,  # [period, R]
    q_out_ptr,  # [N, HQ, D]
    k_out_ptr,  # [N, H, D]
    tokens,  # N = B · T
    period,  # after how many tokens cos and sin begin again
    HQ: tl.constexpr,
    H: tl.constexpr,
    Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr,
    K_HEAD: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    query_groups: tl.constexpr = (HQ + HEADS - 1) // HEADS
    groups: tl.constexpr = query_groups + (H + HEADS - 1) // HEADS
    group = tl.program_id(0) % groups
    token = (tl.program_id(0) // groups * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    pair = tl.arange(0, BLOCK_P)
    at = (token % period)[:, None] * R + pair[None, :]
    inside = (token < tokens)[:, None] & (pair < R // 2)[None, :]
    cos_1 = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + at + R // 2, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + at + R // 2, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:  # the transposed matrix of a pair: its two sines change places and signs
        sin_1, sin_2 = -sin_2, -sin_1
    if group < query_groups:
        _rotate_heads(
            q_ptr, q_out_ptr, cos_1, cos_2, sin_1, sin_2, token, tokens, group * HEADS,
            HQ, Q_TOKEN, Q_HEAD, D, R, HEADS, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr, k_out_ptr, cos_1, cos_2, sin_1, sin_2, token, tokens, (group - query_groups) * HEADS,
            H, K_TOKEN, K_HEAD, D, R, HEADS, BLOCK_P, BLOCK_REST,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_heads(
    x_ptr,  # [N, H, D], tokens TOKEN and heads HEAD apart
    y_ptr,  # [N, H, D]
    cos_1,  # [BLOCK_T, BLOCK_P] each
    cos_2,
    sin_1,
    sin_2,
    token,  # [BLOCK_T], int64
    tokens,
    first,  # head
    H: tl.constexpr,
    TOKEN: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates HEADS heads from the first on, as many as there are."""
    pair = tl.arange(0, BLOCK_P)[None, :]
    real = (token < tokens)[:, None]
    for n in tl.static_range(HEADS):
        head = first + n
        inside = real & (pair < R // 2) & (head < H)
        x_head = x_ptr + token[:, None] * TOKEN + head * HEAD
        y_head = y_ptr + token[:, None] * (H * D) + head * D
        x_1 = tl.load(x_head + pair, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(x_head + R // 2 + pair, mask=inside, other=0.0).to(tl.float32)
        y_1 = x_1 * cos_1 - x_2 * sin_1
        y_2 = x_2 * cos_2 + x_1 * sin_2
        tl.store(y_head + pair, y_1.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_head + R // 2 + pair, y_2.to(y_ptr.dtype.element_ty), mask=inside)
        if BLOCK_REST > 0:
            rest = tl.arange(0, BLOCK_REST)[None, :]
            behind = real & (rest < D - R) & (head < H)
            passed = tl.load(x_head + R + rest, mask=behind)
            tl.store(y_head + R + rest, passed, mask=behind)
