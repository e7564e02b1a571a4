"""The gradients of q, k, the gates: one program a chunk, state head and tile of the keys, all chunks at once.

With S the entering state, dS the gradient of the leaving one, R and Z as in `walk`, D_ij = e^(g_i − g_j) for j ≤ i and
w = e^(g_C − g): a token reads the state by q̂_i, reads it again by k̂_i to correct it, and writes b_j k̂_j into it.
The gradients of the three are

    dq̂ = scale (e^g ∘ dO Sᵀ + (dO Rᵀ ∘ D b) K̂)
    F  = −e^g ∘ Z Sᵀ − (Z Rᵀ ∘ D' b) K̂                                          D' without its diagonal
    E  = w ∘ R dSᵀ + (R dOᵀ ∘ Dᵀ) scale Q̂ − (R Zᵀ ∘ D'ᵀ) K̂

so that dk̂ = F + b E, db = k̂·E, and a token's sum of log decays gets q̂·dq̂ + k̂·F − b k̂·E. Products that are needed
both ways stand on the right where they are needed transposed, so that Eᵀ is what is summed: an accumulator that is
transposed into a product is what some versions of Triton compile wrongly for Hopper.

A norm asks for q̂·dq̂ and k̂·dk̂ over all of a key. Where a key takes several tiles, no program has them; but the output
is linear in q̂, so that q̂·dq̂ = o·do, and in the same way k̂·F = −(v − r)·z and b k̂·E = r·z.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import head_of, load_columns, load_tile
from .within import NUM_ROWS, SUM, SUM_REST, UNIT_KEY, UNIT_QUERY, decay_between


@triton.jit(do_not_specialize=["query_heads", "key_heads", "value_heads", "heads", "num_gates"])  # type: ignore[untyped-decorator]
def input_gradient_kernel(
    q_ptr,  # [B·T, HQ, K]
    k_ptr,  # [B·T, H, K]
    v_ptr,  # [B·T, HV, V]
    beta_ptr,  # [B·T, HS]
    output_ptr,  # [B·T, HS, V]
    delta_ptr,  # [B·T, HS, V]: R
    d_output_ptr,  # [B·T, HS, V]
    d_value_ptr,  # [B·T, HS, V]: Z
    rows_ptr,  # [NC, HS, NUM_ROWS, C]
    chunks_ptr,  # [NC, 2]
    states_ptr,  # [NC, HS, K, V]
    d_states_ptr,  # [NC, HS, K, V]
    d_query_ptr,  # [B·T, HS, K]
    d_key_ptr,  # [B·T, HS, K]
    d_log_decay_ptr,  # [KEY_TILES, B·T, HS]
    d_beta_ptr,  # [KEY_TILES, B·T, HS]
    scale,
    query_heads,
    key_heads,
    value_heads,
    heads,
    num_gates,  # B·T·HS
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    KEY_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    key_tile = program % KEY_TILES
    head = program // KEY_TILES % heads
    chunk = program // KEY_TILES // heads
    num_tokens = tl.load(chunks_ptr + chunk * 2 + 1)
    if num_tokens > 0:
        first = tl.load(chunks_ptr + chunk * 2)
        place = tl.arange(0, C)
        inside = place < num_tokens
        last_row = tl.minimum(place, num_tokens - 1)
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
        column = key_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        q_base = head_of(q_ptr, first, query_heads, head // (heads // query_heads), K)
        k_base = head_of(k_ptr, first, key_heads, head // (heads // key_heads), K)
        v_base = head_of(v_ptr, first, value_heads, head // (heads // value_heads), V)
        output_base = head_of(output_ptr, first, heads, head, V)
        d_output_base = head_of(d_output_ptr, first, heads, head, V)
        delta_base = head_of(delta_ptr, first, heads, head, V)
        d_value_base = head_of(d_value_ptr, first, heads, head, V)
        state_base = states_ptr + tile * (K * V)
        d_state_base = d_states_ptr + tile * (K * V)

        scores = tl.zeros([C, C], dtype=tl.float32)
        values = tl.zeros([C, C], dtype=tl.float32)
        d_query = tl.zeros([C, BLOCK_K], dtype=tl.float32)
        d_read = tl.zeros([C, BLOCK_K], dtype=tl.float32)
        d_write = tl.zeros([BLOCK_K, C], dtype=tl.float32)
        held = tl.zeros([BLOCK_K], dtype=tl.float32)
        along_query = tl.zeros([C], dtype=tl.float32)
        along_key = tl.zeros([C], dtype=tl.float32)
        q = load_tile(q_base, last_row * (query_heads * K), column, K, K % BLOCK_K != 0)
        k = load_tile(k_base, last_row * (key_heads * K), column, K, K % BLOCK_K != 0)
        for begin in range(0, V, BLOCK_V):
            value = begin + tl.arange(0, BLOCK_V)
            d_output = load_tile(d_output_base, value_row, value, V, V % BLOCK_V != 0)
            delta = load_tile(delta_base, value_row, value, V, V % BLOCK_V != 0)
            d_value = load_tile(d_value_base, value_row, value, V, V % BLOCK_V != 0)
            state = load_columns(state_base, column, value, K, V, BLOCK_K, BLOCK_V)
            d_state = load_columns(d_state_base, column, value, K, V, BLOCK_K, BLOCK_V)
            scores = tl.dot(d_output, tl.trans(delta), scores, input_precision=PRECISION)
            values = tl.dot(d_value, tl.trans(delta), values, input_precision=PRECISION)
            d_query = tl.dot(d_output, tl.trans(state), d_query, input_precision=PRECISION)
            d_read = tl.dot(d_value, tl.trans(state), d_read, input_precision=PRECISION)
            d_write = tl.dot(d_state, tl.trans(delta), d_write, input_precision=PRECISION)
            held += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)
            if NORMALIZE and KEY_TILES > 1:
                output = load_tile(output_base, value_row, value, V, V % BLOCK_V != 0)
                v = load_tile(v_base, last_row * (value_heads * V), value, V, V % BLOCK_V != 0)
                along_query += tl.sum(output.to(tl.float32) * d_output.to(tl.float32), axis=1)
                along_key += tl.sum((2.0 * delta.to(tl.float32) - v.to(tl.float32)) * d_value.to(tl.float32), axis=1)

        # Queries: against the entering state, and against what the chunk's tokens wrote before.
        factor = decay_between(sums, rest, place[:, None] >= place[None, :], EXACT)
        scores *= factor
        asked = (scores * (scale * unit_query)[:, None]).to(dtype)
        scores = (scores * written[None, :]).to(dtype)
        d_query = tl.dot(scores, k, d_query * from_start[:, None], input_precision=PRECISION) * scale
        of_query = unit_query * tl.sum(d_query * q.to(tl.float32), axis=1)
        if NORMALIZE:
            d_query = _through_norm(d_query, q, unit_query, of_query if KEY_TILES == 1 else along_query)
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
        d_end = tl.exp2(end) * tl.sum(held, axis=0)
        d_end += tl.sum(tl.sum(tl.trans(k).to(tl.float32) * d_write, axis=0) * written, axis=0)
        d_write = tl.dot(tl.trans(q), asked, d_write, input_precision=PRECISION)
        d_write = tl.trans(tl.dot(tl.trans(k), corrected, d_write, input_precision=PRECISION))
        of_read = unit_key * tl.sum(d_read * k.to(tl.float32), axis=1)
        of_write = unit_key * tl.sum(d_write * k.to(tl.float32), axis=1)
        d_key = d_read + beta[:, None] * d_write
        if NORMALIZE:
            d_key = _through_norm(d_key, k, unit_key, of_read + beta * of_write if KEY_TILES == 1 else along_key)
        d_key_base = head_of(d_key_ptr, first, heads, head, K)
        tl.store(d_key_base + at_key, d_key.to(d_key_ptr.dtype.element_ty), mask=writable)

        d_sum = of_query + of_read - beta * of_write + tl.where(place == C - 1, d_end, 0.0)
        d_log_decay = tl.cumsum(d_sum, axis=0, reverse=True)
        gate = (key_tile * num_gates).to(tl.int64) + place * heads
        d_beta = head_of(d_beta_ptr, first, heads, head, 1) + gate
        tl.store(d_beta, of_write.to(d_beta_ptr.dtype.element_ty), mask=inside)
        d_decay = head_of(d_log_decay_ptr, first, heads, head, 1) + gate
        tl.store(d_decay, d_log_decay.to(d_log_decay_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _through_norm(gradient, x, unit, along):
    """The gradient of x from that of x / |x|, given 1 / |x| and its part along x / |x|."""
    return (gradient - (along * unit)[:, None] * x.to(tl.float32)) * unit[:, None]
