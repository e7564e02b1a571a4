"""The gradient of a gate by a Triton kernel over tiles of keys.

Loops are peeled: only tiles at the diagonal and at a text's bounds carry a mask.
"""

import torch
from torch import Tensor

from ..dispatch import is_nvidia
from ..launch import launch
from ..retained_attention.layout import Vectors, ceil_div, document_vectors, padding_vectors
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
    largest: bool = False,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `hybridize_kernels.gate_gradient`."""
    order, vectors = None, Vectors()
    exit_row = exit_row.transpose(1, 2)  # [B, H, T]
    if positions is not None:
        # Padding first; the real tokens of a row keep their order.
        order = (positions >= 0).to(torch.uint8).argsort(dim=1, stable=True)
        inputs = (q, k, v, output_gradient, log_sum_exp, delta)
        q, k, v, output_gradient, log_sum_exp, delta = (_reorder(x, order) for x in inputs)
        exit_row = _reorder_exits(exit_row, order, positions >= 0)
        positions = positions.gather(1, order)
        vectors = padding_vectors(positions, positions, 0)
    elif cu_seqlens is not None:
        vectors = document_vectors(cu_seqlens, q.shape[1])
    q, k, v, output_gradient = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, output_gradient))
    result = gate_gradient_in_order(
        q,
        k,
        v,
        output_gradient,
        _rows(log_sum_exp, delta, k.shape[2]),
        exit_row.to(torch.int32).contiguous(),
        vectors,
        window=window,
        hidden=hidden,
        on=on,
        largest=largest,
        scale=scale,
    )
    return result if order is None else _reorder(result, order.argsort(1))


def gate_gradient_in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output_gradient: Tensor,
    rows: Tensor,
    exit_row: Tensor,
    vectors: Vectors,
    *,
    window: int,
    hidden: bool,
    on: str,
    largest: bool = False,
    scale: float | None = None,
    score: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """The same where a row's padding stands before its real tokens, and rows are as `query_gradient.py` leaves them.

    Args:
        q, k, v, output_gradient: of any strides, with features side by side.
        rows: fp32, contiguous, in the order `[2, B, H, T, G]`: log-sum-exps in base 2, +inf of what sees nothing, and
            deltas.
        exit_row: int32 `[B, H, T]`, contiguous. vectors: where the keys' texts begin and end.
        score: `[B, T, H]`, whose gradient this is: in its dtype, 0 of infinite ones and of the first `sinks` positions.

    Returns:
        `[B, T, H]`, fp32 unless a score is given.
    """
    (batch, time, query_heads, head_size), heads = q.shape, k.shape[2]
    dtype = torch.float32 if score is None else score.dtype
    if batch * heads == 0 or window >= time:
        return torch.zeros(batch, time, heads, dtype=dtype, device=q.device)
    tile = tile_for(head_size, q.dtype)
    key_tiles = ceil_div(time, tile.keys)
    # Few keys in all: parts of the queries side by side, their results joined below in a fixed order.
    splits = min(MAX_SPLITS, ceil_div(MIN_PROGRAMS, key_tiles * batch * heads), max(1, time // MIN_QUERIES))
    split_queries = ceil_div(ceil_div(time, tile.rows), splits) * tile.rows
    shape = (splits, batch, time, heads)
    result = torch.empty(shape, dtype=dtype if splits == 1 else torch.float32, device=q.device)
    strides = [stride for x in (q, k, v, output_gradient) for stride in x.stride()[:3]]
    launch(
        sums_kernel,
        (key_tiles, splits, batch * heads),
        (
            *(q, k, v, output_gradient, rows, exit_row),
            # What is not there is not read.
            *(rows if x is None else x for x in (vectors.key_start, vectors.key_end, score)),
            result,
        ),
        (
            *strides,
            *((0, 0, 0) if score is None else score.stride()),
            head_size**-0.5 if scale is None else float(scale),
            *(window, time, heads, sinks, split_queries),
        ),
        D=head_size,
        G=query_heads // heads,
        BLOCK_D=padded_head(head_size),
        SLICE=slice_for(head_size, q.dtype),
        ROWS=tile.rows,
        KEYS=tile.keys,
        HIDDEN=hidden,
        ON_LOGIT=on == "logit",
        LARGEST=largest,
        BOUNDED=vectors.key_end is not None,
        SCORED=score is not None,
        # It is PTX, which no interpreter and no other vendor's compiler takes.
        PAIRED=q.is_cuda and is_nvidia(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits == 1:
        return result[0]
    return (result.amax(0) if largest else result.sum(0)).to(dtype)


def _rows(log_sum_exp: Tensor, delta: Tensor, heads: int) -> Tensor:
    """Both `[B, T, HQ]` -> fp32 `[2, B, H, T, G]`, the log-sum-exp in base 2."""
    # A row that sees nothing has no part in any sum, whatever is asked of it: its weights are 0.
    blind = log_sum_exp == -torch.inf
    rows = torch.stack([(log_sum_exp * LOG2_E.value).masked_fill(blind, torch.inf), delta.masked_fill(blind, 0.0)])
    _, batch, time, query_heads = rows.shape
    return rows.float().view(2, batch, time, heads, query_heads // heads).transpose(2, 3).contiguous()


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
