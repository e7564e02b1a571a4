"""One convolution of the scorer as a kernel, with what follows it: mask, storage, projection.

Between layers lies z, the convolution before SiLU, `[B, H, T, C]` and zero at padding; the next layer applies SiLU as
it loads (SiLU(0) = 0), and the backward pass needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from ..launch import launch
from .tiles import Tiles, add_taps, channel_block, load_documents, padded, tiles_for

COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PRECISION = "tf32x3"
"""Of fp32 products: each is three products of shorter parts on the matrix units, within fp32's own rounding."""


class Text(NamedTuple):
    """What one call scores.

    Attributes:
        k, v: `[B, T, H, D]`, the channels of a token side by side in memory.
        start, end: `[B]` int32, between which columns a row's tokens lie; of a packed row `[T]`, between which the
            document of each token lies. None: every column is a token of the row's one text, or it is streamed.
        packed: whether documents lie side by side.
        dropped: of 2**24, how many numbers dropout zeroes; seed: `[1]` int64, which ones, None for none.
        compute: type of the products' factors, and of z.
        override: of the table of tiles, see `tiles.VARIABLE`.
        history, num_before: of a streaming call.
    """

    k: Tensor
    v: Tensor
    start: Tensor | None
    end: Tensor | None
    packed: bool
    kernel: int
    dilation: int
    dropped: int
    seed: Tensor | None
    compute: torch.dtype
    override: str | None
    history: Tensor | None = None
    num_before: Tensor | None = None

    @property
    def reach(self) -> int:
        """Tokens to the left of a centred convolution's middle tap."""
        return self.dilation * (self.kernel - 1) // 2

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropped / 2**24)

    @property
    def bounded(self) -> str:
        """What `start` and `end` bound: "nothing", the tokens of "rows", or those of packed "documents"."""
        return "documents" if self.packed else "nothing" if self.start is None else "rows"

    def tiles(self, outputs: int, *, exact: bool = False) -> Tiles:
        """Those of a convolution to so many channels."""
        return tiles_for(outputs, self.compute, exact, self.override)

    @staticmethod
    def strides(x: Tensor) -> tuple[int, int, int]:
        """Of row, head and token, of `[B, T, H, D]`."""
        return x.stride(0), x.stride(2), x.stride(1)

    def strides_of_z(self, channels: int) -> tuple[int, int, int]:
        """Of row, head and token, of `[B, H, T, C]`."""
        _, time, heads, _ = self.k.shape
        return heads * time * channels, time * channels, channels

    def or_else(self, x: Tensor | None) -> Tensor:
        """x, or where it is not there, any tensor, which is not read, for its place among a kernel's pointers."""
        return self.k if x is None else x


class Layer(NamedTuple):
    """weight: the numbers `[H or 1, kernel · C, C']` in the type of the products; bias: `[H or 1, C']`.

    inputs: C, of the first layer 2 D. given: type of the weight as it was given.
    """

    weight: Tensor
    bias: Tensor
    inputs: int
    given: torch.dtype


class Projection(NamedTuple):
    """The last layer's: weight `[H or 1, C]` and bias `[H or 1]`, logits `[B, T, H]` in fp32.

    With `partial` `[B, tiles, H · (C + 1)]`, logits are their gradient: the kernel stores the gradient of z, and in
    `partial` each tile's sums of the gradients of all weights, then of all biases.
    """

    weight: Tensor
    bias: Tensor
    logits: Tensor
    partial: Tensor | None = None


