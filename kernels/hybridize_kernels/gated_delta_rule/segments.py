"""A long sequence with few heads, cut into segments that walk at the same time.

What a segment does to the state is affine: S ↦ M S + h, with M the product of its transitions [K, K] and h where a
zero state arrives. One kernel computes M and h of every segment, another takes the states from segment to segment, and
then every segment walks from the right state. Backwards the same M, transposed, takes the gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import head_of, load_square, load_tile, segment_row, store_columns
from .within import NUM_ROWS, READ_KEY, SUM, WRITE_KEY


@triton.jit(do_not_specialize=["key_heads", "value_heads", "heads"])  # type: ignore[untyped-decorator]
def transition_kernel(
    k_ptr,  # [B·T, H, K]
    v_ptr,  # [B·T, HV, V]
    inverse_ptr,  # [NC, HS, C, C]
    rows_ptr,  # [NC, HS, NUM_ROWS, C]
    segments_ptr,  # [NS, 6]
    transition_ptr,  # [NS, HS, K, K]: M
    arriving_ptr,  # [NS, HS, K, V]: h
    key_heads,
    value_heads,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    BACKWARD_TOO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M and h are walks of K + V columns: from the identity without values, and from zero with them."""
    KEY_TILES: tl.constexpr = (K + BLOCK_V - 1) // BLOCK_V
    TILES: tl.constexpr = KEY_TILES + (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    tile_index = program % TILES
    head = (program // TILES) % heads
    segment = program // TILES // heads
    first_chunk, num_chunks, first_token, end_token, _, if_last = segment_row(segments_ptr, segment)
    key_head = head // (heads // key_heads)
    value_head = head // (heads // value_heads)
    place = tl.arange(0, C)
    column = tl.arange(0, BLOCK_K)
    has_values = tile_index >= KEY_TILES
    # What the last segment makes of its state no other segment asks; backwards its transition counts.
    num_chunks = tl.where((if_last >= 0) & (has_values | (not BACKWARD_TOO)), 0, num_chunks)
    value = (tile_index - tl.where(has_values, KEY_TILES, 0)) * BLOCK_V + tl.arange(0, BLOCK_V)
    dtype = k_ptr.dtype.element_ty
    in_values = has_values & (value < V)

    state = tl.where((column[:, None] == value[None, :]) & (tile_index < KEY_TILES), 1.0, 0.0)
    for n in range(num_chunks):
        tile = ((first_chunk + n) * heads + head).to(tl.int64)
        token = first_token + n * C
        row = tl.minimum(place, end_token - 1 - token)
        k = load_tile(head_of(k_ptr, token, key_heads, key_head, K), row * (key_heads * K), column, K, BLOCK_K != K)
        at_value = row[:, None] * (value_heads * V) + value[None, :]
        v = tl.load(head_of(v_ptr, token, value_heads, value_head, V) + at_value, mask=in_values[None, :], other=0.0)
        inverse = load_square(inverse_ptr, tile, place, C)
        factors = rows_ptr + tile * (NUM_ROWS * C)
        read_key = tl.load(factors + READ_KEY * C + place)
        write_key = tl.load(factors + WRITE_KEY * C + place)
        decay = tl.exp2(tl.load(factors + SUM * C + C - 1))
        wrong = v.to(tl.float32) - read_key[:, None] * tl.dot(k, state.to(dtype), input_precision=PRECISION)
        delta = tl.dot(inverse, wrong.to(dtype), input_precision=PRECISION)
        state = tl.dot(tl.trans(k), (write_key[:, None] * delta).to(dtype), state * decay, input_precision=PRECISION)
    at = (segment * heads + head).to(tl.int64)
    if has_values:
        store_columns(arriving_ptr + at * (K * V), state, column, value, K, V, BLOCK_K, BLOCK_V)
    else:
        store_columns(transition_ptr + at * (K * K), state, column, value, K, K, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["heads"])  # type: ignore[untyped-decorator]
def relay_kernel(
    transition_ptr,  # [NS, HS, K, K]
    arriving_ptr,  # [NS, HS, K, V]
    sequences_ptr,  # [N, 2]
    outer_ptr,  # [N, HS, K, V]: what comes from outside of the sequence
    entering_ptr,  # [NS, HS, K, V]
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SLAB: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """entering[s + 1] = M_s entering[s] + arriving[s]; backwards entering[s − 1] = M_sᵀ entering[s] + arriving[s]."""
    VALUE_TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    head = (program // VALUE_TILES) % heads
    sequence = program // VALUE_TILES // heads
    value = (program % VALUE_TILES) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = tl.load(sequences_ptr + sequence * 2)
    count = tl.load(sequences_ptr + sequence * 2 + 1)
    slab = tl.arange(0, SLAB)
    step = 1
    segment = first
    if BACKWARD:
        step = -1
        segment = first + count - 1
    for begin in tl.static_range(0, K, SLAB):
        at = (begin + slab)[:, None] * V + value[None, :]
        inside = (begin + slab < K)[:, None] & (value < V)[None, :]
        state = tl.zeros([SLAB, BLOCK_V], dtype=tl.float32)
        if HAS_OUTER:
            state = tl.load(outer_ptr + (sequence * heads + head).to(tl.int64) * (K * V) + at, mask=inside, other=0.0)
        tl.store(entering_ptr + (segment * heads + head).to(tl.int64) * (K * V) + at, state, mask=inside)
    for _ in range(1, count):
        tl.debug_barrier()  # what other threads have written is read
        here = (segment * heads + head).to(tl.int64)
        there = ((segment + step) * heads + head).to(tl.int64)
        for begin in tl.static_range(0, K, SLAB):
            target = begin + slab
            at = target[:, None] * V + value[None, :]
            inside = (target < K)[:, None] & (value < V)[None, :]
            state = tl.load(arriving_ptr + here * (K * V) + at, mask=inside, other=0.0)
            for other in tl.static_range(0, K, SLAB):
                source = other + slab
                if BACKWARD:
                    at_transition = source[None, :] * K + target[:, None]
                else:
                    at_transition = target[:, None] * K + source[None, :]
                transition = tl.load(
                    transition_ptr + here * (K * K) + at_transition,
                    mask=(target < K)[:, None] & (source < K)[None, :],
                    other=0.0,
                )
                entering = tl.load(
                    entering_ptr + here * (K * V) + source[:, None] * V + value[None, :],
                    mask=(source < K)[:, None] & (value < V)[None, :],
                    other=0.0,
                )
                state = tl.dot(transition, entering, state, input_precision=PRECISION)
            tl.store(entering_ptr + there * (K * V) + at, state, mask=inside)
        segment += step
