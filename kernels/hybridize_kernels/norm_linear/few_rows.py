"""The kernel of few rows: a weight is streamed once past rows of x that every program reads for itself.

A program owns BLOCK_N outputs. One row of x is multiplied number by number, several are columns of matrix products.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "epsilon"])  # type: ignore[untyped-decorator]
def few_rows_kernel(
    x_ptr,  # [R, D], rows X_STRIDE apart
    weight_ptr,  # [N, D], with SWIGLU [2 N, D], rows WEIGHT_STRIDE apart
    bias_ptr,  # [N], with SWIGLU [2 N]
    norm_weight_ptr,  # [D]
    residual_ptr,  # [R, N], rows RESIDUAL_STRIDE apart
    y_ptr,  # [R, N]
    rows,
    epsilon,
    N: tl.constexpr,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.program_id(0).to(tl.int64) * BLOCK_N  # offsets pass 2**31 before memory ends
    weight_ptr += first * WEIGHT_STRIDE
    up_ptr = weight_ptr + tl.full([], N * WEIGHT_STRIDE if SWIGLU else 0, tl.int64)
    left = N - first
    n = tl.arange(0, BLOCK_N)
    bias, up_bias = 0.0, 0.0
    # Read before the products, so that nothing is waited for behind them.
    if BIAS:
        bias = tl.load(bias_ptr + first + n, mask=n < left, other=0.0).to(tl.float32)[:, None]
        if SWIGLU:
            up_bias = tl.load(bias_ptr + N + first + n, mask=n < left, other=0.0).to(tl.float32)[:, None]
    row = tl.arange(0, BLOCK_R)
    inside = (n < left)[:, None] & (row < rows)[None, :]
    residual = 0.0
    if BLOCK_R == 1:
        # The weight does not hang on the kernel before this one; x does.
        tile = _load_tile(weight_ptr, 0, left, D, WEIGHT_STRIDE, N, BLOCK_N, BLOCK_K)
        up_tile = _load_tile(up_ptr, 0, left, D, WEIGHT_STRIDE, N, BLOCK_N, BLOCK_K) if SWIGLU else tile
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if RESIDUAL:
            residual = _residual(residual_ptr, first, n, row, inside, RESIDUAL_STRIDE)
        gate, up, squares = _vector_products(
            x_ptr,
            weight_ptr,
            up_ptr,
            norm_weight_ptr,
            tile,
            up_tile,
            left,
            N,
            D,
            WEIGHT_STRIDE,
            BLOCK_N,
            BLOCK_K,
            NORM,
            SWIGLU,
        )
        if NORM:
            gate *= _inverse(squares, epsilon, D)
            up *= _inverse(squares, epsilon, D)
    else:
        if EARLY:
            _prefetch(weight_ptr, left, D, WEIGHT_STRIDE, BLOCK_N, BLOCK_K * STAGES)
            if SWIGLU:
                _prefetch(up_ptr, left, D, WEIGHT_STRIDE, BLOCK_N, BLOCK_K * STAGES)
            tl.extra.cuda.gdc_wait()
        if RESIDUAL:
            residual = _residual(residual_ptr, first, n, row, inside, RESIDUAL_STRIDE)
        gate, up = _matrix_products(
            x_ptr,
            weight_ptr,
            up_ptr,
            norm_weight_ptr,
            rows,
            left,
            epsilon,
            D,
            X_STRIDE,
            WEIGHT_STRIDE,
            BLOCK_R,
            BLOCK_N,
            BLOCK_K,
            SPLITS,
            STAGES,
            NORM,
            SWIGLU,
        )
    y = gate + bias
    if SWIGLU:
        y = y * tl.sigmoid(y) * (up + up_bias)
    y += residual
    at = row[None, :].to(tl.int64) * N + first + n[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _residual(residual_ptr, first, n, row, inside, STRIDE: tl.constexpr):
    """[BLOCK_N, BLOCK_R] of the residual stream."""
    at = row[None, :].to(tl.int64) * STRIDE + first + n[:, None]
    return tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _load_tile(
    weight_ptr,
    start,
    left,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_N, BLOCK_K] of this program's rows from column `start` on; without masks where all of it is there."""
    n = tl.arange(0, BLOCK_N)[:, None]
    k = start + tl.arange(0, BLOCK_K)[None, :]
    at = weight_ptr + n * STRIDE + k
    if N % BLOCK_N == 0 and D % BLOCK_K == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(n < left) & (k < D), other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _vector_products(
    x_ptr,
    weight_ptr,
    up_ptr,
    norm_weight_ptr,
    tile,
    up_tile,
    left,
    N: tl.constexpr,
    D: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Products [BLOCK_N, 1] of one row of x, before its norm, with rows of the weight, and the sum of its squares.

    `tile` is the weight's first; the next one is asked for before the last one is used.
    """
    LANES: tl.constexpr = BLOCK_K * weight_ptr.dtype.element_ty.primitive_bitwidth // 128
    sums = tl.zeros([BLOCK_N, LANES], dtype=tl.float32)
    up_sums = tl.zeros([BLOCK_N, LANES] if SWIGLU else [1, 1], dtype=tl.float32)
    squares = tl.zeros([BLOCK_K], dtype=tl.float32)
    last: tl.constexpr = (D - 1) // BLOCK_K * BLOCK_K
    for start in range(0, last, BLOCK_K):
        ahead = _load_tile(weight_ptr, start + BLOCK_K, left, D, WEIGHT_STRIDE, N, BLOCK_N, BLOCK_K)
        up_ahead = ahead
        if SWIGLU:
            up_ahead = _load_tile(up_ptr, start + BLOCK_K, left, D, WEIGHT_STRIDE, N, BLOCK_N, BLOCK_K)
        x, squares = _load_x(x_ptr, norm_weight_ptr, start, squares, D, BLOCK_K, NORM)
        sums += _lane_sums(tile, x, LANES)
        if SWIGLU:
            up_sums += _lane_sums(up_tile, x, LANES)
        tile, up_tile = ahead, up_ahead
    x, squares = _load_x(x_ptr, norm_weight_ptr, last, squares, D, BLOCK_K, NORM)
    sums += _lane_sums(tile, x, LANES)
    gate = tl.sum(sums, axis=1)[:, None]
    up = gate
    if SWIGLU:
        up_sums += _lane_sums(up_tile, x, LANES)
        up = tl.sum(up_sums, axis=1)[:, None]
    return gate, up, tl.sum(squares, axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _lane_sums(tile, x, LANES: tl.constexpr):
    """tile · x [BLOCK_N, LANES], added up over the 16 bytes that a thread reads of a row: it keeps one sum for them."""
    return tl.sum((tile.to(tl.float32) * x[None, :]).reshape(tile.shape[0], LANES, tile.shape[1] // LANES), axis=2)


@triton.jit  # type: ignore[untyped-decorator]
def _load_x(x_ptr, norm_weight_ptr, start, squares, D: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """x · norm weight [BLOCK_K] in fp32, and the squares so far with x's."""
    k = start + tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + k, mask=k < D, other=0.0).to(tl.float32)
    if NORM:
        squares += x * x
        x *= tl.load(norm_weight_ptr + k, mask=k < D, other=0.0).to(tl.float32)
    return x, squares