def convolve(
    text: Text,
    layers: Sequence[Layer],
    index: int,
    inputs: Tensor | None,
    output: Tensor | None,
    last: Projection | None,
) -> None:
    """Runs layer `index` on z of the layer before (`inputs`; k and v for the first), writing z to `output`.

    Of z, here and in the backward pass, the numbers count and not the shape: `[B, H, T, C]`, contiguous.
    """
    batch, time, heads, head_size = text.k.shape
    layer = layers[index]
    scorers, outputs = layer.bias.shape
    from_text = inputs is None
    x, y = (text.k, text.v) if inputs is None else (inputs, inputs)
    streaming = text.history is not None
    exact = is_exact(text, index)
    weight = layer.weight
    if exact:  # of a bf16 weight the first part is all
        weight = weight.bfloat16()[None] if layer.given == torch.bfloat16 else in_parts(weight)
    tile = text.tiles(outputs, exact=exact).convolution
    tiles = cdiv(time, tile.tokens)
    nothing = text.or_else(None)
    launch(
        _convolution_kernel,
        (tiles * batch * heads,),
        (
            x,
            y,
            weight,
            layer.bias,
            text.or_else(text.start),
            text.or_else(text.end),
            text.or_else(text.history),
            text.or_else(text.num_before),
            text.or_else(text.seed),
            text.or_else(output),
            *((nothing,) * 3 if last is None else last[:3]),
            nothing if last is None else text.or_else(last.partial),
        ),
        (
            *(text.strides(x) if from_text else text.strides_of_z(layer.inputs)),
            *(text.strides(y) if from_text else text.strides_of_z(layer.inputs)),
            time,
            heads,
            tiles,
            text.dilation,
            2 * text.reach if streaming else text.reach,
            (index + 1) * text.reach,
            0 if text.history is None else text.history.shape[-1],
            2 * text.reach * sum(before.inputs for before in layers[:index]) if streaming else 0,
            text.dropped,
            text.keep_scale,
            weight.stride(0) if exact else 0,
        ),
        C=head_size if from_text else layer.inputs,
        N=outputs,
        LAYER=index,
        BLOCK_T=tile.tokens,
        BLOCK_C=channel_block(head_size if from_text else layer.inputs, tile.channels),
        BLOCK_N=padded(outputs),
        KERNEL=text.kernel,
        SPLITS=weight.shape[0] if exact else 1,
        SHARED=scorers == 1,
        FROM_TEXT=from_text,
        DROPOUT=text.dropped > 0,
        HISTORY=streaming,
        BOUNDED=text.bounded,
        MODE="store" if last is None else "logits" if last.partial is None else "gradient",
        COMPUTE=COMPUTE[weight.dtype],
        PRECISION=PRECISION,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def is_exact(text: Text, index: int) -> bool:
    """Whether layer `index` multiplies bf16 keys and values by an fp32 weight in parts."""
    return index == 0 and text.k.dtype == torch.bfloat16 and text.compute == torch.float32 and not text.dropped


def in_parts(weight: Tensor) -> Tensor:
    """`[3, ...]` bf16 parts of 8 bits each, whose sum is the fp32 weight.

    Their products with bf16 keys and values are exact in fp32, at the matrix units' rate for bf16.
    """
    parts = []
    for _ in range(3):
        parts.append(weight.bfloat16())
        weight = weight - parts[-1].float()
    return torch.stack(parts)


_RUNTIME = ["time", "heads", "tiles", "dilation", "left", "delay", "history_width", "history_start", "dropped"]


@triton.jit(do_not_specialize=_RUNTIME)  # type: ignore[untyped-decorator]
def _convolution_kernel(
    x_ptr,  # [B, T, H, C] keys, or z of the layer before: [B, H, T, C]
    y_ptr,  # values
    w_ptr,  # [SPLITS, H or 1, KERNEL · width, N]
    bias_ptr,  # [H or 1, N]
    start_ptr,  # [B] if rows are BOUNDED, [T] if documents are
    end_ptr,
    history_ptr,  # [B, H, history_width]
    num_before_ptr,  # [B]
    seed_ptr,  # [1]
    z_ptr,  # [B, H, T, N]
    output_weight_ptr,  # [H or 1, N]
    output_bias_ptr,  # [H or 1]
    logits_ptr,  # [B, T, H]
    partial_ptr,  # [B, tiles, H · (N + 1)]
    x_stride_b,
    x_stride_h,
    x_stride_t,
    y_stride_b,
    y_stride_h,
    y_stride_t,
    time,
    heads,
    tiles,
    dilation,
    left,
    delay,
    history_width,
    history_start,
    dropped,
    keep_scale,
    w_split_stride,
    C: tl.constexpr,
    N: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KERNEL: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARED: tl.constexpr,
    FROM_TEXT: tl.constexpr,
    DROPOUT: tl.constexpr,
    HISTORY: tl.constexpr,
    BOUNDED: tl.constexpr,
    MODE: tl.constexpr,
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
    times = begin + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_N)
    in_n = columns < N
    WIDTH: tl.constexpr = 2 * C if FROM_TEXT else C

    first = 0
    end = time
    num_before = 0
    if HISTORY:
        num_before = tl.load(num_before_ptr + row).to(tl.int32)
        first = delay - num_before  # the outputs before it are of positions before the text
        history_ptr += row_head * history_width + history_start
    elif BOUNDED == "documents":
        first, end = load_documents(start_ptr, end_ptr, times, time)
    elif BOUNDED == "rows":
        first = tl.load(start_ptr + row)
        end = tl.load(end_ptr + row)
    lower = 0
    upper = time
    # z of padding is zero, but not that of another document.
    if BOUNDED == "documents" or (FROM_TEXT and BOUNDED == "rows"):
        lower = first
        upper = end
    x_ptr += row * x_stride_b + head * x_stride_h + begin.to(tl.int64) * x_stride_t
    w_ptr += scorer * KERNEL * WIDTH * N

    z = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    z = add_taps(
        z, x_ptr, x_stride_t, w_ptr, w_split_stride, begin, lower, upper, dilation, left,
        history_ptr, num_before, row_head * time, seed_ptr, dropped, keep_scale,
        C, 0, WIDTH, N, N, LAYER, BLOCK_T, BLOCK_C, BLOCK_N, KERNEL, SPLITS,
        not FROM_TEXT, DROPOUT, HISTORY, COMPUTE, PRECISION, STAGES,
    )  # fmt: skip
    if FROM_TEXT:
        y_ptr += row * y_stride_b + head * y_stride_h + begin.to(tl.int64) * y_stride_t
        z = add_taps(
            z, y_ptr, y_stride_t, w_ptr, w_split_stride, begin, lower, upper, dilation, left,
            history_ptr, num_before, row_head * time, seed_ptr, dropped, keep_scale,
            C, C, WIDTH, N, N, LAYER, BLOCK_T, BLOCK_C, BLOCK_N, KERNEL, SPLITS,
            False, DROPOUT, HISTORY, COMPUTE, PRECISION, STAGES,
        )  # fmt: skip
    z += tl.load(bias_ptr + scorer * N + columns, mask=in_n, other=0.0).to(tl.float32)[None, :]
    is_token = (times >= first) & (times < end)
    if HISTORY or BOUNDED != "nothing":  # past the row nothing is read or stored, and past N all weights are zero
        z = tl.where(is_token[:, None] & in_n[None, :], z, 0.0)

    in_time = times < time
    if MODE != "store":
        weight = tl.load(output_weight_ptr + scorer * N + columns, mask=in_n, other=0.0).to(tl.float32)
        at = logits_ptr + (row * time + times) * heads + head
        gate = tl.sigmoid(z)
        activated = z * gate
        if MODE == "logits":
            bias = tl.load(output_bias_ptr + scorer).to(tl.float32)
            logits = tl.sum(activated * weight[None, :], axis=1) + bias
            tl.store(at, logits, mask=in_time)
        else:
            gradient = tl.load(at, mask=in_time & is_token, other=0.0)
            partial = tl.sum(activated * gradient[:, None], axis=0)
            partial_ptr += (row * tiles + tile) * heads * (N + 1)
            tl.store(partial_ptr + head * N + columns, partial, mask=in_n)
            # The bias is what a padded token is given, too.
            tl.store(partial_ptr + heads * N + head, tl.sum(tl.load(at, mask=in_time, other=0.0), axis=0))
            z = gradient[:, None] * weight[None, :] * gate * (1.0 + z * (1.0 - gate))
    if MODE != "logits":
        z_ptr += (row_head * time + begin) * N
        at = z_ptr + (tl.arange(0, BLOCK_T) * N)[:, None] + columns[None, :]
        tl.store(at, z.to(z_ptr.dtype.element_ty), mask=in_time[:, None] & in_n[None, :])
