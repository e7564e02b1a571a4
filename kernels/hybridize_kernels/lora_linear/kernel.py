"""The adapted weight in Triton: W + s · up down from parts of any dtypes, in one pass over the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .eager import LoraProjection
from .eager import lora_linear as _on_products

BLOCK_OUT, BLOCK_IN = 64, 64
MAX_RANK_BLOCK = 64


def lora_linear(
    x: Tensor, projections: Sequence[LoraProjection], *, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """See `hybridize_kernels.lora_linear`."""
    return _on_products(x, projections, residual=residual, adapt=adapted)


def adapted(projection: LoraProjection, dtype: torch.dtype) -> Tensor:
    """W + s · up down `[out, in]`; the factors are rounded to `dtype`, their sum with W once more."""
    weight, _, down, up, scale = projection
    if down is None or up is None:
        return weight.to(dtype)
    size_out, size_in = weight.shape
    rank = down.shape[0]
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    launch(
        _adapt_kernel,
        (triton.cdiv(size_out, BLOCK_OUT) * triton.cdiv(size_in, BLOCK_IN),),
        (weight.contiguous(), up.contiguous(), down.contiguous(), result),
        (float(scale),),
        SIZE_OUT=size_out,
        SIZE_IN=size_in,
        RANK=rank,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_IN=BLOCK_IN,
        BLOCK_RANK=min(MAX_RANK_BLOCK, max(16, int(triton.next_power_of_2(rank)))),
        num_warps=4,
    )
    return result


@triton.jit(do_not_specialize=["scale"])  # type: ignore[untyped-decorator]
def _adapt_kernel(
    weight_ptr,  # [SIZE_OUT, SIZE_IN]
    up_ptr,  # [SIZE_OUT, RANK]
    down_ptr,  # [RANK, SIZE_IN]
    result_ptr,  # [SIZE_OUT, SIZE_IN]
    scale,
    SIZE_OUT: tl.constexpr,
    SIZE_IN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    across: tl.constexpr = (SIZE_IN + BLOCK_IN - 1) // BLOCK_IN
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.program_id(0) % across * BLOCK_IN + tl.arange(0, BLOCK_IN)
    in_row = (row < SIZE_OUT)[:, None]
    in_column = (column < SIZE_IN)[None, :]
    dtype = result_ptr.dtype.element_ty
    change = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    for first in tl.static_range(0, RANK, BLOCK_RANK):
        rank = first + tl.arange(0, BLOCK_RANK)
        up = tl.load(up_ptr + row[:, None] * RANK + rank[None, :], mask=in_row & (rank < RANK)[None, :], other=0.0)
        down = tl.load(
            down_ptr + rank[:, None] * SIZE_IN + column[None, :], mask=(rank < RANK)[:, None] & in_column, other=0.0
        )
        change = tl.dot(up.to(dtype), down.to(dtype), change, input_precision="ieee")
    at = row[:, None] * SIZE_IN + column[None, :]
    weight = tl.load(weight_ptr + at, mask=in_row & in_column, other=0.0).to(tl.float32)
    tl.store(result_ptr + at, (weight + scale * change).to(dtype), mask=in_row & in_column)
