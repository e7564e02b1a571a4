"""What a chunk knows without the state: one program a chunk and state head.

With g the sums of log decays inside the chunk, k̂ and q̂ the keys and queries as they are used (normalised where asked):

    T = (I + A)⁻¹,                     A_ij = e^(g_i − g_j) b_j k̂_i·k̂_j          for j < i
    P_ij = scale e^(g_i − g_j) b_j q̂_i·k̂_j                                       for j ≤ i

and the factors on rows of raw q and k that let everything after this kernel work with q and k as they came.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import head_of, load_tile

# Rows of [NC, HS, NUM_ROWS, C] in fp32. Beyond a sequence's end all but the sums are 0.
READ_KEY = tl.constexpr(0)  # e^g /|k|: what a key reads of the entering state
READ_QUERY = tl.constexpr(1)  # scale e^g /|q|
WRITE_KEY = tl.constexpr(2)  # b e^(g_C − g) /|k|: what a key writes into the leaving state
SUM = tl.constexpr(3)  # g / ln 2
SUM_REST = tl.constexpr(4)  # what fp32 leaves of it: g reaches −1000, where neighbours may differ by 0.001
UNIT_QUERY = tl.constexpr(5)  # 1/|q|, or 1
UNIT_KEY = tl.constexpr(6)
NUM_ROWS = tl.constexpr(7)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def decay_between(sums, rest, where, EXACT: tl.constexpr):
    """e^(g_i − g_j) at row i and column j, 0 outside of `where`.

    Masked before the exponential, which would overflow: a difference to the future is positive.
    """
    difference = sums[:, None] - sums[None, :]
    if EXACT:
        difference += rest[:, None] - rest[None, :]
    return tl.exp2(tl.where(where, difference, float("-inf")))


@triton.jit  # type: ignore[untyped-decorator]
def _product(a, b, HALVES: tl.constexpr):
    """a · b of fp32 tensors with 11 bits of each, or as good as exact.

    On Hopper a tf32 product would store every right side transposed, number by number: fp16 has as many bits.
    """
    if HALVES:
        product = tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        product = tl.dot(a, b, input_precision="tf32x3")
    return product


@triton.jit  # type: ignore[untyped-decorator]
def unit_lower_inverse(a, C: tl.constexpr, HALVES: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A [C, C] in fp32; C is 16, 32 or 64.

    Inverses of the diagonal blocks grow from size 1: [[X, 0], [−Y A₂₁ X, Y]] is that of a block made of two, which for
    all blocks at once is W − W A' W with A' the coupling of each pair. Unlike a power series it forms nothing that is
    larger than the inverses of blocks. Up to size 16 the blocks are apart, [C / 16, 16, 16].

    HALVES: products of 11 bits, and then a step of Newton's, W − W ((I + A) W − I), whose residual has 22 bits: with
    nearly parallel keys and beta 2, what 11 bits lose would reach several percent.
    """
    BLOCKS: tl.constexpr = C // 16
    SMALL: tl.constexpr = "tf32" if HALVES else "tf32x3"
    own = tl.arange(0, BLOCKS)[:, None, None, None] == tl.arange(0, BLOCKS)[None, None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(a, [BLOCKS, 16, BLOCKS, 16]), 0.0), axis=2)
    distance = tl.arange(0, 16)[None, :, None] ^ tl.arange(0, 16)[None, None, :]
    inverses = tl.where(distance == 0, 1.0, 0.0) - tl.where(distance == 1, blocks, 0.0)
    for level in tl.static_range(1, 4):  # a coupling lies where row and column differ in this bit and none above
        coupling = tl.where((distance >> level) == 1, blocks, 0.0)
        inverses -= tl.dot(inverses, tl.dot(coupling, inverses, input_precision=SMALL), input_precision=SMALL)
    spread = tl.broadcast_to(inverses[:, :, None, :], [BLOCKS, 16, BLOCKS, 16])
    inverse = tl.reshape(tl.where(own, spread, 0.0), [C, C])
    distance = tl.arange(0, C)[:, None] ^ tl.arange(0, C)[None, :]
    coupled = a
    if HALVES:
        coupled = a.to(tl.float16)
        a_low = (a - coupled.to(tl.float32)).to(tl.float16)
    for level in tl.static_range(4, 6):
        if (1 << level) < C:
            coupling = tl.where((distance >> level) == 1, coupled, 0.0)
            inverse -= _product(inverse, _product(coupling, inverse, HALVES), HALVES)
    if HALVES:
        high = inverse.to(tl.float16)
        low = (inverse - high.to(tl.float32)).to(tl.float16)
        residual = tl.where(distance == 0, inverse - 1.0, inverse)
        residual = tl.dot(coupled, high, tl.dot(a_low, high, tl.dot(coupled, low, residual)))
        inverse -= tl.dot(high, residual.to(tl.float16))
    return inverse


