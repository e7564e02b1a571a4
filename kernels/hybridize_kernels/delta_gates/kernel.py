"""The gates in Triton: both products and what follows them in one kernel, all gradients in another.

Kept for the backward pass are the products, rounded as a linear layer rounds them. There a program owns some columns of
the hidden states and a part of the tokens: it writes that part of the hidden states' gradient, and leaves its sums of
the parameters' gradients for itself; they are added up in a fixed order.
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

from ..launch import launch

VARIABLE = "HYBRIDIZE_DELTA_GATES"
"""Overrides the table: `forward=32,64,4,3,1;backward=16,64,2,2,1056`, in the order of `Tile`'s fields."""

COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LEAST = 16
"""A side of a matrix product's tile is at least this."""


class Tile(NamedTuple):
    """Tokens and columns of a tile, warps and stages, and the programs to aim at, where they share out the tokens."""

    tokens: int
    columns: int
    warps: int
    stages: int
    programs: int


# With 64 rows and four warps the products would be Hopper's warp group products, made for wider tiles than these.
TABLE = {"forward": Tile(32, 64, 4, 3, 1), "backward": Tile(16, 64, 2, 2, 1056)}


@lru_cache(maxsize=64)
def tile_of(name: str, override: str | None) -> Tile:
    """The tile of the pass of this name."""
    given = dict(part.split("=") for part in override.split(";")) if override else {}
    return Tile(*map(int, given[name].split(","))) if name in given else TABLE[name]


class _Call(NamedTuple):
    """What autograd does not see."""

    beta_ceiling: float
    compute: torch.dtype


