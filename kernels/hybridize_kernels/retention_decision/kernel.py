"""The decision on each token in Triton: scores and sums in one kernel, a small one that ends the sums, one back.

A program walks over tiles of tokens with all their heads and leaves its sums for itself; a single program adds them up
in a fixed order. Nothing is kept for the backward pass but the logits.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kept import tables_of_bounds
from ..launch import launch
from .eager import RetentionDecision, counted_documents, document_of_tokens

VARIABLE = "HYBRIDIZE_RETENTION_DECISION"
"""Overrides the tile: `2048,4,264`, in the order of `Tile`'s fields."""

COMPLETE, COUNTED = 1, 2
"""Bits of what the table of packed documents says of a token: it is decided; its document counts for the share."""


class Tile(NamedTuple):
    """Numbers of a tile (tokens times padded heads), warps of a program, programs at most."""

    numbers: int
    warps: int
    programs: int


TILE = Tile(2048, 4, 264)


class Work(NamedTuple):
    """Padded heads, tokens of a tile, tiles of a program, programs, warps of each."""

    block: int
    tokens: int
    steps: int
    programs: int
    warps: int


@lru_cache(maxsize=256)
def work_of(tokens: int, heads: int, override: str | None) -> Work:
    """How the tokens are shared out."""
    tile = Tile(*map(int, override.split(","))) if override else TILE
    block = int(triton.next_power_of_2(heads))
    tile_tokens = max(1, tile.numbers // block)
    tiles = triton.cdiv(tokens, tile_tokens)
    steps = triton.cdiv(tiles, tile.programs)
    return Work(block, tile_tokens, steps, triton.cdiv(tiles, steps), tile.warps)


class _Call(NamedTuple):
    """What autograd does not see.

    Attributes:
        where: what tells which tokens are decided: "rows", "positions" or "documents".
    """

    where: str
    score: str
    steps_per_unit: float
    margin: int
    l1_margin: float


def retention_decision(
    logit: Tensor,
    l1_weight: Tensor,
    *,
    score: str,
    steps_per_unit: float,
    margin: int,
    l1_margin: float = 0.0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longer_than: int = 0,
) -> RetentionDecision:
    """See `hybridize_kernels.retention_decision`."""
    scored: int | Tensor = max(logit.shape[1] - margin, 0)
    # By what is decided: bits of tokens and two numbers, positions and the last ones, or nothing.
    of_tokens = of_texts = None
    if cu_seqlens is not None:
        of_tokens, of_texts, scored = tables_of_bounds(
            _of_documents, cu_seqlens, logit.device, logit.shape[1], margin, longer_than
        )
    elif positions is not None:
        of_tokens, of_texts = positions.contiguous(), positions.amax(1)
    where = "documents" if cu_seqlens is not None else "rows" if positions is None else "positions"
    call = _Call(where, score, float(steps_per_unit), margin, float(l1_margin))
    decided, loss, share = _RetentionDecision.apply(logit, l1_weight.contiguous(), of_tokens, of_texts, call)
    return RetentionDecision(decided, loss, share, scored)


def _of_documents(
    bounds: Tensor, device: torch.device, num_tokens: int, margin: int, longer_than: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Bits `[T]` int32; how many documents count and the decided tokens of one `[2]`; the latter alone `[]`."""
    bounds = bounds.to(device, torch.int32)
    document = document_of_tokens(bounds, num_tokens)
    counts, number, scored = counted_documents(bounds.diff(), margin, longer_than)
    token = torch.arange(num_tokens, device=device, dtype=torch.int32)
    complete = token < (bounds[1:] - margin)[document]
    bits = complete * (COMPLETE + COUNTED * counts[document].to(torch.int32))
    return bits.to(torch.int32), torch.stack((number, scored)), scored


class _RetentionDecision(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logit: Tensor, l1_weight: Tensor, of_tokens: Tensor | None, of_texts: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logit = logit.contiguous()
        batch, time, heads = logit.shape
        work = work_of(batch * time, heads, os.environ.get(VARIABLE))
        decided = torch.empty(logit.shape, dtype=torch.float32, device=logit.device)
        # The results, then each program's sums: kept and positive of each head, decided tokens.
        results, sums = torch.empty(
            heads + 2 + work.programs * (2 * heads + 1), dtype=torch.float32, device=logit.device
        ).split((heads + 2, work.programs * (2 * heads + 1)))
        launch(
            _decide_kernel,
            (work.programs,),
            (logit, _or(of_tokens, logit), _or(of_texts, logit), decided, sums),
            (
                *(batch * time, time, work.steps, call.margin),
                *(call.l1_margin, call.steps_per_unit, 1.0 / call.steps_per_unit),
            ),
            H=heads,
            BLOCK_H=work.block,
            BLOCK_T=work.tokens,
            SIGMOID=call.score == "sigmoid",
            WHERE=call.where,
            num_warps=work.warps,
        )
        launch(
            _finish_kernel,
            (1,),
            (sums, l1_weight, _or(of_texts, logit), results),
            (work.programs,),
            H=heads,
            BLOCK_H=work.block,
            BLOCK_P=max(1, 1024 // work.block),
            L1_STRIDE=int(len(l1_weight) > 1),
            DOCUMENTS=call.where == "documents",
            num_warps=4,
        )
        ctx.save_for_backward(logit, l1_weight, of_tokens, of_texts, results)
        ctx.call = call
        share, loss, _ = results.split((heads, 1, 1))
        ctx.mark_non_differentiable(share)
        return decided, loss.view(()), share

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_decided: Tensor | None, d_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logit, l1_weight, of_tokens, of_texts, results = ctx.saved_tensors
        if d_decided is None and d_loss is None:
            return (None,) * 5
        call = ctx.call
        batch, time, heads = logit.shape
        work = work_of(batch * time, heads, os.environ.get(VARIABLE))
        d_logit = torch.empty_like(logit)
        launch(
            _gradient_kernel,
            (work.programs,),
            (
                logit,
                _or(of_tokens, logit),
                _or(of_texts, logit),
                logit if d_decided is None else d_decided.contiguous(),
                _or(d_loss, logit),
                l1_weight,
                results,
                d_logit,
            ),
            (batch * time, time, work.steps, call.margin, call.l1_margin),
            H=heads,
            BLOCK_H=work.block,
            BLOCK_T=work.tokens,
            SIGMOID=call.score == "sigmoid",
            WHERE=call.where,
            L1_STRIDE=int(len(l1_weight) > 1),
            DECIDED=d_decided is not None,
            LOSS=d_loss is not None,
            num_warps=work.warps,
        )
        return d_logit, None, None, None, None


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """x, or in its place among the pointers a tensor that is not read."""
    return other if x is None else x


@triton.jit  # type: ignore[untyped-decorator]
def _bits_of(of_tokens_ptr, of_texts_ptr, token, tokens, time, margin, WHERE: tl.constexpr):
    """Of these tokens [BLOCK_T], counted over all rows: whether they are decided, and whether they count."""
    inside = token < tokens
    if WHERE == "documents":
        bits = tl.load(of_tokens_ptr + token, mask=inside, other=0)
        complete = (bits & 1) > 0
        counted = (bits & 2) > 0
    elif WHERE == "positions":
        position = tl.load(of_tokens_ptr + token, mask=inside, other=-1)
        last = tl.load(of_texts_ptr + token // time, mask=inside, other=-1)
        complete = (position >= 0) & (position <= last - margin)
        counted = complete
    else:
        complete = inside & (token % time < time - margin)
        counted = complete
    return complete, counted


@triton.jit  # type: ignore[untyped-decorator]
def _nearest_even(x):
    """x rounded to a whole number, ties to even: behind 2**23 the numbers of fp32 are one apart."""
    size = tl.abs(x)
    rounded = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit  # type: ignore[untyped-decorator]
def _score(x, SIGMOID: tl.constexpr):
    if SIGMOID:
        r = tl.sigmoid(x) - 0.5
    else:
        r = tl.where(x < 0, 0.0, x)  # not the larger of both: NaN stays
    return r


@triton.jit(do_not_specialize=["tokens", "time", "steps", "margin"])  # type: ignore[untyped-decorator]
def _decide_kernel(
    logit_ptr,  # [tokens, H]
    of_tokens_ptr,  # [tokens], bits of packed documents or positions
    of_texts_ptr,  # [B], the last positions
    decided_ptr,  # [tokens, H]
    sums_ptr,  # [programs, 2 H + 1]
    tokens,  # B · T
    time,
    steps,
    margin,
    l1_margin,
    steps_per_unit,
    unit,  # its inverse, which is exact
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIGMOID: tl.constexpr,
    WHERE: tl.constexpr,
):
    head = tl.arange(0, BLOCK_H)
    in_h = head < H
    kept = tl.zeros([BLOCK_H], dtype=tl.float32)
    positive = tl.zeros([BLOCK_H], dtype=tl.float32)
    number = tl.zeros([BLOCK_T], dtype=tl.float32)
    for step in range(tl.program_id(0) * steps, tl.program_id(0) * steps + steps):
        token = step * BLOCK_T + tl.arange(0, BLOCK_T)
        complete, counted = _bits_of(of_tokens_ptr, of_texts_ptr, token, tokens, time, margin, WHERE)
        at = token.to(tl.int64)[:, None] * H + head[None, :]
        inside = (token < tokens)[:, None] & in_h[None, :]
        r = _score(tl.load(logit_ptr + at, mask=inside, other=0.0).to(tl.float32), SIGMOID)
        rounded = _nearest_even(r * steps_per_unit) * unit
        tl.store(decided_ptr + at, tl.where(complete[:, None], rounded, 0.0), mask=inside)
        kept += tl.sum(((r > 0) & counted[:, None] & inside).to(tl.float32), axis=0)
        reached = r + l1_margin
        positive += tl.sum(tl.where(complete[:, None] & inside & ~(reached < 0), reached, 0.0), axis=0)
        number += complete.to(tl.float32)
    sums_ptr += tl.program_id(0) * (2 * H + 1)
    tl.store(sums_ptr + head, kept, mask=in_h)
    tl.store(sums_ptr + H + head, positive, mask=in_h)
    tl.store(sums_ptr + 2 * H, tl.sum(number, axis=0))


@triton.jit(do_not_specialize=["programs"])  # type: ignore[untyped-decorator]
def _finish_kernel(
    sums_ptr,  # [programs, 2 H + 1]
    l1_weight_ptr,  # [H], or [1]
    of_texts_ptr,  # [2] of packed documents: how many count, and the decided tokens of one
    results_ptr,  # [H] share, then the loss and the number of decided tokens
    programs,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    L1_STRIDE: tl.constexpr,  # 1, or 0 for one weight of all heads
    DOCUMENTS: tl.constexpr,
):
    head = tl.arange(0, BLOCK_H)
    in_h = head < H
    kept = tl.zeros([BLOCK_H], dtype=tl.float32)
    positive = tl.zeros([BLOCK_H], dtype=tl.float32)
    numbers = tl.zeros([BLOCK_P], dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        known = program < programs
        at = program[:, None] * (2 * H + 1) + head[None, :]
        inside = known[:, None] & in_h[None, :]
        kept += tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0), axis=0)
        positive += tl.sum(tl.load(sums_ptr + H + at, mask=inside, other=0.0), axis=0)
        numbers += tl.load(sums_ptr + 2 * H + program * (2 * H + 1), mask=known, other=0.0)
    number = tl.maximum(tl.sum(numbers, axis=0), 1.0)
    share = kept / number
    if DOCUMENTS:
        share = kept / tl.load(of_texts_ptr) / tl.maximum(tl.load(of_texts_ptr + 1), 1.0)
    weight = tl.load(l1_weight_ptr + head * L1_STRIDE, mask=in_h, other=0.0)
    tl.store(results_ptr + head, share, mask=in_h)
    tl.store(results_ptr + H, tl.sum(weight * (positive / number), axis=0) / H)
    tl.store(results_ptr + H + 1, number)


@triton.jit(do_not_specialize=["tokens", "time", "steps", "margin"])  # type: ignore[untyped-decorator]
def _gradient_kernel(
    logit_ptr,  # [tokens, H]
    of_tokens_ptr,
    of_texts_ptr,
    d_decided_ptr,  # [tokens, H]
    d_loss_ptr,  # []
    l1_weight_ptr,  # [H], or [1]
    results_ptr,  # [H + 2]
    d_logit_ptr,  # [tokens, H]
    tokens,
    time,
    steps,
    margin,
    l1_margin,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIGMOID: tl.constexpr,
    WHERE: tl.constexpr,
    L1_STRIDE: tl.constexpr,  # 1, or 0 for one weight of all heads
    DECIDED: tl.constexpr,
    LOSS: tl.constexpr,
):
    head = tl.arange(0, BLOCK_H)
    in_h = head < H
    of_loss = tl.zeros([BLOCK_H], dtype=tl.float32)
    if LOSS:
        weight = tl.load(l1_weight_ptr + head * L1_STRIDE, mask=in_h, other=0.0)
        of_loss = weight * (tl.load(d_loss_ptr).to(tl.float32) / (tl.load(results_ptr + H + 1) * H))
    for step in range(tl.program_id(0) * steps, tl.program_id(0) * steps + steps):
        token = step * BLOCK_T + tl.arange(0, BLOCK_T)
        complete, _ = _bits_of(of_tokens_ptr, of_texts_ptr, token, tokens, time, margin, WHERE)
        at = token.to(tl.int64)[:, None] * H + head[None, :]
        inside = (token < tokens)[:, None] & in_h[None, :]
        x = tl.load(logit_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_r = tl.where(_score(x, SIGMOID) + l1_margin < 0, 0.0, of_loss[None, :])
        if DECIDED:
            d_r += tl.load(d_decided_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SIGMOID:
            opened = tl.sigmoid(x)
            d_x = d_r * (1.0 - opened) * opened
        else:
            d_x = tl.where(x > 0, d_r, 0.0)
        tl.store(d_logit_ptr + at, tl.where(complete[:, None], d_x, 0.0).to(d_logit_ptr.dtype.element_ty), mask=inside)
