"""The forward kernel: a block of queries of one key head over its retained keys and its window, in one softmax.

The rows of a block are (query, query head) pairs, so that all query heads of a group share every key that is loaded.
Each of the two segments runs first over the tiles that all rows see, without a mask, and then over the others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch
from .layout import Geometry, Vectors, ceil_div, power_of_two
from .lists import ListPlan, RetainedLists
from .rescale import NOTHING_YET, advance, elements_of_vote, rescale
from .tiles import Tile, load_keys, load_rows, retained_range, retained_rows, window_range, window_rows

LOG2_E = 1.4426950408889634

Strides = tuple[int, ...]
"""Of rows, tokens and heads; features lie side by side."""


def forward_launch(
    geometry: Geometry,
    lists: ListPlan | None,
    dtype: torch.dtype,
    strides: tuple[Strides, Strides, Strides],
    scale: float,
    tile: Tile,
    *,
    on_nvidia: bool,
    on_hopper: bool,
) -> Launch:
    """The kernel for calls with the same geometry; strides of q, k and v, with features side by side."""
    constants = flags(geometry, lists, dtype, strides)
    # Votes are PTX, which no interpreter and no other vendor's compiler takes.
    vote = elements_of_vote(tile.rows * constants["BLOCK_D"], tile.warps) if on_nvidia else 0
    half = dtype != torch.float32
    return Launch(
        _forward_kernel,
        (ceil_div(geometry.time, tile.rows // geometry.group) * geometry.batch * geometry.heads,),
        (*strides[0], *strides[1], *strides[2], scale * LOG2_E, *sizes(geometry, lists)),
        {**constants, "PARTS": 4 if half else 1, "VOTE": vote, "QUADS": half and on_hopper, **tile.options()},
    )


def attend(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, lists: RetainedLists | None, vectors: Vectors
) -> tuple[Tensor, Tensor]:
    """Output `[B, T, HQ, D]` and log-sum-exp `[B, T, HQ]` (fp32, natural; -inf for rows that see nothing)."""
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sum_exp = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch(q, k, v, output, log_sum_exp, *list_pointers(q, lists, vectors))
    return output, log_sum_exp


def list_pointers(anything: Tensor, lists: RetainedLists | None, vectors: Vectors) -> tuple[Tensor, ...]:
    """The list arguments of the kernels over query blocks; an argument that is not there is not read."""
    start, end = vectors.query_start, vectors.key_end
    columns = exits = before = stable = size = None
    if lists is not None:
        columns, exits, before = lists.walked, lists.exit, lists.before
        stable, size = lists.chunk_stable, lists.block_size
    return tuple([anything if x is None else x for x in (start, end, columns, exits, before, stable, size)])


def sizes(geometry: Geometry, lists: ListPlan | None) -> tuple[int, ...]:
    """time, keys, heads, offset, prefix, window, chunk, width of its list (0: one for all), rows of a list's block."""
    chunk, width, block = (geometry.time, 0, 1) if lists is None else (lists.chunk, lists.width, lists.block)
    _, time, keys, heads = geometry[:4]
    return (time, keys, heads, geometry.offset, geometry.prefix, geometry.window, chunk, width, block)


