"""The gradients of the convolutions' weights and biases: sums over time, of all layers in one place.

Each program leaves its sums for itself, in the row of its split of the tokens. One sum over those rows ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .convolution import COMPUTE, PRECISION, Layer, Text
from .tiles import channel_block, hashed_rows, is_kept, load_documents, padded, silu

PROGRAMS = 528
"""About four for each multiprocessor of a large GPU: into so many the sums over time are split."""


class Layout(NamedTuple):
    """Where a row of sums holds what: weights and biases of the layers, one after the other.

    Attributes:
        sizes: numbers of each weight, then of each bias. starts: where each begins.
    """

    sizes: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.starts[-1] + self.sizes[-1]

    @property
    def layers(self) -> int:
        """How many convolutions there are."""
        return len(self.sizes) // 2


@lru_cache(maxsize=256)
def layout_of(sizes: tuple[int, ...]) -> Layout:
    """Of tensors of so many numbers, the weights first."""
    return Layout(sizes, tuple(sum(sizes[:n]) for n in range(len(sizes))))


def splits_of(text: Text, scorers: int, outputs: int) -> int:
    """Into how many parts the tokens are split, that the first layer, the widest, has programs enough."""
    batch, time, heads, head_size = text.k.shape
    tile = text.tiles(outputs).weights
    chunks = triton.cdiv(head_size, channel_block(head_size, tile.channels))
    items = batch * (heads // scorers) * triton.cdiv(time, tile.tokens)
    return max(1, min(int(items), PROGRAMS // int(scorers * text.kernel * chunks)))


def weight_gradient(
    text: Text,
    layers: Sequence[Layer],
    index: int,
    gradient: Tensor,
    inputs: Tensor | None,
    sums: Tensor,
    layout: Layout,
) -> None:
    """Writes layer `index`'s part of `sums` `[splits, layout.width]`, fp32; its sum over the splits is the gradient.

    gradient: `[B, H, T, C']`, of the layer's z. inputs: z of the layer before; k and v for the first.
    """
    batch, time, heads, head_size = text.k.shape
    scorers, outputs = layers[index].bias.shape
    from_text = inputs is None
    x, y = (text.k, text.v) if inputs is None else (inputs, inputs)
    channels, parts = (head_size, 2) if from_text else (layers[index].inputs, 1)
    tile = text.tiles(outputs).weights
    block_c = channel_block(channels, tile.channels)
    # Of one scorer: all rows, all heads that it serves, all tiles of tokens; one number an item.
    items = batch * (heads // scorers) * triton.cdiv(time, tile.tokens)
    launch(
        _weight_gradient_kernel,
        (sums.shape[0], text.kernel * triton.cdiv(channels, block_c) * parts, scorers),
        (x, y, gradient, text.or_else(text.start), text.or_else(text.end), text.or_else(text.seed), sums),
        (
            *(text.strides(x) if from_text else text.strides_of_z(channels)),
            *(text.strides(y) if from_text else text.strides_of_z(channels)),
            time,
            heads,
            heads // scorers,
            items,
            text.dilation,
            text.reach,
            text.dropped,
            text.keep_scale,
        ),
        C=channels,
        N=outputs,
        LAYER=index,
        WIDTH=layout.width,
        WEIGHT_START=layout.starts[index],
        BIAS_START=layout.starts[layout.layers + index],
        BLOCK_T=tile.tokens,
        BLOCK_C=block_c,
        BLOCK_N=padded(outputs),
        KERNEL=text.kernel,
        FROM_TEXT=from_text,
        BOUNDED=text.bounded,
        DROPOUT=text.dropped > 0,
        COMPUTE=COMPUTE[text.compute],
        PRECISION=PRECISION,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def gradients_of(sums: Tensor, layout: Layout, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' gradients, each of its parameter's shape and type."""
    pieces = sums.sum(0).split(list(layout.sizes))
    views = [piece.view(like.shape) for piece, like in zip(pieces, parameters, strict=True)]
    return [x if x.dtype == like.dtype else x.to(like.dtype) for x, like in zip(views, parameters, strict=True)]


_RUNTIME = ["time", "heads", "served", "items", "dilation", "reach", "dropped"]


