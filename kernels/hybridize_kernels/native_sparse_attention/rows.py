"""What the kernels do with rows: which queries and heads they are, and how they are loaded and stored.

A row is a (query, query head) pair of one key head's group, so that all heads of the group share every key that is
loaded. Over tiles of the layout the group is padded to a power of two, GP: lane m is query m // GP and head m % GP.
"""

import triton
import triton.language as tl

from .layout import TILE

TILE_FIELDS = tl.constexpr(8)
BLOCK_FIELDS = tl.constexpr(9)
TILE_QUERIES = tl.constexpr(TILE)
BASE_2 = tl.constexpr(1.4426950408889634)
NOTHING_YET = tl.constexpr(-1e30)
"""A maximum of no logits: finite, so that hidden logits give weights of 0 and not NaN."""


@triton.jit  # type: ignore[untyped-decorator]
def part_of_tile(tiles_ptr, tile, part, BLOCK_Q: tl.constexpr):
    """Of a part of a tile: row of the batch (int64), tokens [first, end), position of `first`, number of its document's
    block 0, and which query of the tile `first` is."""
    tiles_ptr += tile * TILE_FIELDS
    batch = tl.load(tiles_ptr).to(tl.int64)
    token = tl.load(tiles_ptr + 1)
    low = tl.load(tiles_ptr + 2)
    high = tl.load(tiles_ptr + 3)
    position = tl.load(tiles_ptr + 4)
    base = tl.load(tiles_ptr + 6).to(tl.int64)
    first = tl.maximum(token + part * BLOCK_Q, low)
    end = tl.minimum(token + part * BLOCK_Q + BLOCK_Q, high)
    return batch, first, end, position + first - token, base, first - token


@triton.jit  # type: ignore[untyped-decorator]
def lanes_of(queries, G: tl.constexpr, GP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of every lane: which query and head of the group it is, and whether it is one: others repeat a real one."""
    lanes = tl.arange(0, BLOCK_M)
    query = lanes // GP
    member = lanes % GP
    valid = (query < queries) & (member < G)
    return tl.minimum(query, queries - 1), tl.minimum(member, G - 1), valid


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(pointers, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a `[*, D]` tensor from pointers to their first elements; zeros beyond D."""
    features = tl.arange(0, BLOCK_D)
    at = pointers[:, None] + features[None, :]
    if BLOCK_D > D:
        return tl.load(at, mask=(features < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def store_rows(pointers, rows, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes the valid rows of `[*, BLOCK_D]` to pointers to their first elements, in the pointers' dtype."""
    features = tl.arange(0, BLOCK_D)
    at = pointers[:, None] + features[None, :]
    tl.store(at, rows.to(pointers.dtype.element_ty), mask=valid[:, None] & (features < D)[None, :])
