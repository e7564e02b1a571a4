"""What the kernels of a decoding step share: a tile of keys folded into a running softmax, and the joining of parts."""

import triton
import triton.language as tl

NO_LOGIT = tl.constexpr(-1e30)  # finite, so that the difference of two of them is a number


@triton.jit  # type: ignore[untyped-decorator]
def fold(
    query,  # [BLOCK_G, BLOCK_D]
    keys_ptr,  # of a row and head
    values_ptr,
    slot,  # [BLOCK_S]
    seen,  # [BLOCK_S]
    stride,  # numbers from a slot to the next
    scale_log2,
    maximum,  # [BLOCK_G]
    total,
    output,  # [BLOCK_G, BLOCK_D]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The softmax with the keys of a tile in it, and their logits [BLOCK_G, BLOCK_S] to the base 2."""
    columns = tl.arange(0, BLOCK_D)
    begin = slot.to(tl.int64) * stride  # offsets pass 2**31 in long rows
    inside = seen[:, None] & (columns < D)[None, :]
    key = tl.load((keys_ptr + begin)[:, None] + columns[None, :], mask=inside, other=0.0)
    value = tl.load((values_ptr + begin)[:, None] + columns[None, :], mask=inside, other=0.0)
    logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    logit = tl.where(seen[None, :], logit, float("-inf"))
    higher = tl.maximum(maximum, tl.max(logit, axis=1))
    shrink = tl.exp2(maximum - higher)
    weight = tl.exp2(logit - higher[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    output = tl.dot(weight.to(value.dtype), value, output * shrink[:, None], input_precision="ieee")
    return logit, higher, total, output


@triton.jit  # type: ignore[untyped-decorator]
def begin_with(query, key, value, there, scale_log2, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """A softmax over one key and value [BLOCK_D], or over nothing where `there` is False."""
    own = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale_log2
    maximum = tl.where(there, own, NO_LOGIT)
    total = tl.zeros([BLOCK_G], dtype=tl.float32) + tl.where(there, 1.0, 0.0)
    output = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32) + tl.where(there, value.to(tl.float32), 0.0)[None, :]
    return maximum, total, output


@triton.jit  # type: ignore[untyped-decorator]
def store_part(
    parts_ptr,  # [parts, G, D]
    maxima_ptr,  # [parts, G]
    totals_ptr,
    part,
    maximum,
    total,
    output,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < G)[:, None] & (columns < D)[None, :]
    tl.store(parts_ptr + part * (G * D) + rows[:, None] * D + columns[None, :], output, mask=inside)
    tl.store(maxima_ptr + part * G + rows, maximum, mask=rows < G)
    tl.store(totals_ptr + part * G + rows, total, mask=rows < G)


@triton.jit  # type: ignore[untyped-decorator]
def log_sum_exp(
    maxima_ptr,  # of the first part, and of a query head
    totals_ptr,
    parts,
    G: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Maximum and sum of the softmax of which each part saw a share."""
    every = tl.arange(0, BLOCK_PARTS)
    maxima = tl.load(maxima_ptr + every * G, mask=every < parts, other=NO_LOGIT)
    totals = tl.load(totals_ptr + every * G, mask=every < parts, other=0.0)
    maximum = tl.max(maxima, axis=0)
    return maximum, tl.sum(totals * tl.exp2(maxima - maximum), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def join(
    parts_ptr,  # of the first part, and of a query head
    maxima_ptr,
    totals_ptr,
    parts,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The attention of a query head [BLOCK_D] from its parts, in their order; 0 where none saw a key."""
    columns = tl.arange(0, BLOCK_D)
    maximum, total = log_sum_exp(maxima_ptr, totals_ptr, parts, G, BLOCK_PARTS)
    joined = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, parts, TILE):
        some = start + tl.arange(0, TILE)
        there = some < parts
        weight = tl.exp2(tl.load(maxima_ptr + some * G, mask=there, other=NO_LOGIT) - maximum)
        weight = tl.where(there, weight, 0.0)
        inside = there[:, None] & (columns < D)[None, :]
        partial = tl.load(parts_ptr + some[:, None] * (G * D) + columns[None, :], mask=inside, other=0.0)
        joined += tl.sum(weight[:, None] * partial, axis=0)
    return joined / tl.where(total > 0, total, 1.0)
