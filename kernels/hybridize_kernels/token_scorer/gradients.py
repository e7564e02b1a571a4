"""The gradients of one convolution: of its inputs, a convolution the other way, and of its weights, a sum over time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .convolution import COMPUTE, PRECISION, Text, strides
from .tiles import add_taps, channel_block, hashed_rows, is_kept, load_documents, padded, silu, tiles_for

PROGRAMS = 528
"""About four for each multiprocessor of a large GPU: into so many the sums over time are split."""


def input_gradient(
    text: Text, weight: Tensor, index: int, gradient: Tensor, z: Tensor | None, output: Tensor, first: int = 0
) -> None:
    """Writes the gradient of what layer `index` reads.

    gradient: `[B, H, T, C']`, of the layer's z. weight: `[H or 1, kernel, C', C]`, the layer's with channels exchanged.
    With z `[B, H, T, C]` of the layer before, `output` (of that shape) gets the gradient of that z; without, `output`
    `[B, T, H, D]` gets that of the channels `first` .. first + D.
    """
    batch, heads, time, outputs = gradient.shape
    channels = output.shape[-1]
    tile = tiles_for(channels, text.compute).inputs
    tiles = triton.cdiv(time, tile.tokens)
    with torch.cuda.device_of(gradient):
        _input_gradient_kernel[(tiles * batch * heads,)](
            gradient,
            weight,
            text.start,
            text.end,
            text.seed,
            gradient if z is None else z,
            output,
            *strides(output, of_text=z is None),
            time,
            heads,
            tiles,
            text.dilation,
            text.reach,
            first,
            text.dropped,
            text.keep_scale,
            C=outputs,
            N=channels,
            W_WIDTH=weight.shape[-1],
            LAYER=index,
            BLOCK_T=tile.tokens,
            BLOCK_C=channel_block(outputs, tile.channels),
            BLOCK_N=padded(channels),
            KERNEL=text.kernel,
            SHARED=weight.shape[0] == 1,
            TO_TEXT=z is None,
            PACKED=text.packed,
            DROPOUT=text.dropped > 0,
            COMPUTE=COMPUTE[text.compute],
            PRECISION=PRECISION,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


@triton.jit(do_not_specialize=["time", "heads", "tiles", "dilation", "reach", "first", "dropped"])  # type: ignore[untyped-decorator]
def _input_gradient_kernel(
    gradient_ptr,  # [B, H, T, C]
    w_ptr,  # [H or 1, KERNEL, C, W_WIDTH]
    start_ptr,  # [B], or [T] if PACKED
    end_ptr,
    seed_ptr,  # [1]
    z_ptr,  # [B, H, T, N]
    output_ptr,  # the same, or [B, T, H, N]
    stride_b,
    stride_h,
    stride_t,
    time,
    heads,
    tiles,
    dilation,
    reach,
    first,
    dropped,
    keep_scale,
    C: tl.constexpr,
    N: tl.constexpr,
    W_WIDTH: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KERNEL: tl.constexpr,
    SHARED: tl.constexpr,
    TO_TEXT: tl.constexpr,
    PACKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    row_head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = row_head // heads
    head = row_head % heads
    scorer = head
    if SHARED:
        scorer = head * 0
    begin = tile * BLOCK_T
    steps = tl.arange(0, BLOCK_T)
    times = begin + steps
    columns = tl.arange(0, BLOCK_N)
    in_n = (columns < N)[None, :]

    lower = 0
    upper = time
    if PACKED:
        first_token, end = load_documents(start_ptr, end_ptr, times, time)
        lower = first_token
        upper = end
    else:
        first_token = tl.load(start_ptr + row)
        end = tl.load(end_ptr + row)
    # What tap i of the output at t read, t + i · dilation − reach, gets its gradient from there: the signs turn.
    x = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    x = add_taps(
        x, gradient_ptr + (row_head * time + begin) * C, C, w_ptr + scorer * KERNEL * C * W_WIDTH + first, 0,
        begin, lower, upper, -dilation, -reach,
        gradient_ptr, 0, 0, seed_ptr, dropped, keep_scale,
        C, 0, C, N, W_WIDTH, LAYER, BLOCK_T, BLOCK_C, BLOCK_N, KERNEL, 1,
        False, False, False, COMPUTE, PRECISION, STAGES,
    )  # fmt: skip
    if DROPOUT:
        hashes = hashed_rows(seed_ptr, LAYER, row_head * time + times)
        kept = is_kept(hashes[:, None], first + columns[None, :], dropped)
        x = tl.where(kept, x * keep_scale, 0.0)
    is_token = (times >= first_token) & (times < end)
    inside = (times < time)[:, None] & in_n
    if not TO_TEXT:
        at = z_ptr + (row_head * time + begin) * N + (steps * N)[:, None] + columns[None, :]
        z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        x = x * gate * (1.0 + z * (1.0 - gate))
    # A product, not tl.where: ptxas 12.9 takes a selected fp32 accumulator for zero and drops the matrix products.
    x = x * is_token[:, None].to(tl.float32)
    output_ptr += row * stride_b + head * stride_h + begin.to(tl.int64) * stride_t
    at = output_ptr + steps[:, None] * stride_t + columns[None, :]
    tl.store(at, x.to(output_ptr.dtype.element_ty), mask=inside)


def weight_gradient(
    text: Text, index: int, gradient: Tensor, inputs: Tensor | None, scorers: int
) -> tuple[Tensor, Tensor]:
    """Gradients `[H or 1, kernel · C, C']` of the weight of layer `index` and `[H or 1, C']` of its bias, in fp32.

    gradient: `[B, H, T, C']`, of the layer's z. inputs: z of the layer before; k and v for the first.
    """
    batch, heads, time, outputs = gradient.shape
    parts = (text.k, text.v) if inputs is None else (inputs,)
    channels = parts[0].shape[-1]
    width = len(parts) * channels
    tile = tiles_for(outputs, text.compute).weights
    block_c = channel_block(channels, tile.channels)
    chunks = triton.cdiv(channels, block_c)
    # Of one scorer: all rows, all heads that it serves, all tiles of tokens; one number an item.
    items = batch * (heads // scorers) * triton.cdiv(time, tile.tokens)
    splits = max(1, min(items, PROGRAMS // (scorers * text.kernel * chunks)))
    device = gradient.device
    weight_sums = torch.empty(splits, scorers, text.kernel * width, outputs, dtype=torch.float32, device=device)
    bias_sums = torch.empty(splits, scorers, outputs, dtype=torch.float32, device=device)
    for number, part in enumerate(parts):
        with torch.cuda.device_of(gradient):
            _weight_gradient_kernel[(splits, text.kernel * chunks, scorers)](
                part,
                gradient,
                text.start,
                text.end,
                text.seed,
                weight_sums,
                bias_sums,
                *strides(part, of_text=inputs is None),
                time,
                heads,
                heads // scorers,
                items,
                text.dilation,
                text.reach,
                text.dropped,
                text.keep_scale,
                C=channels,
                FIRST=number * channels,
                WIDTH=width,
                N=outputs,
                LAYER=index,
                BLOCK_T=tile.tokens,
                BLOCK_C=block_c,
                BLOCK_N=padded(outputs),
                KERNEL=text.kernel,
                FROM_TEXT=inputs is None,
                PACKED=text.packed,
                DROPOUT=text.dropped > 0,
                COMPUTE=COMPUTE[text.compute],
                PRECISION=PRECISION,
                STAGES=tile.stages,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    return weight_sums.sum(0), bias_sums.sum(0)


@triton.jit(do_not_specialize=["time", "heads", "served", "items", "dilation", "reach", "dropped"])  # type: ignore[untyped-decorator]
def _weight_gradient_kernel(
    x_ptr,  # [B, T, H, C] keys or values, or z of the layer before: [B, H, T, C]
    gradient_ptr,  # [B, H, T, N]
    start_ptr,  # [B], or [T] if PACKED
    end_ptr,
    seed_ptr,  # [1]
    weight_sums_ptr,  # [splits, scorers, KERNEL · WIDTH, N]
    bias_sums_ptr,  # [splits, scorers, N]
    stride_b,
    stride_h,
    stride_t,
    time,
    heads,
    served,
    items,
    dilation,
    reach,
    dropped,
    keep_scale,
    C: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KERNEL: tl.constexpr,
    FROM_TEXT: tl.constexpr,
    PACKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0)
    tap = tl.program_id(1) % KERNEL
    scorer = tl.program_id(2)
    channels = tl.program_id(1) // KERNEL * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.arange(0, BLOCK_N)
    in_c = channels < C
    in_n = columns < N
    tiles = (time + BLOCK_T - 1) // BLOCK_T
    share = (items + tl.num_programs(0) - 1) // tl.num_programs(0)

    weight_sum = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
    bias_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for item in tl.range(split * share, tl.minimum(items, split * share + share), num_stages=STAGES):
        group = item // tiles
        row = (group // served).to(tl.int64)
        head = scorer + group % served
        begin = item % tiles * BLOCK_T
        steps = tl.arange(0, BLOCK_T)
        source = begin + steps + tap * dilation - reach
        lower = 0
        upper = time
        if PACKED:
            lower, upper = load_documents(start_ptr, end_ptr, begin + steps, time)
        elif FROM_TEXT:
            lower = tl.load(start_ptr + row)
            upper = tl.load(end_ptr + row)
        # Loaded with time along the second axis: nothing is transposed.
        from_here = row * stride_b + head * stride_h + (begin + tap * dilation - reach).to(tl.int64) * stride_t
        at = steps[None, :] * stride_t + channels[:, None]
        inside = ((source >= lower) & (source < upper))[None, :] & in_c[:, None]
        x = tl.load(x_ptr + from_here + at, mask=inside, other=0.0)
        if not FROM_TEXT:
            x = silu(x.to(tl.float32))
        first_row = (row * heads + head) * time
        if DROPOUT:
            hashes = hashed_rows(seed_ptr, LAYER, first_row + source)
            kept = is_kept(hashes[None, :], FIRST + channels[:, None], dropped)
            x = tl.where(kept, x.to(tl.float32) * keep_scale, 0.0)
        at = (steps * N)[:, None] + columns[None, :]
        inside = (begin + steps < time)[:, None] & in_n[None, :]
        gradient = tl.load(gradient_ptr + (first_row + begin) * N + at, mask=inside, other=0.0)
        weight_sum = tl.dot(x.to(COMPUTE), gradient, weight_sum, input_precision=PRECISION)
        bias_sum += tl.sum(gradient.to(tl.float32), axis=0)

    place = split.to(tl.int64) * tl.num_programs(2) + scorer
    rows = place * KERNEL * WIDTH + tap * WIDTH + FIRST + channels
    at = (rows * N)[:, None] + columns[None, :]
    tl.store(weight_sums_ptr + at, weight_sum, mask=in_c[:, None] & in_n[None, :])
    if FIRST == 0 and tl.program_id(1) == 0:
        tl.store(bias_sums_ptr + place * N + columns, bias_sum, mask=in_n)