def flags(
    geometry: Geometry, lists: ListPlan | None, dtype: torch.dtype, strides: tuple[Strides, ...]
) -> dict[str, Any]:
    """The constants that all kernels take; strides of q, k, v and what else has the form of q."""
    return {
        "G": geometry.group,
        "D": geometry.head_size,
        "BLOCK_D": max(16, power_of_two(geometry.head_size)),
        "RETAINED": lists is not None,
        "CAPPED": lists is not None and lists.cap is not None,
        "PADDED": geometry.padded,
        # Offsets inside one row of the batch pass 2**31 elements.
        "LONG": _span(geometry, strides) >= 2**31,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _span(geometry: Geometry, strides: tuple[Strides, ...]) -> int:
    """Most elements from the first to the last of one row of the batch, as it lies in memory or packed."""
    spans = []
    for index, (_, token, head) in enumerate(strides):
        keys = index in (1, 2)
        tokens = geometry.keys if keys else geometry.time
        heads = geometry.heads if keys else geometry.heads * geometry.group
        packed = tokens * heads * geometry.head_size
        spans.append(max(packed, (tokens - 1) * token + (heads - 1) * head + geometry.head_size))
    return max(spans)


INTEGERS = ["time", "keys", "heads", "offset", "prefix", "window", "chunk", "width", "list_block"]


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(
    q,
    k,
    v,
    sums,
    minus,
    output,
    scale,
    row,
    lower,
    upper,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    VOTE: tl.constexpr,
    QUADS: tl.constexpr,
):
    """One tile of keys in the online softmax: output = Σ exp2(logit − pivot) v, with logits in base 2, scale above 0.

    The pivot is the largest logit so far, or up to SLACK below it, so that it hardly ever moves after the first tiles.
    sums `[rows, PARTS]` add up to the sum of the weights, and minus `[rows, PARTS]` holds minus the pivot of a row as
    many times. Four parts are what a row has in a thread of the matrix units: nothing is exchanged in an ordinary tile.
    """
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        seen = (row[:, None] >= lower[None, :]) & (row[:, None] < upper[None, :])
        logits = tl.where(seen, logits, -float("inf"))
    parts: tl.constexpr = sums.shape[1]
    logits = tl.reshape(logits, [logits.shape[0], logits.shape[1] // (2 * parts), parts, 2])
    minus, shrink = advance(tl.max(tl.max(logits, 3), 1), minus, scale, QUADS)
    weights = tl.math.exp2(logits * scale + minus[:, None, :, None])
    sums = sums * shrink + tl.sum(tl.sum(weights, 3), 1)
    shape: tl.constexpr = output.shape
    output = tl.reshape(output, [shape[0], shape[1] // (2 * parts), parts, 2])
    output = rescale(output, tl.broadcast_to(shrink[:, None, :, None], output.shape), VOTE)
    output = tl.reshape(output, shape)
    weights = tl.reshape(weights, [q.shape[0], k.shape[0]]).to(v.dtype)
    output = tl.dot(weights, v, output, input_precision=PRECISION)
    return sums, minus, output


@triton.jit(do_not_specialize=INTEGERS)  # type: ignore[untyped-decorator]
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    output_ptr,  # [B, T, HQ, D] contiguous
    lse_ptr,  # [B, T, HQ]
    query_start_ptr,
    key_end_ptr,
    columns_ptr,
    exit_ptr,
    before_ptr,
    chunk_stable_ptr,
    block_size_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    scale,
    time,
    keys,
    heads,
    offset,
    prefix,
    window,
    chunk,
    width,
    list_block,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RETAINED: tl.constexpr,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    VOTE: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    # The last blocks, which have the most keys, start first, so that the end is not ragged.
    blocks = tl.cdiv(time, BLOCK_Q)
    row_heads = tl.num_programs(0) // blocks
    block = blocks - 1 - tl.program_id(0) // row_heads
    row_head = (tl.program_id(0) % row_heads).to(tl.int64)
    batch = row_head // heads
    head = row_head % heads
    first_row = block * BLOCK_Q
    last_row = tl.minimum(first_row + BLOCK_Q, time) - 1
    lanes = tl.arange(0, BLOCK_M)
    valid = (lanes < BLOCK_Q * G) & (first_row + lanes // G < time)
    row = tl.minimum(first_row + lanes // G, last_row)
    features = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    row_wide = row.to(tl.int64) if LONG else row
    member = (lanes % G).to(tl.int64) if LONG else lanes % G

    q_rows = q_ptr + batch * q_stride_b + head * G * q_stride_h + row_wide * q_stride_t + member * q_stride_h
    q = load_rows(q_rows, features, D, BLOCK_D)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    start_min = prefix
    start_max = prefix
    if PADDED:
        key_end_ptr += batch * keys
        start = tl.load(query_start_ptr + batch * time + row)
        start_min = tl.min(start, 0)
        start_max = tl.max(start, 0)

    sums = tl.zeros([BLOCK_M, PARTS], tl.float32)
    minus = tl.full([BLOCK_M, PARTS], NOTHING_YET, tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if RETAINED:
        exit_ptr += row_head * keys
        chunks = tl.cdiv(time, chunk)
        begin, full, end = retained_range(
            before_ptr + row_head * (keys + 1),
            chunk_stable_ptr + row_head * chunks,
            block_size_ptr + row_head * tl.cdiv(time, list_block),
            first_row // list_block,
            first_row,
            last_row,
            start_min,
            start_max,
            chunk,
            keys,
            offset,
            prefix,
            window,
            CAPPED,
        )
        if CAPPED:
            columns_ptr += (row_head * chunks + first_row // chunk) * width
        else:
            columns_ptr += row_head * keys
        full = begin + (full - begin) // BLOCK_N * BLOCK_N
        for at in tl.range(begin, full, BLOCK_N, num_stages=STAGES):
            column = tl.load(columns_ptr + at + columns)
            k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
            sums, minus, output = _attend_tile(
                q, k, v, sums, minus, output, scale, row, column, column, False, PRECISION, VOTE, QUADS
            )
        # Not pipelined: that costs more to start than these few tiles gain, and keeps registers from the others.
        for at in tl.range(full, end, BLOCK_N, num_stages=1):
            column = tl.load(columns_ptr + tl.minimum(at + columns, end - 1))
            k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
            lower, upper = retained_rows(exit_ptr, column, at + columns < end, offset, prefix, window)
            sums, minus, output = _attend_tile(
                q, k, v, sums, minus, output, scale, row, lower, upper, True, PRECISION, VOTE, QUADS
            )

    low, high, tiles, full_from, full_to = window_range(
        first_row, last_row, start_min, start_max, offset, window, BLOCK_N
    )
    for at in tl.range(full_from, full_to, num_stages=STAGES):
        column = low + at * BLOCK_N + columns
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
        sums, minus, output = _attend_tile(
            q, k, v, sums, minus, output, scale, row, column, column, False, PRECISION, VOTE, QUADS
        )
    # The tiles at the window's left edge and those at the diagonal.
    for at in tl.range(0, tiles - (full_to - full_from), num_stages=STAGES):
        column = low + tl.where(at < full_from, at, at + full_to - full_from) * BLOCK_N + columns
        inside = column < high
        column = tl.minimum(column, high - 1)
        k, v = load_keys(k_ptr, v_ptr, k_stride_t, v_stride_t, column, features, D, BLOCK_D, LONG)
        lower, upper = window_rows(key_end_ptr, column, inside, offset, window, PADDED)
        sums, minus, output = _attend_tile(
            q, k, v, sums, minus, output, scale, row, lower, upper, True, PRECISION, VOTE, QUADS
        )

    sums = tl.sum(sums, 1)
    blind = sums == 0
    if PADDED:
        blind = blind | (start >= keys)
    pivot = -tl.max(minus, 1)
    if QUADS:
        # Were a row not in four neighbouring lanes, its parts would have gone apart: let nobody take that for a result.
        pivot = tl.where(pivot == -tl.min(minus, 1), pivot, float("nan"))
        sums += pivot - pivot
    output = tl.where(blind[:, None], 0.0, output / tl.where(blind, 1.0, sums)[:, None])
    # log2 of a sum times ln 2.
    log_sum = tl.where(blind, -float("inf"), (pivot + tl.math.log2(tl.where(blind, 1.0, sums))) * 0.6931471805599453)
    out_row = (batch * time + row) * heads * G + head * G + lanes % G
    tl.store(lse_ptr + out_row, log_sum, mask=valid)
    at = output_ptr + out_row[:, None] * D + features[None, :]
    inside = valid[:, None] & (features < D)[None, :]
    tl.store(at, output.to(output_ptr.dtype.element_ty), mask=inside)
