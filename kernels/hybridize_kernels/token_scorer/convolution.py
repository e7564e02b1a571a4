"""One convolution of the scorer as a kernel, with what follows it: mask, storage, projection.

Between layers lies z, the convolution before SiLU, `[B, H, T, C]` and zero at padding; the next layer applies SiLU as
it loads (SiLU(0) = 0), and the backward pass needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import add_taps, channel_block, load_documents, padded, tiles_for

COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PRECISION = "tf32x3"
"""Of fp32 products: each is three products of shorter parts on the matrix units, within fp32's own rounding."""


@dataclass(frozen=True)
class Text:
    """What one call scores.

    Attributes:
        k, v: `[B, T, H, D]`, the channels of a token side by side in memory.
        start, end: `[B]` int32, between which columns a row's tokens lie; of a packed row `[T]`, between which the
            document of each token lies; not read in a streaming call.
        dropped: of 2**24, how many numbers dropout zeroes; seed: `[1]` int64, which ones.
        compute: type of the products' factors, and of z.
        history, num_before: of a streaming call.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    end: Tensor
    kernel: int
    dilation: int
    dropped: int
    seed: Tensor
    compute: torch.dtype
    history: Tensor | None = None
    num_before: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether documents lie side by side. (A row of one token is the same either way.)"""
        return len(self.start) != len(self.k)

    @property
    def reach(self) -> int:
        """Tokens to the left of a centred convolution's middle tap."""
        return self.dilation * (self.kernel - 1) // 2

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropped / 2**24)


@dataclass(frozen=True)
class Layer:
    """weight: `[H or 1, kernel · C, C']` in the type of the products; bias: `[H or 1, C']` in fp32.

    given: type of the weight as it was given.
    """

    weight: Tensor
    bias: Tensor
    given: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, compute: torch.dtype) -> Layer:
        return cls(weight.to(compute).contiguous(), bias.float().contiguous(), weight.dtype)


@dataclass(frozen=True)
class Projection:
    """The last layer's: weight `[H or 1, C]` and bias `[H or 1]` in fp32, logits `[B, T, H]` in fp32.

    With `partial` `[B · H, tiles, C]`, logits are their gradient: the kernel stores the gradient of z, and in `partial`
    each tile's sum of the weight's gradient.
    """

    weight: Tensor
    bias: Tensor
    logits: Tensor
    partial: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, logits: Tensor, partial: Tensor | None = None) -> Projection:
        return cls(weight.float().contiguous(), bias.float().contiguous(), logits, partial)


