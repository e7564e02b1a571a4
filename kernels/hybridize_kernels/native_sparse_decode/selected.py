"""Third launch: attention over the chosen blocks in parts; the last program of a head to finish joins all of it.

A row below `dense_below` attends to all of its tokens here instead.
"""

import triton
import triton.language as tl

from .tiles import NO_LOGIT, fold, store_part


@triton.jit  # type: ignore[untyped-decorator]
def _joined(
    parts_ptr,  # of a row and head
    maxima_ptr,
    totals_ptr,
    parts,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum and output of the softmax of which each part saw a share; in their order, whoever came last."""
    rows = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < G)[:, None] & (columns < D)[None, :]
    maximum = tl.full([BLOCK_G], NO_LOGIT, dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    output = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    for part in range(parts):
        own = tl.load(maxima_ptr + part * G + rows, mask=rows < G, other=NO_LOGIT)
        count = tl.load(totals_ptr + part * G + rows, mask=rows < G, other=0.0)
        partial = tl.load(parts_ptr + part * (G * D) + rows[:, None] * D + columns[None, :], mask=inside, other=0.0)
        higher = tl.maximum(maximum, own)
        shrink, weight = tl.exp2(maximum - higher), tl.exp2(own - higher)
        total = total * shrink + count * weight
        output = output * shrink[:, None] + partial * weight[:, None]
        maximum = higher
    return total, output


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "positions_stride",
        "heads",
        "capacity",
        "block_size",
        "num_selected_blocks",
        "dense_below",
        "most_chosen",
        "splits",
    ]
)
def selected_kernel(
    q_ptr,  # [B, HQ, D]
    gates_ptr,  # [B, HQ, 3]
    keys_ptr,  # [B, capacity, H, D]
    values_ptr,
    positions_ptr,  # [B]
    chosen_ptr,  # [B, H, most_chosen]
    others_ptr,  # [B, HQ, D] fp32
    output_ptr,  # [B, HQ, D]
    parts_ptr,  # [B, H, splits, G, D] fp32
    maxima_ptr,  # [B, H, splits, G]
    totals_ptr,
    done_ptr,  # [B, H], zero between two steps
    positions_stride,
    scale_log2,
    heads,
    capacity,
    block_size,
    num_selected_blocks,
    dense_below,
    most_chosen,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, head = row_head // heads, row_head % heads
    position = tl.load(positions_ptr + row * positions_stride).to(tl.int32)
    rows = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    in_q = (rows < G)[:, None] & (columns < D)[None, :]
    q_offset = row_head * (G * D) + rows[:, None] * D + columns[None, :]
    if (position < 0) | (position >= capacity):
        nothing = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32) + tl.where(position < 0, 0.0, float("nan"))
        tl.store(output_ptr + q_offset, nothing.to(output_ptr.dtype.element_ty), mask=in_q & (split == 0))
        return

    keys_ptr += (row * capacity * heads + head) * D
    values_ptr += (row * capacity * heads + head) * D
    chosen_ptr += row_head * most_chosen
    query = tl.load(q_ptr + q_offset, mask=in_q, other=0.0).to(keys_ptr.dtype.element_ty)
    maximum = tl.full([BLOCK_G], NO_LOGIT, dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    output = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    is_dense = position < dense_below
    is_sparse = position >= dense_below
    current = position // block_size
    num_chosen = tl.minimum(tl.maximum(num_selected_blocks, tl.minimum(current + 1, 3)), current + 1)
    end = tl.where(is_dense, position + 1, num_chosen * block_size)
    share = tl.cdiv(tl.cdiv(end, BLOCK_S), splits) * BLOCK_S
    for start in range(split * share, tl.minimum(split * share + share, end), BLOCK_S):
        index = start + tl.arange(0, BLOCK_S)
        of_chosen = (index < end) & is_sparse
        block = tl.load(chosen_ptr + index // block_size, mask=of_chosen, other=0.0).to(tl.int32)
        slot = tl.where(is_dense, index, block * block_size + index % block_size)
        seen = (index < end) & (slot <= position)
        _, maximum, total, output = fold(
            query, keys_ptr, values_ptr, slot, seen, heads * D, scale_log2, maximum, total, output, D, BLOCK_D
        )

    if SPLIT:
        first = row_head * splits
        store_part(parts_ptr, maxima_ptr, totals_ptr, first + split, maximum, total, output, G, D, BLOCK_G, BLOCK_D)
        # All of this program's writes come before its count, all of the last one's reads after its own.
        tl.debug_barrier()
        done = tl.atomic_add(done_ptr + row_head, 1.0, sem="acq_rel")  # a float, as its neighbours; exact to 2**24
        tl.debug_barrier()
        if done.to(tl.int32) != splits - 1:
            return
        tl.store(done_ptr + row_head, 0.0)
        total, output = _joined(
            parts_ptr + first * (G * D), maxima_ptr + first * G, totals_ptr + first * G, splits, G, D, BLOCK_G, BLOCK_D
        )
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    if is_sparse:
        gate = tl.load(gates_ptr + (row_head * G + rows) * 3 + 1, mask=rows < G, other=0.0).to(tl.float32)
        output = output * gate[:, None] + tl.load(others_ptr + q_offset, mask=in_q, other=0.0)
    tl.store(output_ptr + q_offset, output.to(output_ptr.dtype.element_ty), mask=in_q)
