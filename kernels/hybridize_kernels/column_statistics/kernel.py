"""Column statistics by two Triton kernels: the log-sum-exp by queries, then the statistics by keys.

Loops are peeled: only tiles at the diagonal and at a text's bounds carry a mask.
"""

import torch
import triton
from torch import Tensor

from .log_sum_exp import log_sum_exp_kernel
from .statistics import LOG2_E, statistics_kernel
from .tiles import tiles_for

MIN_PROGRAMS = 1024  # a few waves of an H100, so that programs of unequal length even out
MAX_SPLITS = 16
MIN_QUERIES = 1024  # of a split


def column_statistics(
    q: Tensor,
    k: Tensor,
    log_sum_exp: Tensor | None = None,
    *,
    window: int,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    need_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See `hybridize_kernels.column_statistics`."""
    if positions is not None:
        order = _padding_first(positions)
        q, k = _reorder(q, order), _reorder(k, order)
        log_sum_exp = None if log_sum_exp is None else _reorder(log_sum_exp, order)
    start, end = _bounds(q, positions, cu_seqlens)
    q, k = q.contiguous(), k.contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if log_sum_exp is None:
        log_sum_exp = _log_sum_exp(q, k, start, scale)
    largest, summed = _statistics(q, k, log_sum_exp, end, min(window, q.shape[1]), scale, need_sum)
    if positions is not None:
        back = order.argsort(1)
        largest, summed = _reorder(largest, back), None if summed is None else _reorder(summed, back)
    return largest, summed


def attention_log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `hybridize_kernels.attention_log_sum_exp`."""
    if positions is not None:
        order = _padding_first(positions)
        q, k = _reorder(q, order), _reorder(k, order)
    start, _ = _bounds(q, positions, cu_seqlens)
    result = _log_sum_exp(q.contiguous(), k.contiguous(), start, q.shape[-1] ** -0.5 if scale is None else float(scale))
    return result if positions is None else _reorder(result, order.argsort(1))


def _padding_first(positions: Tensor) -> Tensor:
    """int64 `[B, T]`: the columns of each row, padding before the real tokens, which keep their order."""
    return (positions >= 0).to(torch.int8).sort(dim=1, stable=True).indices


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def _bounds(q: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """int32 `[B, T]`: the first column and one past the last of the text that a column is of; padding sees nothing."""
    batch, time = q.shape[:2]
    column = torch.arange(time, dtype=torch.int32, device=q.device).expand(batch, -1)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(torch.int32)
        document = torch.searchsorted(bounds, column.contiguous(), right=True)
        start, end = bounds[document - 1], bounds[document.clamp(max=len(bounds) - 1)]
        real = document < len(bounds)
    elif positions is not None:
        start = (positions < 0).sum(1, keepdim=True, dtype=torch.int32).expand(batch, time)
        end = torch.full_like(column, time)
        real = column >= start
    else:
        return torch.zeros_like(column).contiguous(), torch.full_like(column, time).contiguous()
    return torch.where(real, start, column + 1), torch.where(real, end, 0)


def _log_sum_exp(q: Tensor, k: Tensor, start: Tensor, scale: float) -> Tensor:
    batch, time, query_heads, head_size = q.shape
    heads = k.shape[2]
    result = torch.empty(batch, time, query_heads, dtype=torch.float32, device=q.device)
    if result.numel() == 0:
        return result
    if scale < 0:
        q, scale = -q, -scale
    scale = max(scale, 1e-30)  # of 0: the kernel multiplies minus infinity by it
    tiles = tiles_for(head_size, q.dtype)
    tile, group = tiles.log_sum_exp, query_heads // heads
    with torch.cuda.device_of(q):
        log_sum_exp_kernel[(triton.cdiv(time * group, tile.rows), batch * heads)](
            q,
            k,
            start,
            result,
            scale,
            time,
            heads,
            D=head_size,
            G=group,
            BLOCK_D=max(16, triton.next_power_of_2(head_size)),
            SLICE=tiles.slice,
            ROWS=tile.rows,
            KEYS=tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return result


def _statistics(
    q: Tensor, k: Tensor, log_sum_exp: Tensor, end: Tensor, window: int, scale: float, need_sum: bool
) -> tuple[Tensor, Tensor | None]:
    batch, time, query_heads, head_size = q.shape
    heads = k.shape[2]
    group = query_heads // heads
    tiles = tiles_for(head_size, q.dtype)
    tile = tiles.statistics
    key_tiles = triton.cdiv(time, tile.keys)
    # Few keys in all: parts of the queries side by side, their results joined below in a fixed order.
    splits = min(MAX_SPLITS, triton.cdiv(MIN_PROGRAMS, max(1, key_tiles * batch * heads)), max(1, time // MIN_QUERIES))
    split_rows = triton.cdiv(triton.cdiv(time * group, tile.rows), splits) * tile.rows
    largest = torch.empty(splits, batch, time, heads, dtype=torch.float32, device=q.device)
    summed = torch.empty_like(largest) if need_sum else None
    if largest.numel():
        # In the order of the rows of a tile, and in base 2.
        log_sum_exp = log_sum_exp.float().mul(LOG2_E.value).unflatten(2, (heads, group)).transpose(1, 2).contiguous()
        with torch.cuda.device_of(q):
            statistics_kernel[(key_tiles, splits, batch * heads)](
                q,
                k,
                log_sum_exp,
                end,
                largest,
                largest if summed is None else summed,
                scale,
                window,
                time,
                heads,
                split_rows,
                D=head_size,
                G=group,
                BLOCK_D=max(16, triton.next_power_of_2(head_size)),
                SLICE=tiles.slice,
                ROWS=tile.rows,
                KEYS=tile.keys,
                NEED_SUM=need_sum,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    if splits == 1:
        return largest[0], None if summed is None else summed[0]
    return largest.amax(0), None if summed is None else summed.sum(0)
