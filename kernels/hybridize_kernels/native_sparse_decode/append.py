"""First launch: the new token goes into the cache; attention over the pooled blocks and over the window, in parts.

A program owns a key head of a row with all of its query heads, and a share of one of the two. What this launch writes
to the cache no program of it reads: the new token comes from k and v, and the block that it completes, pooled, stays
in the program that pools it, which is the first.
"""

import triton
import triton.language as tl

from .tiles import begin_with, fold, store_part


@triton.jit  # type: ignore[untyped-decorator]
def _pooled(
    keys_ptr,  # of a row and head
    weights_ptr,  # of a head
    new,  # [BLOCK_D], what slot `position` will hold
    position,
    stride,
    block_size,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LEARNED: tl.constexpr,
):
    """The block that ends at `position`, pooled in fp32, [BLOCK_D]."""
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    pooled = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, block_size, BLOCK_S):
        index = start + tl.arange(0, BLOCK_S)
        inside = (index < block_size - 1)[:, None] & in_d[None, :]
        slot = (position + 1 - block_size + index).to(tl.int64)
        token = tl.load((keys_ptr + slot * stride)[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if LEARNED:
            offset = index[:, None] * stride + columns[None, :]
            token *= tl.load(weights_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        pooled += tl.sum(token, axis=0)
    last = new.to(tl.float32)
    if LEARNED:
        last *= tl.load(weights_ptr + (block_size - 1) * stride + columns, mask=in_d, other=0.0).to(tl.float32)
        pooled += last
    else:
        pooled = (pooled + last) / block_size
    return pooled


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "positions_stride",
        "heads",
        "capacity",
        "blocks",
        "block_size",
        "window",
        "dense_below",
        "block_splits",
        "window_splits",
    ]
)
def append_kernel(
    q_ptr,  # [B, HQ, D]
    k_ptr,  # [B, H, D]
    v_ptr,
    keys_ptr,  # [B, capacity, H, D]
    values_ptr,
    compressed_k_ptr,  # [B, blocks, H, D]
    compressed_v_ptr,
    lengths_ptr,  # [B]
    positions_ptr,  # [B]
    key_pooling_ptr,  # [block_size, H, D]
    value_pooling_ptr,
    parts_ptr,  # [B, H, parts, G, D] fp32
    maxima_ptr,  # [B, H, parts, G]
    totals_ptr,
    logits_ptr,  # [B, H, G, blocks]
    positions_stride,
    scale_log2,
    heads,
    capacity,
    blocks,
    block_size,
    window,
    dense_below,
    block_splits,
    window_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LEARNED: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)  # offsets pass 2**31 long before memory ends
    split = tl.program_id(1)
    row, head = row_head // heads, row_head % heads
    position = tl.load(positions_ptr + row * positions_stride).to(tl.int32)
    if (position < 0) | (position >= capacity):
        return
    rows = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    in_d = columns < D
    stride = heads * D
    dtype = keys_ptr.dtype.element_ty
    keys_ptr += (row * capacity * heads + head) * D
    values_ptr += (row * capacity * heads + head) * D
    compressed_k_ptr += (row * blocks * heads + head) * D
    compressed_v_ptr += (row * blocks * heads + head) * D
    new_key = tl.load(k_ptr + row_head * D + columns, mask=in_d, other=0.0).to(dtype)
    new_value = tl.load(v_ptr + row_head * D + columns, mask=in_d, other=0.0).to(dtype)

    completes = (split == 0) & ((position + 1) % block_size == 0)
    block_key = tl.zeros([BLOCK_D], dtype=dtype)
    block_value = tl.zeros([BLOCK_D], dtype=dtype)
    if split == 0:
        slot = position.to(tl.int64) * stride
        tl.store(keys_ptr + slot + columns, new_key, mask=in_d)
        tl.store(values_ptr + slot + columns, new_value, mask=in_d)
        tl.store(lengths_ptr + row, position + 1, mask=head == 0)
        if completes:
            weights = head * D
            block_key = _pooled(
                keys_ptr, key_pooling_ptr + weights, new_key, position, stride, block_size, D, BLOCK_D, BLOCK_S, LEARNED
            ).to(dtype)
            block_value = _pooled(
                values_ptr,
                value_pooling_ptr + weights,
                new_value,
                position,
                stride,
                block_size,
                D,
                BLOCK_D,
                BLOCK_S,
                LEARNED,
            ).to(dtype)
            block = (position // block_size).to(tl.int64) * stride
            tl.store(compressed_k_ptr + block + columns, block_key, mask=in_d)
            tl.store(compressed_v_ptr + block + columns, block_value, mask=in_d)
    if position < dense_below:
        return

    q_offset = row_head * (G * D) + rows[:, None] * D + columns[None, :]
    query = tl.load(q_ptr + q_offset, mask=(rows < G)[:, None] & in_d[None, :], other=0.0).to(dtype)
    part = row_head * (block_splits + window_splits) + split
    if split < block_splits:
        maximum, total, output = begin_with(query, block_key, block_value, completes, scale_log2, BLOCK_G, BLOCK_D)
        logits_ptr += row_head * G * blocks
        end = position // block_size  # the blocks that were complete before
        share = tl.cdiv(tl.cdiv(end, BLOCK_S), block_splits) * BLOCK_S
        for start in range(split * share, tl.minimum(split * share + share, end), BLOCK_S):
            block = start + tl.arange(0, BLOCK_S)
            seen = block < end
            logit, maximum, total, output = fold(
                query,
                compressed_k_ptr,
                compressed_v_ptr,
                block,
                seen,
                stride,
                scale_log2,
                maximum,
                total,
                output,
                D,
                BLOCK_D,
            )
            kept = (rows < G)[:, None] & seen[None, :]
            tl.store(logits_ptr + rows[:, None] * blocks + block[None, :], logit, mask=kept)
        store_part(parts_ptr, maxima_ptr, totals_ptr, part, maximum, total, output, G, D, BLOCK_G, BLOCK_D)
    else:
        split -= block_splits
        maximum, total, output = begin_with(query, new_key, new_value, split == 0, scale_log2, BLOCK_G, BLOCK_D)
        begin = tl.maximum(position - window + 1, 0)
        share = tl.cdiv(tl.cdiv(position - begin, BLOCK_S), window_splits) * BLOCK_S
        begin += split * share
        for start in range(begin, tl.minimum(begin + share, position), BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            _, maximum, total, output = fold(
                query,
                keys_ptr,
                values_ptr,
                slot,
                slot < position,
                stride,
                scale_log2,
                maximum,
                total,
                output,
                D,
                BLOCK_D,
            )
        store_part(parts_ptr, maxima_ptr, totals_ptr, part, maximum, total, output, G, D, BLOCK_G, BLOCK_D)
