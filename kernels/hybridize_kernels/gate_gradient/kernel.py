"""The gradient of a gate by a Triton kernel over tiles of keys.

Loops are peeled: only tiles at the diagonal and at a text's bounds carry a mask.
"""

import torch
from torch import Tensor

from ..launch import launch
from ..retained_attention.layout import ceil_div, document_vectors, padding_vectors
from .sums import LOG2_E, sums_kernel
from .tiles import padded_head, slice_for, tile_for

MIN_PROGRAMS = 1024  # a few waves of an H100, so that programs of unequal length even out
MAX_SPLITS = 16
MIN_QUERIES = 1024  # of a split


def gate_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output_gradient: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    exit_row: Tensor,
    *,
    window: int,
    hidden: bool,
    on: str,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `hybridize_kernels.gate_gradient`."""
    end = order = None
    exit_row = exit_row.transpose(1, 2)  # [B, H, T]
    if positions is not None:
        # Padding first; the real tokens of a row keep their order.
        order = (positions >= 0).to(torch.uint8).argsort(dim=1, stable=True)
        inputs = (q, k, v, output_gradient, log_sum_exp, delta)
        q, k, v, output_gradient, log_sum_exp, delta = (_reorder(x, order) for x in inputs)
        exit_row = _reorder_exits(exit_row, order, positions >= 0)
        positions = positions.gather(1, order)
        end = padding_vectors(positions, positions, 0).key_end
    elif cu_seqlens is not None:
        end = document_vectors(cu_seqlens, q.shape[1]).key_end
    result = gate_gradient_in_order(
        q,
        k,
        v,
        output_gradient,
        log_sum_exp,
        delta,
        exit_row,
        end,
        window=window,
        hidden=hidden,
        on=on,
        scale=scale,
    )
    return result if order is None else _reorder(result, order.argsort(1))


def gate_gradient_in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output_gradient: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    exit_row: Tensor,
    end: Tensor | None,
    *,
    window: int,
    hidden: bool,
    on: str,
    scale: float | None = None,
) -> Tensor:
    """The same where a row's padding stands before its real tokens.

    Args:
        exit_row: int `[B, H, T]`. end: int `[B, T]`, one past the last row of each key's text, 0 of padding; None: T.
    """
    (batch, time, query_heads, head_size), heads = q.shape, k.shape[2]
    group = query_heads // heads
    tile = tile_for(head_size, q.dtype)
    key_tiles = ceil_div(time, tile.keys)
    # Few keys in all: parts of the queries side by side, their results joined below in a fixed order.
    splits = min(MAX_SPLITS, ceil_div(MIN_PROGRAMS, max(1, key_tiles * batch * heads)), max(1, time // MIN_QUERIES))
    split_rows = ceil_div(ceil_div(time * group, tile.rows), splits) * tile.rows
    result = torch.empty(splits, batch, time, heads, dtype=torch.float32, device=q.device)
    if result.numel() == 0:
        return result[0]
    if end is None:
        end = torch.full((batch, time), time, dtype=torch.int32, device=q.device)
    log_sum_exp, delta = _by_key_head(log_sum_exp, heads) * LOG2_E.value, _by_key_head(delta, heads)
    # A row that sees nothing has no part in any sum, whatever is asked of it: its weights are 0.
    blind = log_sum_exp == -torch.inf
    launch(
        sums_kernel,
        (key_tiles, splits, batch * heads),
        (
            *(x.contiguous() for x in (q, k, v, output_gradient)),
            log_sum_exp.masked_fill(blind, torch.inf),
            delta.masked_fill(blind, 0.0),
            exit_row.to(torch.int32).contiguous(),
            end.to(torch.int32).contiguous(),
            result,
        ),
        (head_size**-0.5 if scale is None else float(scale), min(window, time), time, heads, split_rows),
        D=head_size,
        G=group,
        BLOCK_D=padded_head(head_size),
        SLICE=slice_for(head_size, q.dtype),
        ROWS=tile.rows,
        KEYS=tile.keys,
        HIDDEN=hidden,
        ON_LOGIT=on == "logit",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return result[0] if splits == 1 else result.sum(0)


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """`[B, T, HQ]` -> fp32 `[B, H, T, G]`, the order of the rows of a tile."""
    batch, time, query_heads = x.shape
    return x.float().reshape(batch, time, heads, query_heads // heads).transpose(1, 2).contiguous()


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    reordered: Tensor = x[torch.arange(len(x), device=x.device)[:, None], order]
    return reordered


def _reorder_exits(exit_row: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """Exits `[B, H, T]` of keys in another order, which count that order's rows; real: `[B, T]`, in the old one."""
    real_before = torch.nn.functional.pad(real.cumsum(1), (1, 0))  # [B, T + 1]
    row = real_before + (~real).sum(1, keepdim=True)  # where the first real row from each on has gone
    exits = exit_row.long().clamp(0, real.shape[1])
    exits = row[:, None].expand(-1, exits.shape[1], -1).gather(2, exits)
    return exits.gather(2, order[:, None].expand_as(exits))
