"""Pooling: one key, or value, for each complete block of a document, and the gradient of the pooling's weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import Layout, power_of_two
from .rows import BLOCK_FIELDS, load_rows

ELEMENTS = 4096
"""Of x that a program holds at once."""

PROGRAMS = 528
"""Of the weights' gradient: four for each processor of an H100."""


def pool(x: Tensor, layout: Layout, block_size: int, weights: Tensor | None = None) -> Tensor:
    """Means of x over its blocks, or Σ_i weights_i ∘ x_i; summed in fp32.

    x: `[B, S, H, D]`, features side by side; weights: `[block_size, H, D]`. Returns `[num_blocks, H, D]` in x's dtype;
    blocks that are incomplete or not used are zero.
    """
    heads, size = x.shape[2:]
    pooled = torch.empty(len(layout.blocks), heads, size, dtype=x.dtype, device=x.device)
    if pooled.numel() == 0:
        return pooled
    block_d, rows = _chunk(size, block_size)
    launch(
        _pool_kernel,
        (len(layout.blocks) * heads,),
        (x, x if weights is None else weights.contiguous(), layout.blocks, pooled),
        (*x.stride()[:3], heads),
        D=size,
        BLOCK_D=block_d,
        BS=block_size,
        ROWS=rows,
        WEIGHTED=weights is not None,
        num_warps=4,
    )
    return pooled


def pool_weight_gradient(x: Tensor, d_pooled: Tensor, layout: Layout, block_size: int) -> Tensor:
    """fp32 `[block_size, H, D]`: Σ x_i ∘ d_pooled over the complete blocks, in one order every time.

    x: `[B, S, H, D]`, features side by side; d_pooled: fp32 `[num_blocks, H, D]`.
    """
    heads, size = x.shape[2:]
    num_blocks = len(layout.blocks)
    block_d, rows = _chunk(size, block_size)
    shares = max(1, min(num_blocks, PROGRAMS * rows // (block_size * max(heads, 1))))
    share = -(-num_blocks // shares)
    parts = torch.empty(shares, block_size, heads, size, dtype=torch.float32, device=x.device)
    if num_blocks * heads * size == 0:
        return parts.new_zeros(block_size, heads, size)
    launch(
        _weight_kernel,
        (shares * heads, block_size // rows),
        (x, d_pooled.contiguous(), layout.blocks, parts),
        (*x.stride()[:3], heads, num_blocks, share),
        D=size,
        BLOCK_D=block_d,
        BS=block_size,
        ROWS=rows,
        num_warps=4,
    )
    return parts.sum(0)


def _chunk(size: int, block_size: int) -> tuple[int, int]:
    """Padded head size, and tokens that a program holds at once."""
    block_d = power_of_two(size)
    return block_d, max(1, min(block_size, ELEMENTS // block_d))


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def _pool_kernel(
    x_ptr,
    weights_ptr,  # [BS, H, D]
    blocks_ptr,
    pooled_ptr,  # [num_blocks, H, D]
    x_stride_b,
    x_stride_t,
    x_stride_h,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BS: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    block = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    batch = tl.load(blocks_ptr + block * BLOCK_FIELDS).to(tl.int64)
    token = tl.load(blocks_ptr + block * BLOCK_FIELDS + 1).to(tl.int64)
    tokens = tl.load(blocks_ptr + block * BLOCK_FIELDS + 2)
    features = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    if tokens == BS:
        x_ptr += batch * x_stride_b + head.to(tl.int64) * x_stride_h
        for start in tl.static_range(0, BS, ROWS):
            row = start + tl.arange(0, ROWS)
            x = load_rows(x_ptr + (token + row) * x_stride_t, D, BLOCK_D).to(tl.float32)
            if WEIGHTED:
                x *= load_rows(weights_ptr + (row * heads + head) * D, D, BLOCK_D).to(tl.float32)
            total += tl.sum(x, 0)
        if not WEIGHTED:
            total *= 1.0 / BS
    at = pooled_ptr + (block.to(tl.int64) * heads + head) * D + features
    tl.store(at, total.to(pooled_ptr.dtype.element_ty), mask=features < D)


@triton.jit(do_not_specialize=["heads", "num_blocks", "share"])  # type: ignore[untyped-decorator]
def _weight_kernel(
    x_ptr,
    d_pooled_ptr,  # [num_blocks, H, D]
    blocks_ptr,
    parts_ptr,  # [shares, BS, H, D], written: the sums over each share of the blocks
    x_stride_b,
    x_stride_t,
    x_stride_h,
    heads,
    num_blocks,
    share,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BS: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    features = tl.arange(0, BLOCK_D)
    x_ptr += head.to(tl.int64) * x_stride_h
    d_pooled_ptr += head * D
    stride = heads.to(tl.int64) * D
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for block in range(part * share, tl.minimum(part * share + share, num_blocks)):
        batch = tl.load(blocks_ptr + block * BLOCK_FIELDS).to(tl.int64)
        token = tl.load(blocks_ptr + block * BLOCK_FIELDS + 1).to(tl.int64)
        tokens = tl.load(blocks_ptr + block * BLOCK_FIELDS + 2)
        if tokens == BS:
            x = load_rows(x_ptr + batch * x_stride_b + (token + row) * x_stride_t, D, BLOCK_D).to(tl.float32)
            at = d_pooled_ptr + block * stride + features
            total += x * tl.load(at, mask=features < D, other=0.0)[None, :]
    at = parts_ptr + ((part.to(tl.int64) * BS + row) * heads + head)[:, None] * D + features[None, :]
    tl.store(at, total, mask=(features < D)[None, :])
