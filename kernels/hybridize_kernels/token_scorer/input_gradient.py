"""The gradient of what a convolution reads: a convolution the other way."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .convolution import COMPUTE, PRECISION, Layer, Text
from .tiles import add_taps, channel_block, hashed_rows, is_kept, load_documents, padded


def input_gradient(
    text: Text,
    layers: Sequence[Layer],
    index: int,
    weight: Tensor,
    gradient: Tensor,
    z: Tensor | None,
    output: Tensor,
    *,
    parts: int = 1,
    first: int = 0,
) -> None:
    """Writes the gradient of what layer `index` reads.

    weight: `[H or 1, kernel, C', C]`, the layer's with channels exchanged. gradient: `[B, H, T, C']`, of the layer's z.
    With z `[B, H, T, C]` of the layer before, `output` (of that shape) gets the gradient of that z; without, `output`
    `[parts, B, T, H, D]` gets those of the keys (first: 0), of the values (first: 1), or of both (parts: 2).
    """
    batch, time, heads, head_size = text.k.shape
    scorers, outputs = layers[index].bias.shape
    channels = head_size if z is None else layers[index].inputs
    tile = text.tiles(channels).inputs
    tiles = triton.cdiv(time, tile.tokens)
    launch(
        _input_gradient_kernel,
        (tiles * batch * heads * parts,),
        (
            gradient,
            weight,
            text.or_else(text.start),
            text.or_else(text.end),
            text.or_else(text.seed),
            text.or_else(z),
            output,
        ),
        (
            *((time * heads * channels, channels, heads * channels) if z is None else text.strides_of_z(channels)),
            batch * time * heads * channels,
            batch,
            time,
            heads,
            tiles,
            text.dilation,
            text.reach,
            first,
            text.dropped,
            text.keep_scale,
        ),
        C=outputs,
        N=channels,
        W_WIDTH=layers[index].inputs,
        LAYER=index,
        BLOCK_T=tile.tokens,
        BLOCK_C=channel_block(outputs, tile.channels),
        BLOCK_N=padded(channels),
        KERNEL=text.kernel,
        SHARED=scorers == 1,
        TO_TEXT=z is None,
        BOUNDED=text.bounded,
        DROPOUT=text.dropped > 0,
        COMPUTE=COMPUTE[text.compute],
        PRECISION=PRECISION,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


_RUNTIME = ["batch", "time", "heads", "tiles", "dilation", "reach", "first", "dropped"]


@triton.jit(do_not_specialize=_RUNTIME)  # type: ignore[untyped-decorator]
def _input_gradient_kernel(
    gradient_ptr,  # [B, H, T, C]
    w_ptr,  # [H or 1, KERNEL, C, W_WIDTH]
    start_ptr,  # [B] if rows are BOUNDED, [T] if documents are
    end_ptr,
    seed_ptr,  # [1]
    z_ptr,  # [B, H, T, N]
    output_ptr,  # the same, or [P, B, T, H, N]
    stride_b,
    stride_h,
    stride_t,
    stride_p,
    batch,
    time,
    heads,
    tiles,
    dilation,
    reach,
    first,  # part of the text
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
    BOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    part = (tl.program_id(0) // (batch * heads * tiles)).to(tl.int64)
    row_head = (tl.program_id(0) // tiles % (batch * heads)).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = row_head // heads
    head = row_head % heads
    scorer = head
    if SHARED:
        scorer = head * 0
    channel = (first + part) * N  # the first of those whose gradient this is
    begin = tile * BLOCK_T
    steps = tl.arange(0, BLOCK_T)
    times = begin + steps
    columns = tl.arange(0, BLOCK_N)
    in_n = (columns < N)[None, :]

    first_token = 0
    end = time
    lower = 0
    upper = time
    if BOUNDED == "documents":
        first_token, end = load_documents(start_ptr, end_ptr, times, time)
        lower = first_token
        upper = end
    elif BOUNDED == "rows":
        first_token = tl.load(start_ptr + row)
        end = tl.load(end_ptr + row)
    # What tap i of the output at t read, t + i · dilation − reach, gets its gradient from there: the signs turn.
    x = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    x = add_taps(
        x, gradient_ptr + (row_head * time + begin) * C, C, w_ptr + scorer * KERNEL * C * W_WIDTH + channel, 0,
        begin, lower, upper, -dilation, -reach,
        gradient_ptr, 0, 0, seed_ptr, dropped, keep_scale,
        C, 0, C, N, W_WIDTH, LAYER, BLOCK_T, BLOCK_C, BLOCK_N, KERNEL, 1,
        False, False, False, COMPUTE, PRECISION, STAGES,
    )  # fmt: skip
    if DROPOUT:
        hashes = hashed_rows(seed_ptr, LAYER, row_head * time + times)
        kept = is_kept(hashes[:, None], channel + columns[None, :], dropped)
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
    output_ptr += part * stride_p + row * stride_b + head * stride_h + begin.to(tl.int64) * stride_t
    at = output_ptr + steps[:, None] * stride_t + columns[None, :]
    tl.store(at, x.to(output_ptr.dtype.element_ty), mask=inside)
