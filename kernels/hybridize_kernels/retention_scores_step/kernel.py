"""The scores that a decoding step completes, of all layers in one Triton launch.

A program owns some rows of one head of one layer. What it does to the history is what `token_scorer/step.py` does; the
scores go where the layer's next steps look for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..retention_decision.kernel import _nearest_even, _score
from ..token_scorer.step import logits_of_rows, of_every_layer, step_constants


def retention_scores_step(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    scores: Tensor,
    positions: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    dilation: int,
    window: int,
    threshold: Tensor | None,
    score: str,
    steps_per_unit: float,
) -> None:
    """See `hybridize_kernels.retention_scores_step`; for at most 4 convolutions and a kernel above 1."""
    layers, batch, heads, head_size = k.shape
    if k.numel() == 0:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    scorers, kernel = weights[0].shape[1], weights[0].shape[2] // (2 * head_size)
    parameters = [_whole_layers(x) for x in (*of_every_layer(weights), *of_every_layer(biases))]
    parameters += [_whole_layers(output_weight), _whole_layers(output_bias)]
    constants = step_constants(scorers, kernel, head_size, biases)
    blocks = triton.cdiv(batch, constants["BLOCK_B"])
    launch(
        _scores_kernel,
        (layers * heads * blocks,),
        (
            *(k, v, history, scores, positions),
            scores if threshold is None else threshold.contiguous(),
            *parameters,
        ),
        (
            *(*k.stride()[:3], *v.stride()[:3], positions.stride(0)),
            *(x.stride(0) for x in parameters),
            *(steps_per_unit, 1.0 / steps_per_unit),
            *(batch, heads, blocks, dilation, window, history.shape[3], scores.shape[3]),
        ),
        THRESHOLD=threshold is not None,
        SIGMOID=score == "sigmoid",
        **constants,
    )


def _whole_layers(x: Tensor) -> Tensor:
    """x `[L, ...]` itself if each layer's numbers lie in order, even where all layers' are the same."""
    return x if x[0].is_contiguous() else x.contiguous()


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["positions_stride", "batch", "heads", "blocks", "dilation", "window", "slots"]
)
def _scores_kernel(
    k_ptr,  # [L, B, H, D]
    v_ptr,
    history_ptr,  # [L, B, H, width]
    scores_ptr,  # [L, B, H, W + C]
    positions_ptr,  # [B]
    threshold_ptr,  # [L, H]
    w0_ptr,  # [L, H or 1, KERNEL · 2 D, N0]
    w1_ptr,
    w2_ptr,
    w3_ptr,
    bias0_ptr,  # [L, H or 1, N0]
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    output_weight_ptr,  # [L, H or 1, N]
    output_bias_ptr,  # [L, H or 1]
    k_stride_l,
    k_stride_b,
    k_stride_h,
    v_stride_l,
    v_stride_b,
    v_stride_h,
    positions_stride,
    w0_stride,  # of layers, as the ones below
    w1_stride,
    w2_stride,
    w3_stride,
    bias0_stride,
    bias1_stride,
    bias2_stride,
    bias3_stride,
    output_weight_stride,
    output_bias_stride,
    steps_per_unit,
    unit,
    batch,
    heads,
    blocks,
    dilation,
    window,
    history_width,
    slots,
    THRESHOLD: tl.constexpr,
    SIGMOID: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
    BLOCK_N0: tl.constexpr,
    BLOCK_N1: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_N3: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    KERNEL: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    layer_head = tl.program_id(0) // blocks
    layer = (layer_head // heads).to(tl.int64)  # offsets pass 2**31 long before memory ends
    head = layer_head % heads
    rows = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    scorer = head
    if SHARED:
        scorer = head * 0
    position = tl.load(positions_ptr + rows * positions_stride, mask=rows < batch, other=-1).to(tl.int32)
    takes = position >= 0
    of_head = (layer * batch + rows) * heads + head
    x = logits_of_rows(
        k_ptr + layer * k_stride_l + rows * k_stride_b + head * k_stride_h,
        v_ptr + layer * v_stride_l + rows * v_stride_b + head * v_stride_h,
        history_ptr + of_head * history_width, takes, takes, tl.maximum(position, 0), dilation, scorer,
        w0_ptr + layer * w0_stride, w1_ptr + layer * w1_stride, w2_ptr + layer * w2_stride, w3_ptr + layer * w3_stride,
        bias0_ptr + layer * bias0_stride, bias1_ptr + layer * bias1_stride,
        bias2_ptr + layer * bias2_stride, bias3_ptr + layer * bias3_stride,
        output_weight_ptr + layer * output_weight_stride, output_bias_ptr + layer * output_bias_stride,
        D, BLOCK_D, N0, N1, N2, N3, BLOCK_N0, BLOCK_N1, BLOCK_N2, BLOCK_N3,
        LAYERS, BLOCK_B, BLOCK_C, KERNEL, PRECISION, STAGES,
    )  # fmt: skip
    if THRESHOLD:
        x -= tl.load(threshold_ptr + layer * heads + head).to(tl.float32)
    score = _nearest_even(_score(x, SIGMOID) * steps_per_unit) * unit
    final = position - LAYERS * ((KERNEL - 1) * dilation // 2)
    tl.store(scores_ptr + of_head * slots + tl.maximum(final, 0) % window, score, mask=takes & (final >= 0))