@triton.jit  # type: ignore[untyped-decorator]
def _matrix_products(
    x_ptr,
    weight_ptr,
    up_ptr,
    norm_weight_ptr,
    rows,
    left,
    epsilon,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Products [BLOCK_N, BLOCK_R] of normalised rows of x with rows of the weight.

    A tile's columns are shared out over the warps, SPLITS of them: matrix products in a batch, one a warp, added up in
    their order at the end.
    """
    # x before its norm may leave fp16's range: there its norm is taken first.
    FIRST: tl.constexpr = NORM and x_ptr.dtype.element_ty == tl.float16
    PART: tl.constexpr = BLOCK_K // SPLITS
    part = tl.arange(0, SPLITS)[:, None] * PART + tl.arange(0, PART)[None, :]
    row = tl.arange(0, BLOCK_R)[None, None, :]
    n = tl.arange(0, BLOCK_N)[None, :, None]
    squares = tl.zeros([SPLITS, PART, BLOCK_R], dtype=tl.float32)
    if FIRST:
        for start in range(0, D, BLOCK_K):
            k = (start + part)[:, :, None]
            x = tl.load(x_ptr + row * X_STRIDE + k, mask=(row < rows) & (k < D), other=0.0).to(tl.float32)
            squares += x * x
        inverse = _inverse(_row_sums(squares), epsilon, D)
    gate = tl.zeros([SPLITS, BLOCK_N, BLOCK_R], dtype=tl.float32)
    up = tl.zeros([SPLITS, BLOCK_N, BLOCK_R] if SWIGLU else [SPLITS, 1, 1], dtype=tl.float32)
    for start in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        k = start + part
        at = n * WEIGHT_STRIDE + k[:, None, :]
        there = (n < left) & (k < D)[:, None, :]
        tile = tl.load(weight_ptr + at, mask=there, other=0.0)
        column = k[:, :, None]
        x = tl.load(x_ptr + row * X_STRIDE + column, mask=(row < rows) & (column < D), other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            if FIRST:
                wide *= inverse[None, None, :]
            else:
                squares += wide * wide
            norm_weight = tl.load(norm_weight_ptr + k, mask=k < D, other=0.0).to(tl.float32)
            x = (wide * norm_weight[:, :, None]).to(x.dtype)
        gate = tl.dot(tile, x, gate, input_precision="ieee")
        if SWIGLU:
            up_tile = tl.load(up_ptr + at, mask=there, other=0.0)
            up = tl.dot(up_tile, x, up, input_precision="ieee")
    gate, up = tl.sum(gate, axis=0), tl.sum(up, axis=0)
    if NORM and not FIRST:
        inverse = _inverse(_row_sums(squares), epsilon, D)
        gate *= inverse[None, :]
        up *= inverse[None, :]
    return gate, up


@triton.jit  # type: ignore[untyped-decorator]
def _inverse(squares, epsilon, D: tl.constexpr):
    """1 / root mean square of a row from the sum of its squares."""
    return tl.rsqrt(squares * (1.0 / D) + epsilon)


@triton.jit  # type: ignore[untyped-decorator]
def _row_sums(squares):
    """[SPLITS, PART, BLOCK_R] -> [BLOCK_R]."""
    return tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _prefetch(weight_ptr, left, D: tl.constexpr, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Asks the second-level cache for the first WIDTH columns of this program's rows, a line of it at a time."""
    LINE: tl.constexpr = 128 * 8 // weight_ptr.dtype.element_ty.primitive_bitwidth
    n = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, WIDTH // LINE)[None, :] * LINE
    # No reads past the weight: a line beyond is its first once more.
    at = tl.where((n < left) & (k < D), n * STRIDE + k, 0)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(weight_ptr + at).to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