def delta_gates(
    hidden: Tensor,
    decay_weight: Tensor,
    decay_bias: Tensor,
    decay_rate: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor,
    *,
    beta_ceiling: float = 1.0,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.delta_gates`."""
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    call = _Call(float(beta_ceiling), compute)
    log_decay, beta = _DeltaGates.apply(
        hidden, real, call, decay_weight, decay_bias, decay_rate, beta_weight, beta_bias
    )
    return log_decay, beta


class _DeltaGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, real: Tensor | None, call: _Call, *given: Tensor) -> tuple[Tensor, Tensor]:
        hidden, *parameters = (x if x.is_contiguous() else x.contiguous() for x in (hidden, *given))
        real = None if real is None else real.contiguous()
        batch, time, width = hidden.shape
        heads = parameters[0].shape[0]
        tile = tile_of("forward", os.environ.get(VARIABLE))
        # Both gates, then the products that they are made of.
        results = torch.empty(4, batch, time, heads, dtype=torch.float32, device=hidden.device)
        launch(
            _forward_kernel,
            (triton.cdiv(batch * time, tile.tokens),),
            (hidden, *parameters, hidden if real is None else real, results),
            (batch * time, call.beta_ceiling),
            W=width,
            H=heads,
            BLOCK_T=tile.tokens,
            BLOCK_W=_columns(width, tile),
            BLOCK_H=_padded(heads),
            PADDED=real is not None,
            COMPUTE=COMPUTE[call.compute],
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        ctx.save_for_backward(hidden, real, results, *parameters)
        ctx.call = call
        log_decay, beta, _, _ = results.unbind(0)
        return log_decay, beta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_decay: Tensor, d_beta: Tensor) -> tuple[Tensor | None, ...]:
        hidden, real, results, *parameters = ctx.saved_tensors
        batch, time, width = hidden.shape
        heads = parameters[0].shape[0]
        tile = tile_of("backward", os.environ.get(VARIABLE))
        columns = _columns(width, tile)
        steps, chunks = _shares(batch * time, triton.cdiv(width, columns), tile)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        learns = any(ctx.needs_input_grad[3:])
        sizes = (heads * width, heads, heads, heads * width, heads)
        sums = torch.empty(chunks if learns else 0, sum(sizes), dtype=torch.float32, device=hidden.device)
        launch(
            _backward_kernel,
            (chunks * triton.cdiv(width, columns),),
            (
                d_log_decay.contiguous(),
                d_beta.contiguous(),
                hidden,
                *parameters[:4],
                hidden if real is None else real,
                results,
                hidden if d_hidden is None else d_hidden,
                sums,
            ),
            (batch * time, steps, ctx.call.beta_ceiling),
            W=width,
            H=heads,
            BLOCK_T=tile.tokens,
            BLOCK_W=columns,
            BLOCK_H=_padded(heads),
            PADDED=real is not None,
            TO_HIDDEN=d_hidden is not None,
            TO_PARAMETERS=learns,
            COMPUTE=COMPUTE[ctx.call.compute],
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if not learns:
            return d_hidden, None, None, *(None,) * len(parameters)
        parts = sums.sum(0).split(sizes)
        return d_hidden, None, None, *(_as(part, like) for part, like in zip(parts, parameters, strict=True))


@lru_cache(maxsize=256)
def _padded(heads: int) -> int:
    return max(LEAST, int(triton.next_power_of_2(heads)))


@lru_cache(maxsize=256)
def _columns(width: int, tile: Tile) -> int:
    """Columns taken at a time."""
    return max(LEAST, min(tile.columns, int(triton.next_power_of_2(width))))


@lru_cache(maxsize=256)
def _shares(tokens: int, blocks: int, tile: Tile) -> tuple[int, int]:
    """Tiles of a program, and programs along the tokens, for so many blocks of columns."""
    tiles = triton.cdiv(tokens, tile.tokens)
    steps = triton.cdiv(tiles, max(1, min(tiles, tile.programs // blocks)))
    return steps, triton.cdiv(tiles, steps)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """In the shape and type of a parameter."""
    x = x if x.shape == like.shape else x.view(like.shape)
    return x if x.dtype == like.dtype else x.to(like.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _softplus(x):
    """log(1 + exp x), without overflow."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _forward_kernel(
    hidden_ptr,  # [tokens, W]
    decay_weight_ptr,  # [H, W]
    decay_bias_ptr,  # [H]
    decay_rate_ptr,  # [H]
    beta_weight_ptr,  # [H, W]
    beta_bias_ptr,  # [H]
    real_ptr,  # [tokens]
    results_ptr,  # [4, tokens, H]: log a, b, and the products of both
    tokens,  # B · T
    beta_ceiling,
    W: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    known = token < tokens
    head = tl.arange(0, BLOCK_H)
    in_h = head < H
    decay = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    beta = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for first in range(0, W, BLOCK_W):
        column = first + tl.arange(0, BLOCK_W)
        in_w = column < W
        at = token[:, None] * W + column[None, :]
        x = tl.load(hidden_ptr + at, mask=known[:, None] & in_w[None, :], other=0.0).to(COMPUTE)
        # Loaded with the columns along the first axis: nothing is transposed.
        at = head[None, :] * W + column[:, None]
        inside = in_w[:, None] & in_h[None, :]
        decay_weight = tl.load(decay_weight_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        beta_weight = tl.load(beta_weight_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        decay = tl.dot(x, decay_weight, decay, input_precision="ieee")
        beta = tl.dot(x, beta_weight, beta, input_precision="ieee")
    decay_bias = tl.load(decay_bias_ptr + head, mask=in_h, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(decay_rate_ptr + head, mask=in_h, other=0.0).to(tl.float32))
    beta_bias = tl.load(beta_bias_ptr + head, mask=in_h, other=0.0).to(COMPUTE).to(tl.float32)
    # Rounded as a linear layer's outputs are.
    decay = decay.to(COMPUTE).to(tl.float32)
    beta = (beta + beta_bias[None, :]).to(COMPUTE).to(tl.float32)
    log_decay = -rate[None, :] * _softplus(decay + decay_bias[None, :])
    gate = beta_ceiling * tl.sigmoid(beta)
    if PADDED:
        is_real = tl.load(real_ptr + token, mask=known, other=0).to(tl.int32)[:, None] != 0
        log_decay = tl.where(is_real, log_decay, 0.0)
        gate = tl.where(is_real, gate, 0.0)
    at = token[:, None] * H + head[None, :]
    inside = known[:, None] & in_h[None, :]
    plane = tokens.to(tl.int64) * H
    tl.store(results_ptr + at, log_decay, mask=inside)
    tl.store(results_ptr + plane + at, gate, mask=inside)
    tl.store(results_ptr + 2 * plane + at, decay, mask=inside)
    tl.store(results_ptr + 3 * plane + at, beta, mask=inside)


@triton.jit(do_not_specialize=["tokens", "steps"])  # type: ignore[untyped-decorator]
def _backward_kernel(
    d_log_decay_ptr,  # [tokens, H]
    d_beta_ptr,  # [tokens, H]
    hidden_ptr,  # [tokens, W]
    decay_weight_ptr,  # [H, W]
    decay_bias_ptr,  # [H]
    decay_rate_ptr,  # [H]
    beta_weight_ptr,  # [H, W]
    real_ptr,  # [tokens]
    results_ptr,  # [4, tokens, H]
    d_hidden_ptr,  # [tokens, W]
    sums_ptr,  # [chunks, 2 H W + 3 H]: decay's weight, bias and rate, beta's weight and bias
    tokens,
    steps,
    beta_ceiling,
    W: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr,
    TO_HIDDEN: tl.constexpr,
    TO_PARAMETERS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    blocks: tl.constexpr = (W + BLOCK_W - 1) // BLOCK_W
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    column = block * BLOCK_W + tl.arange(0, BLOCK_W)
    in_w = column < W
    head = tl.arange(0, BLOCK_H)
    in_h = head < H
    plane = tokens.to(tl.int64) * H
    decay_bias = tl.load(decay_bias_ptr + head, mask=in_h, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(decay_rate_ptr + head, mask=in_h, other=0.0).to(tl.float32))
    of_weights = head[:, None] * W + column[None, :]
    in_weights = in_h[:, None] & in_w[None, :]
    d_decay_weight = tl.zeros([BLOCK_W, BLOCK_H], dtype=tl.float32)
    d_beta_weight = tl.zeros([BLOCK_W, BLOCK_H], dtype=tl.float32)
    d_decay_bias = tl.zeros([BLOCK_H], dtype=tl.float32)
    d_rate = tl.zeros([BLOCK_H], dtype=tl.float32)
    d_beta_bias = tl.zeros([BLOCK_H], dtype=tl.float32)
    for step in range(chunk * steps, chunk * steps + steps):
        token = (step * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        known = token < tokens
        is_real = known
        if PADDED:
            is_real = known & (tl.load(real_ptr + token, mask=known, other=0).to(tl.int32) != 0)
        at = token[:, None] * H + head[None, :]
        inside = is_real[:, None] & in_h[None, :]
        d_log_decay = tl.load(d_log_decay_ptr + at, mask=inside, other=0.0).to(tl.float32)
        decay = tl.load(results_ptr + 2 * plane + at, mask=inside, other=0.0)
        d_decay = -d_log_decay * rate[None, :] * tl.sigmoid(decay + decay_bias[None, :])
        opened = tl.sigmoid(tl.load(results_ptr + 3 * plane + at, mask=inside, other=0.0))
        d_beta = tl.load(d_beta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_beta = d_beta * beta_ceiling * opened * (1.0 - opened)
        if TO_PARAMETERS:
            # Loaded with the tokens along the second axis: nothing is transposed.
            at_x = token[None, :] * W + column[:, None]
            x = tl.load(hidden_ptr + at_x, mask=is_real[None, :] & in_w[:, None], other=0.0).to(COMPUTE)
            d_decay_weight = tl.dot(x, d_decay.to(COMPUTE), d_decay_weight, input_precision="ieee")
            d_beta_weight = tl.dot(x, d_beta.to(COMPUTE), d_beta_weight, input_precision="ieee")
            d_decay_bias += tl.sum(d_decay, axis=0)
            d_rate += tl.sum(d_log_decay * tl.load(results_ptr + at, mask=inside, other=0.0), axis=0)
            d_beta_bias += tl.sum(d_beta, axis=0)
        if TO_HIDDEN:
            decay_weight = tl.load(decay_weight_ptr + of_weights, mask=in_weights, other=0.0).to(COMPUTE)
            beta_weight = tl.load(beta_weight_ptr + of_weights, mask=in_weights, other=0.0).to(COMPUTE)
            d_x = tl.dot(d_decay.to(COMPUTE), decay_weight, input_precision="ieee")
            d_x = tl.dot(d_beta.to(COMPUTE), beta_weight, d_x, input_precision="ieee")
            at_x = token[:, None] * W + column[None, :]
            inside_x = known[:, None] & in_w[None, :]
            tl.store(d_hidden_ptr + at_x, d_x.to(d_hidden_ptr.dtype.element_ty), mask=inside_x)
    if TO_PARAMETERS:
        sums_ptr += chunk.to(tl.int64) * (2 * H * W + 3 * H)
        turned = head[None, :] * W + column[:, None]
        in_turned = in_w[:, None] & in_h[None, :]
        tl.store(sums_ptr + turned, d_decay_weight, mask=in_turned)
        tl.store(sums_ptr + H * W + 2 * H + turned, d_beta_weight, mask=in_turned)
        if block == 0:
            tl.store(sums_ptr + H * W + head, d_decay_bias, mask=in_h)
            tl.store(sums_ptr + H * W + H + head, d_rate, mask=in_h)
            tl.store(sums_ptr + 2 * H * W + 2 * H + head, d_beta_bias, mask=in_h)