def convolve(
    text: Text, layers: list[Layer], index: int, inputs: Tensor | None, output: Tensor | None, last: Projection | None
) -> None:
    """Runs layer `index` on z of the layer before (`inputs`; k and v for the first), writing z to `output`."""
    batch, time, heads, head_size = text.k.shape
    layer = layers[index]
    outputs = layer.bias.shape[-1]
    parts = (text.k, text.v) if inputs is None else (inputs, inputs)
    channels = head_size if inputs is None else inputs.shape[-1]
    streaming = text.history is not None
    exact = inputs is None and text.k.dtype == torch.bfloat16 and text.compute == torch.float32 and not text.dropped
    weight = layer.weight[None]
    if exact:  # of a bf16 weight the first part is all
        weight = weight.bfloat16() if layer.given == torch.bfloat16 else in_parts(layer.weight)
    tile = tiles_for(outputs, text.compute, exact=exact).convolution
    tiles = triton.cdiv(time, tile.tokens)
    nothing = layer.bias
    mode = "store" if last is None else "logits" if last.partial is None else "gradient"
    with torch.cuda.device_of(text.k):
        _convolution_kernel[(tiles * batch * heads,)](
            *parts,
            weight,
            layer.bias,
            text.start,
            text.end,
            nothing if text.history is None else text.history,
            nothing if text.num_before is None else text.num_before,
            text.seed,
            nothing if output is None else output,
            *((nothing,) * 3 if last is None else (last.weight, last.bias, last.logits)),
            nothing if last is None or last.partial is None else last.partial,
            *strides(parts[0], of_text=inputs is None),
            *strides(parts[1], of_text=inputs is None),
            time,
            heads,
            tiles,
            text.dilation,
            2 * text.reach if streaming else text.reach,
            (index + 1) * text.reach,
            0 if text.history is None else text.history.shape[-1],
            2 * text.reach * sum(x.weight.shape[1] // text.kernel for x in layers[:index]),
            text.dropped,
            text.keep_scale,
            weight.stride(0),
            C=channels,
            N=outputs,
            LAYER=index,
            BLOCK_T=tile.tokens,
            BLOCK_C=channel_block(channels, tile.channels),
            BLOCK_N=padded(outputs),
            KERNEL=text.kernel,
            SPLITS=weight.shape[0],
            SHARED=layer.weight.shape[0] == 1,
            FROM_TEXT=inputs is None,
            DROPOUT=text.dropped > 0,
            HISTORY=streaming,
            PACKED=text.packed,
            MODE=mode,
            COMPUTE=COMPUTE[weight.dtype],
            PRECISION=PRECISION,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def in_parts(weight: Tensor) -> Tensor:
    """`[3, ...]` bf16 parts of 8 bits each, whose sum is the fp32 weight.

    Their products with bf16 keys and values are exact in fp32, at the matrix units' rate for bf16.
    """
    parts = []
    for _ in range(3):
        parts.append(weight.bfloat16())
        weight = weight - parts[-1].float()
    return torch.stack(parts)


def strides(x: Tensor, *, of_text: bool) -> tuple[int, int, int]:
    """Of row, head and token: `[B, T, H, D]` if of the text, else `[B, H, T, C]`."""
    return (x.stride(0), x.stride(2), x.stride(1)) if of_text else (x.stride(0), x.stride(1), x.stride(2))


_RUNTIME = ["time", "heads", "tiles", "dilation", "left", "delay", "history_width", "history_start", "dropped"]


@triton.jit(do_not_specialize=_RUNTIME)  # type: ignore[untyped-decorator]
def _convolution_kernel(
    x_ptr,  # [B, T, H, C] keys, or z of the layer before: [B, H, T, C]
    y_ptr,  # values
    w_ptr,  # [SPLITS, H or 1, KERNEL · width, N]
    bias_ptr,  # [H or 1, N]
    start_ptr,  # [B], or [T] if PACKED
    end_ptr,
    history_ptr,  # [B, H, history_width]
    num_before_ptr,  # [B]
    seed_ptr,  # [1]
    z_ptr,  # [B, H, T, N]
    output_weight_ptr,  # [H or 1, N]
    output_bias_ptr,  # [H or 1]
    logits_ptr,  # [B, T, H]
    partial_ptr,  # [B · H, tiles, N]
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
    PACKED: tl.constexpr,
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
    elif PACKED:
        first, end = load_documents(start_ptr, end_ptr, times, time)
    else:
        first = tl.load(start_ptr + row)
        end = tl.load(end_ptr + row)
    lower = 0
    upper = time
    if PACKED or (FROM_TEXT and not HISTORY):  # z of padding is zero, but not that of another document
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
    z += tl.load(bias_ptr + scorer * N + columns, mask=in_n, other=0.0)[None, :]
    is_token = (times >= first) & (times < end)
    z = tl.where(is_token[:, None] & in_n[None, :], z, 0.0)

    in_time = times < time
    if MODE != "store":
        weight = tl.load(output_weight_ptr + scorer * N + columns, mask=in_n, other=0.0)
        at = logits_ptr + (row * time + times) * heads + head
        gate = tl.sigmoid(z)
        activated = z * gate
        if MODE == "logits":
            logits = tl.sum(activated * weight[None, :], axis=1) + tl.load(output_bias_ptr + scorer)
            tl.store(at, logits, mask=in_time)
        else:
            gradient = tl.load(at, mask=in_time & is_token, other=0.0)
            partial = tl.sum(activated * gradient[:, None], axis=0)
            tl.store(partial_ptr + (row_head * tiles + tile) * N + columns, partial, mask=in_n)
            z = gradient[:, None] * weight[None, :] * gate * (1.0 + z * (1.0 - gate))
    if MODE != "logits":
        z_ptr += (row_head * time + begin) * N
        at = z_ptr + (tl.arange(0, BLOCK_T) * N)[:, None] + columns[None, :]
        tl.store(at, z.to(z_ptr.dtype.element_ty), mask=in_time[:, None] & in_n[None, :])