@triton.jit(do_not_specialize=["query_heads", "key_heads", "heads"])  # type: ignore[untyped-decorator]
def within_kernel(
    q_ptr,  # [B·T, HQ, K]
    k_ptr,  # [B·T, H, K]
    log_decay_ptr,  # [B·T, HS]
    beta_ptr,
    chunks_ptr,  # [NC, 2]
    inverse_ptr,  # [NC, HS, C, C]
    scores_ptr,
    rows_ptr,  # [NC, HS, NUM_ROWS, C]
    scale,
    query_heads,
    key_heads,
    heads,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    HALVES: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program // heads
    head = program % heads
    num_tokens = tl.load(chunks_ptr + chunk * 2 + 1)
    if num_tokens > 0:
        first = tl.load(chunks_ptr + chunk * 2)
        place = tl.arange(0, C)
        inside = place < num_tokens
        # Places beyond the end read the last token; their factors are 0.
        last_row = tl.minimum(place, num_tokens - 1)
        q_base = head_of(q_ptr, first, query_heads, head // (heads // query_heads), K)
        k_base = head_of(k_ptr, first, key_heads, head // (heads // key_heads), K)

        gate = last_row * heads
        decay = tl.load(head_of(log_decay_ptr, first, heads, head, 1) + gate).to(tl.float32)
        decay = tl.where(inside, decay, 0.0) * LOG2_E
        beta = tl.where(inside, tl.load(head_of(beta_ptr, first, heads, head, 1) + gate).to(tl.float32), 0.0)
        if EXACT:
            exact = tl.cumsum(decay.to(tl.float64), axis=0)
            sums = exact.to(tl.float32)
            rest = (exact - sums.to(tl.float64)).to(tl.float32)
            to_end = (tl.sum(decay.to(tl.float64), axis=0) - exact).to(tl.float32)
        else:
            sums = tl.cumsum(decay, axis=0)
            rest = sums
            to_end = tl.sum(decay, axis=0) - sums

        keys = tl.zeros([C, C], dtype=tl.float32)
        scores = tl.zeros([C, C], dtype=tl.float32)
        query_square = tl.zeros([C], dtype=tl.float32)
        key_square = tl.zeros([C], dtype=tl.float32)
        for begin in tl.static_range(0, K, BLOCK_K):
            column = begin + tl.arange(0, BLOCK_K)
            k = load_tile(k_base, last_row * (key_heads * K), column, K, begin + BLOCK_K > K)
            q = load_tile(q_base, last_row * (query_heads * K), column, K, begin + BLOCK_K > K)
            keys = tl.dot(k, tl.trans(k), keys, input_precision=PRECISION)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
            if NORMALIZE:
                query_square += tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1)
                key_square += tl.sum(k.to(tl.float32) * k.to(tl.float32), axis=1)
        unit_query = tl.where(inside, 1.0, 0.0)
        unit_key = tl.where(inside, 1.0, 0.0)
        if NORMALIZE:
            unit_query *= tl.rsqrt(query_square + 1e-6)
            unit_key *= tl.rsqrt(key_square + 1e-6)

        tile = (chunk * heads + head).to(tl.int64)
        row = rows_ptr + tile * (NUM_ROWS * C) + place
        from_start = tl.exp2(sums)
        tl.store(row + READ_KEY * C, from_start * unit_key)
        tl.store(row + READ_QUERY * C, from_start * unit_query * scale)
        tl.store(row + WRITE_KEY * C, tl.exp2(to_end) * unit_key * beta)
        tl.store(row + SUM * C, sums)
        if EXACT:
            tl.store(row + SUM_REST * C, rest)
        tl.store(row + UNIT_QUERY * C, unit_query)
        tl.store(row + UNIT_KEY * C, unit_key)

        factor = decay_between(sums, rest, place[:, None] >= place[None, :], EXACT) * (unit_key * beta)[None, :]
        square = place[:, None] * C + place[None, :]
        scores = scores * (scale * unit_query)[:, None] * factor
        tl.store(scores_ptr + tile * (C * C) + square, scores.to(scores_ptr.dtype.element_ty))
        coupling = tl.where(place[:, None] > place[None, :], keys * unit_key[:, None] * factor, 0.0)
        inverse = unit_lower_inverse(coupling, C, HALVES)
        tl.store(inverse_ptr + tile * (C * C) + square, inverse.to(inverse_ptr.dtype.element_ty))
