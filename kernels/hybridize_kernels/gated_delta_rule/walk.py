"""The state on its way over the chunks, forward, and its gradient on the way back.

A program owns a segment, a state head and a tile of value columns: columns of the state never meet, so it stays in
registers. With S the entering state, T and P as in `within`, and factors on rows in the names used there:

    R = T (V − read_key ∘ K S),    O = read_query ∘ (Q S) + P R,    S ← e^(g_C) S + Kᵀ (write_key ∘ R)

and backwards, dS being the gradient of the leaving state, with dV = Z:

    Z = Tᵀ (Pᵀ dO + write_key ∘ K dS),    dS ← e^(g_C) dS + Qᵀ (read_query ∘ dO) − Kᵀ (read_key ∘ Z)

Every product has its left side from memory: none is a transposed or rounded accumulator, which some versions of Triton
compile wrongly for Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import head_of, load_square, load_tile, read_state, segment_row, store_columns, write_state
from .within import NUM_ROWS, READ_KEY, READ_QUERY, SUM, WRITE_KEY

# Where the state comes from and goes to.
NOWHERE = tl.constexpr(0)  # it is zero; it is dropped
BY_SEQUENCE = tl.constexpr(1)
BY_SEGMENT = tl.constexpr(2)


@triton.jit(do_not_specialize=["query_heads", "key_heads", "value_heads", "heads"])  # type: ignore[untyped-decorator]
def forward_kernel(
    q_ptr,  # [B·T, HQ, K]
    k_ptr,  # [B·T, H, K]
    v_ptr,  # [B·T, HV, V]
    inverse_ptr,  # [NC, HS, C, C]
    scores_ptr,
    rows_ptr,  # [NC, HS, NUM_ROWS, C]
    segments_ptr,  # [NS, 6]
    initial_ptr,  # [N or NS, HS, K, V]
    final_ptr,  # [N or NS, HS, K, V]
    output_ptr,  # [B·T, HS, V]
    delta_ptr,  # [B·T, HS, V]: R
    states_ptr,  # [NC, HS, K, V]: the entering states
    query_heads,
    key_heads,
    value_heads,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    COMING: tl.constexpr,
    GOING: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    VALUE_TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    value_tile = program % VALUE_TILES
    head = (program // VALUE_TILES) % heads
    segment = program // VALUE_TILES // heads
    first_chunk, num_chunks, first_token, end_token, if_first, if_last = segment_row(segments_ptr, segment)
    query_head = head // (heads // query_heads)
    key_head = head // (heads // key_heads)
    value_head = head // (heads // value_heads)
    place = tl.arange(0, C)
    column = tl.arange(0, BLOCK_K)
    value = value_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    dtype = k_ptr.dtype.element_ty

    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if COMING == BY_SEGMENT:
        state = read_state(initial_ptr, segment, heads, head, column, value, K, V, BLOCK_K, BLOCK_V)
    if COMING == BY_SEQUENCE:
        state = read_state(initial_ptr, if_first, heads, head, column, value, K, V, BLOCK_K, BLOCK_V)
    for n in range(num_chunks):
        tile = ((first_chunk + n) * heads + head).to(tl.int64)
        token = first_token + n * C
        # Places beyond the end read the last token; their factors are 0.
        row = tl.minimum(place, end_token - 1 - token)
        k_base = head_of(k_ptr, token, key_heads, key_head, K)
        k = load_tile(k_base, row * (key_heads * K), column, K, BLOCK_K != K)
        v_base = head_of(v_ptr, token, value_heads, value_head, V)
        v = load_tile(v_base, row * (value_heads * V), value, V, V % BLOCK_V != 0)
        q_base = head_of(q_ptr, token, query_heads, query_head, K)
        q = load_tile(q_base, row * (query_heads * K), column, K, BLOCK_K != K)
        inverse = load_square(inverse_ptr, tile, place, C)
        scores = load_square(scores_ptr, tile, place, C)
        factors = rows_ptr + tile * (NUM_ROWS * C)
        read_key = tl.load(factors + READ_KEY * C + place)
        read_query = tl.load(factors + READ_QUERY * C + place)
        write_key = tl.load(factors + WRITE_KEY * C + place)
        decay = tl.exp2(tl.load(factors + SUM * C + C - 1))

        rounded = state.to(dtype)
        if STORE:
            store_columns(states_ptr + tile * (K * V), rounded, column, value, K, V, BLOCK_K, BLOCK_V)
        wrong = v.to(tl.float32) - read_key[:, None] * tl.dot(k, rounded, input_precision=PRECISION)
        delta = tl.dot(inverse, wrong.to(dtype), input_precision=PRECISION)
        output = read_query[:, None] * tl.dot(q, rounded, input_precision=PRECISION)
        output = tl.dot(scores, delta.to(dtype), output, input_precision=PRECISION)
        state = tl.dot(tl.trans(k), (write_key[:, None] * delta).to(dtype), state * decay, input_precision=PRECISION)
        writable = (place < end_token - token)[:, None] & (value < V)[None, :]
        at = place[:, None] * (heads * V) + value[None, :]
        out = head_of(output_ptr, token, heads, head, V)
        tl.store(out + at, output.to(output_ptr.dtype.element_ty), mask=writable)
        if STORE:
            tl.store(head_of(delta_ptr, token, heads, head, V) + at, delta.to(dtype), mask=writable)
    if GOING == BY_SEQUENCE:
        write_state(final_ptr, if_last, heads, head, state, column, value, K, V, BLOCK_K, BLOCK_V)


@triton.jit(do_not_specialize=["query_heads", "key_heads", "heads"])  # type: ignore[untyped-decorator]
def backward_kernel(
    q_ptr,  # [B·T, HQ, K]
    k_ptr,  # [B·T, H, K]
    d_output_ptr,  # [B·T, HS, V]
    inverse_ptr,  # [NC, HS, C, C]
    scores_ptr,
    rows_ptr,  # [NC, HS, NUM_ROWS, C]
    segments_ptr,  # [NS, 6]
    d_final_ptr,  # [N or NS, HS, K, V]
    d_initial_ptr,  # [N or NS, HS, K, V]
    d_value_ptr,  # [B·T, HS, V]
    d_states_ptr,  # [NC, HS, K, V]: the gradients of the leaving states
    query_heads,
    key_heads,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    COMING: tl.constexpr,
    GOING: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    VALUE_TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    value_tile = program % VALUE_TILES
    head = (program // VALUE_TILES) % heads
    segment = program // VALUE_TILES // heads
    first_chunk, num_chunks, first_token, end_token, if_first, if_last = segment_row(segments_ptr, segment)
    if GOING == BY_SEGMENT:  # nobody asks what a sequence's first segment hands back
        num_chunks = tl.where(if_first >= 0, 0, num_chunks)
    query_head = head // (heads // query_heads)
    key_head = head // (heads // key_heads)
    place = tl.arange(0, C)
    column = tl.arange(0, BLOCK_K)
    value = value_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    dtype = k_ptr.dtype.element_ty

    d_state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if COMING == BY_SEGMENT:
        d_state = read_state(d_final_ptr, segment, heads, head, column, value, K, V, BLOCK_K, BLOCK_V)
    if COMING == BY_SEQUENCE:
        d_state = read_state(d_final_ptr, if_last, heads, head, column, value, K, V, BLOCK_K, BLOCK_V)
    for m in range(num_chunks):
        n = num_chunks - 1 - m
        tile = ((first_chunk + n) * heads + head).to(tl.int64)
        token = first_token + n * C
        # Places beyond the end read the last token; their factors are 0.
        row = tl.minimum(place, end_token - 1 - token)
        k_base = head_of(k_ptr, token, key_heads, key_head, K)
        k = load_tile(k_base, row * (key_heads * K), column, K, BLOCK_K != K)
        d_output_base = head_of(d_output_ptr, token, heads, head, V)
        d_output = load_tile(d_output_base, row * (heads * V), value, V, V % BLOCK_V != 0)
        q_base = head_of(q_ptr, token, query_heads, query_head, K)
        q = load_tile(q_base, row * (query_heads * K), column, K, BLOCK_K != K)
        inverse = load_square(inverse_ptr, tile, place, C)
        scores = load_square(scores_ptr, tile, place, C)
        factors = rows_ptr + tile * (NUM_ROWS * C)
        read_key = tl.load(factors + READ_KEY * C + place)
        read_query = tl.load(factors + READ_QUERY * C + place)
        write_key = tl.load(factors + WRITE_KEY * C + place)
        decay = tl.exp2(tl.load(factors + SUM * C + C - 1))

        rounded = d_state.to(dtype)
        if STORE:
            store_columns(d_states_ptr + tile * (K * V), rounded, column, value, K, V, BLOCK_K, BLOCK_V)
        d_delta = write_key[:, None] * tl.dot(k, rounded, input_precision=PRECISION)
        d_delta = tl.dot(tl.trans(scores), d_output, d_delta, input_precision=PRECISION)
        d_value = tl.dot(tl.trans(inverse), d_delta.to(dtype), input_precision=PRECISION)
        asked = (read_query[:, None] * d_output.to(tl.float32)).to(dtype)
        d_state = tl.dot(tl.trans(q), asked, d_state * decay, input_precision=PRECISION)
        d_state = tl.dot(tl.trans(k), (-read_key[:, None] * d_value).to(dtype), d_state, input_precision=PRECISION)
        if STORE:
            writable = (place < end_token - token)[:, None] & (value < V)[None, :]
            at = place[:, None] * (heads * V) + value[None, :]
            out = head_of(d_value_ptr, token, heads, head, V)
            tl.store(out + at, d_value.to(d_value_ptr.dtype.element_ty), mask=writable)
    if GOING == BY_SEGMENT:
        write_state(d_initial_ptr, segment, heads, head, d_state, column, value, K, V, BLOCK_K, BLOCK_V)
    if GOING == BY_SEQUENCE:
        write_state(d_initial_ptr, if_first, heads, head, d_state, column, value, K, V, BLOCK_K, BLOCK_V)