@triton.jit(do_not_specialize=_RUNTIME)  # type: ignore[untyped-decorator]
def _weight_gradient_kernel(
    x_ptr,  # [B, T, H, C] keys, or z of the layer before: [B, H, T, C]
    y_ptr,  # values
    gradient_ptr,  # [B, H, T, N]
    start_ptr,  # [B] if rows are BOUNDED, [T] if documents are
    end_ptr,
    seed_ptr,  # [1]
    sums_ptr,  # [splits, WIDTH]
    x_stride_b,
    x_stride_h,
    x_stride_t,
    y_stride_b,
    y_stride_h,
    y_stride_t,
    time,
    heads,
    served,
    items,
    dilation,
    reach,
    dropped,
    keep_scale,
    C: tl.constexpr,
    N: tl.constexpr,
    LAYER: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT_START: tl.constexpr,
    BIAS_START: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KERNEL: tl.constexpr,
    FROM_TEXT: tl.constexpr,
    BOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    programs: tl.constexpr = KERNEL * ((C + BLOCK_C - 1) // BLOCK_C)
    sums_ptr += tl.program_id(0).to(tl.int64) * WIDTH
    if FROM_TEXT:
        if tl.program_id(1) < programs:
            _sum_over_time(
                x_ptr, gradient_ptr, start_ptr, end_ptr, seed_ptr, sums_ptr, x_stride_b, x_stride_h, x_stride_t,
                tl.program_id(1), time, heads, served, items, dilation, reach, dropped, keep_scale,
                C, 0, 2 * C, N, LAYER, WEIGHT_START, BIAS_START, BLOCK_T, BLOCK_C, BLOCK_N, KERNEL, False,
                BOUNDED != "nothing", BOUNDED == "documents", DROPOUT, COMPUTE, PRECISION, STAGES,
            )  # fmt: skip
        else:
            _sum_over_time(
                y_ptr, gradient_ptr, start_ptr, end_ptr, seed_ptr, sums_ptr, y_stride_b, y_stride_h, y_stride_t,
                tl.program_id(1) - programs, time, heads, served, items, dilation, reach, dropped, keep_scale,
                C, C, 2 * C, N, LAYER, WEIGHT_START, BIAS_START, BLOCK_T, BLOCK_C, BLOCK_N, KERNEL, False,
                BOUNDED != "nothing", BOUNDED == "documents", DROPOUT, COMPUTE, PRECISION, STAGES,
            )  # fmt: skip
    else:
        # z of padding is zero, and SiLU leaves it so.
        _sum_over_time(
            x_ptr, gradient_ptr, start_ptr, end_ptr, seed_ptr, sums_ptr, x_stride_b, x_stride_h, x_stride_t,
            tl.program_id(1), time, heads, served, items, dilation, reach, dropped, keep_scale,
            C, 0, C, N, LAYER, WEIGHT_START, BIAS_START, BLOCK_T, BLOCK_C, BLOCK_N, KERNEL, True,
            BOUNDED == "documents", BOUNDED == "documents", DROPOUT, COMPUTE, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _sum_over_time(
    x_ptr,  # [B, T, H, C] or [B, H, T, C], by the strides
    gradient_ptr,
    start_ptr,
    end_ptr,
    seed_ptr,
    sums_ptr,  # of this split
    stride_b,
    stride_h,
    stride_t,
    place,  # tap and channels of this program
    time,
    heads,
    served,
    items,
    dilation,
    reach,
    dropped,
    keep_scale,
    C: tl.constexpr,
    FIRST: tl.constexpr,  # these C channels are FIRST .. FIRST + C of the layer's INPUTS
    INPUTS: tl.constexpr,
    N: tl.constexpr,
    LAYER: tl.constexpr,
    WEIGHT_START: tl.constexpr,
    BIAS_START: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KERNEL: tl.constexpr,
    ACTIVATE: tl.constexpr,
    BOUNDED: tl.constexpr,  # whether inputs outside of the bounds are not read
    PACKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Σ over the split's tokens of input · gradient: one tap's [BLOCK_C, N] of the weight; with it one bias."""
    split = tl.program_id(0)
    scorer = tl.program_id(2)
    tap = place % KERNEL
    channels = place // KERNEL * BLOCK_C + tl.arange(0, BLOCK_C)
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
        elif BOUNDED:
            lower = tl.load(start_ptr + row)
            upper = tl.load(end_ptr + row)
        # Loaded with time along the second axis: nothing is transposed.
        from_here = row * stride_b + head * stride_h + (begin + tap * dilation - reach).to(tl.int64) * stride_t
        at = steps[None, :] * stride_t + channels[:, None]
        inside = ((source >= lower) & (source < upper))[None, :] & in_c[:, None]
        x = tl.load(x_ptr + from_here + at, mask=inside, other=0.0)
        if ACTIVATE:
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

    rows = WEIGHT_START + (scorer * KERNEL + tap) * (INPUTS * N) + (FIRST + channels) * N
    tl.store(sums_ptr + rows[:, None] + columns[None, :], weight_sum, mask=in_c[:, None] & in_n[None, :])
    if FIRST == 0 and place == 0:
        bias = BIAS_START + scorer * N + columns
        tl.store(sums_ptr + bias, bias_sum, mask=in_n)
