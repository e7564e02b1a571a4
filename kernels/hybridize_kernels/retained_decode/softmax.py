"""A softmax in pieces: tile by tile within a program, and split by split over programs."""

import triton
import triton.language as tl

NO_LOGIT = tl.constexpr(-1e30)  # finite, so that the difference of two of them is a number


@triton.jit  # type: ignore[untyped-decorator]
def add_tile(query, key, value, seen, scale_log2, maximum, total, output):
    """The softmax so far and a tile more.

    Args:
        query: [G, D] in the keys' type. key, value: [S, D]. seen: [S]. maximum, total: [G], of exponents to the base
            2. output: [G, D], not divided by the total.
    """
    logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    logit = tl.where(seen[None, :], logit, float("-inf"))
    higher = tl.maximum(maximum, tl.max(logit, axis=1))
    shrink = tl.exp2(maximum - higher)
    weight = tl.exp2(logit - higher[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    output = tl.dot(weight.to(value.dtype), value, output * shrink[:, None], input_precision="ieee")
    return higher, total, output


@triton.jit  # type: ignore[untyped-decorator]
def join_splits(
    partial_ptr,  # [B, H, splits, G, D]
    maximum_ptr,  # [B, H, splits, G]
    total_ptr,
    row_head,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The attention of a row and head, [ROWS, BLOCK_D], from its splits'; in their order, whoever came last."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    every = tl.arange(0, BLOCK_SPLITS)
    offset = (row_head * splits + every[:, None]) * G + rows[None, :]
    valid = (every[:, None] < splits) & (rows[None, :] < G)
    # One read for all: a loop would wait for each.
    maxima = tl.load(maximum_ptr + offset, mask=valid, other=NO_LOGIT)
    totals = tl.load(total_ptr + offset, mask=valid, other=0.0)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(totals * tl.exp2(maxima - maximum[None, :]), axis=0)
    joined = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for start in range(0, splits, TILE):
        some = start + tl.arange(0, TILE)
        place = (row_head * splits + some[:, None]) * G + rows[None, :]
        there = (some[:, None] < splits) & (rows[None, :] < G)
        weight = tl.exp2(tl.load(maximum_ptr + place, mask=there, other=NO_LOGIT) - maximum[None, :])
        partial = tl.load(
            partial_ptr + place[:, :, None] * D + columns[None, None, :],
            mask=there[:, :, None] & (columns < D)[None, None, :],
            other=0.0,
        )
        joined += tl.sum(weight[:, :, None] * partial, axis=0)
    return joined / tl.where(rows < G, total, 1.0)[:, None]
