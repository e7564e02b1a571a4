"""The gradients of q, k, the gates: one program a chunk and state head, all chunks at once.

With S the entering state, dS the gradient of the leaving one, R and Z as in `walk`, D_ij = e^(g_i − g_j) for j ≤ i and
w = e^(g_C − g): a token reads the state by q̂_i, reads it again by k̂_i to correct it, and writes b_j k̂_j into it.
The gradients of the three are

    dq̂ = scale (e^g ∘ dO Sᵀ + (dO Rᵀ ∘ D b) K̂)
    F  = −e^g ∘ Z Sᵀ − (Z Rᵀ ∘ D' b) K̂                                          D' without its diagonal
    E  = w ∘ R dSᵀ + (R dOᵀ ∘ Dᵀ) scale Q̂ − (R Zᵀ ∘ D'ᵀ) K̂

so that dk̂ = F + b E, db = k̂·E, and a token's sum of log decays gets q̂·dq̂ + k̂·F − b k̂·E. Products that are needed
both ways stand on the right where they are needed transposed, so that Eᵀ is what is summed: an accumulator that is
transposed into a product is what some versions of Triton compile wrongly for Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import head_of, load_columns, load_tile
from .within import NUM_ROWS, SUM, SUM_REST, UNIT_KEY, UNIT_QUERY, decay_between


@triton.jit(do_not_specialize=["query_heads", "key_heads", "heads"])  # type: ignore[untyped-decorator]
def input_gradient_kernel(
    q_ptr,  # [B·T, HQ, K]
    k_ptr,  # [B·T, H, K]
    beta_ptr,  # [B·T, HS]
    delta_ptr,  # [B·T, HS, V]: R
    d_output_ptr,  # [B·T, HS, V]
    d_value_ptr,  # [B·T, HS, V]: Z
    rows_ptr,  # [NC, HS, NUM_ROWS, C]
    chunks_ptr,  # [NC, 2]
    states_ptr,  # [NC, HS, K, V]
    d_states_ptr,  # [NC, HS, K, V]
    d_query_ptr,  # [B·T, HS, K]
    d_key_ptr,  # [B·T, HS, K]
    d_log_decay_ptr,  # [B·T, HS]
    d_beta_ptr,  # [B·T, HS]
    scale,
    query_heads,
    key_heads,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program // heads
    head = program % heads
    num_tokens = tl.load(chunks_ptr + chunk * 2 + 1)
    if num_tokens > 0:
        first = tl.load(chunks_ptr + chunk * 2)
        place = tl.arange(0, C)
        inside = place < num_tokens
        last_row = tl.minimum(place, num_tokens - 1)
        column = tl.arange(0, BLOCK_K)
        dtype = k_ptr.dtype.element_ty
        tile = (chunk * heads + head).to(tl.int64)
        row = rows_ptr + tile * (NUM_ROWS * C)
        sums = tl.load(row + SUM * C + place)
        rest = tl.load(row + SUM_REST * C + place) if EXACT else sums
        unit_query = tl.load(row + UNIT_QUERY * C + place)
        unit_key = tl.load(row + UNIT_KEY * C + place)
        beta = tl.load(head_of(beta_ptr, first, heads, head, 1) + last_row * heads).to(tl.float32)
        beta = tl.where(inside, beta, 0.0)
        end = tl.load(row + SUM * C + C - 1)
        until_end = end - sums
        if EXACT:
            until_end += tl.load(row + SUM_REST * C + C - 1) - rest
        from_start = tl.exp2(sums)
        written = beta * unit_key
        value_row = last_row * (heads * V)
        output_base = head_of(d_output_ptr, first, heads, head, V)
        delta_base = head_of(delta_ptr, first, heads, head, V)
        value_base = head_of(d_value_ptr, first, heads, head, V)
        q_base = head_of(q_ptr, first, query_heads, head // (heads // query_heads), K)
        k_base = head_of(k_ptr, first, key_heads, head // (heads // key_heads), K)
        state_base = states_ptr + tile * (K * V)
        d_state_base = d_states_ptr + tile * (K * V)

        q = load_tile(q_base, last_row * (query_heads * K), column, K, BLOCK_K != K)
        k = load_tile(k_base, last_row * (key_heads * K), column, K, BLOCK_K != K)
        scores = tl.zeros([C, C], dtype=tl.float32)
        values = tl.zeros([C, C], dtype=tl.float32)
        d_query = tl.zeros([C, BLOCK_K], dtype=tl.float32)
        d_read = tl.zeros([C, BLOCK_K], dtype=tl.float32)
        d_write = tl.zeros([BLOCK_K, C], dtype=tl.float32)
        overlap = tl.zeros([BLOCK_K], dtype=tl.float32)
        for begin in range(0, V, BLOCK_V):
            value = begin + tl.arange(0, BLOCK_V)
            d_output = load_tile(output_base, value_row, value, V, V % BLOCK_V != 0)
            delta = load_tile(delta_base, value_row, value, V, V % BLOCK_V != 0)
            d_value = load_tile(value_base, value_row, value, V, V % BLOCK_V != 0)
            state = load_columns(state_base, column, value, K, V, BLOCK_K, BLOCK_V)
            d_state = load_columns(d_state_base, column, value, K, V, BLOCK_K, BLOCK_V)
            scores = tl.dot(d_output, tl.trans(delta), scores, input_precision=PRECISION)
            values = tl.dot(d_value, tl.trans(delta), values, input_precision=PRECISION)
            d_query = tl.dot(d_output, tl.trans(state), d_query, input_precision=PRECISION)
            d_read = tl.dot(d_value, tl.trans(state), d_read, input_precision=PRECISION)
            d_write = tl.dot(d_state, tl.trans(delta), d_write, input_precision=PRECISION)
            overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)

        # Queries: against the entering state, and against what the chunk's tokens wrote before.
        factor = decay_between(sums, rest, place[:, None] >= place[None, :], EXACT)
        scores *= factor
        asked = (scores * (scale * unit_query)[:, None]).to(dtype)
        scores = (scores * written[None, :]).to(dtype)
        d_query = tl.dot(scores, k, d_query * from_start[:, None], input_precision=PRECISION) * scale
        along_query = unit_query * tl.sum(d_query * q.to(tl.float32), axis=1)
        if NORMALIZE:
            d_query -= (along_query * unit_query)[:, None] * q.to(tl.float32)
            d_query *= unit_query[:, None]
        writable = inside[:, None] & (column < K)[None, :]
        at_key = place[:, None] * (heads * K) + column[None, :]
        d_query_base = head_of(d_query_ptr, first, heads, head, K)
        tl.store(d_query_base + at_key, d_query.to(d_query_ptr.dtype.element_ty), mask=writable)

        # Keys as readers.
        values *= tl.where(place[:, None] > place[None, :], -factor, 0.0)
        corrected = (values * unit_key[:, None]).to(dtype)
        values = (values * written[None, :]).to(dtype)
        d_read = tl.dot(values, k, d_read * -from_start[:, None], input_precision=PRECISION)

        # Keys as writers, transposed.
        d_write *= tl.exp2(until_end)[None, :]
        # The decay of the whole chunk: of the entering state, and of all that was written.
        d_end = tl.exp2(end) * tl.sum(overlap, axis=0)
        d_end += tl.sum(tl.sum(tl.trans(k).to(tl.float32) * d_write, axis=0) * written, axis=0)
        d_write = tl.dot(tl.trans(q), asked, d_write, input_precision=PRECISION)
        d_write = tl.trans(tl.dot(tl.trans(k), corrected, d_write, input_precision=PRECISION))

        along_read = unit_key * tl.sum(d_read * k.to(tl.float32), axis=1)
        along_write = unit_key * tl.sum(d_write * k.to(tl.float32), axis=1)
        d_key = d_read + beta[:, None] * d_write
        if NORMALIZE:
            d_key -= ((along_read + beta * along_write) * unit_key)[:, None] * k.to(tl.float32)
            d_key *= unit_key[:, None]
        d_key_base = head_of(d_key_ptr, first, heads, head, K)
        tl.store(d_key_base + at_key, d_key.to(d_key_ptr.dtype.element_ty), mask=writable)

        d_sum = along_query + along_read - beta * along_write + tl.where(place == C - 1, d_end, 0.0)
        d_log_decay = tl.cumsum(d_sum, axis=0, reverse=True)
        d_beta = head_of(d_beta_ptr, first, heads, head, 1) + place * heads
        tl.store(d_beta, along_write.to(d_beta_ptr.dtype.element_ty), mask=inside)
        d_decay = head_of(d_log_decay_ptr, first, heads, head, 1) + place * heads
        tl.store(d_decay, d_log_decay.to(d_log_decay_ptr.dtype.element_ty), mask=inside)
