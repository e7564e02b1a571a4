"""All layers of the scorer for one further token a row, in one kernel.

A program owns some rows of one head. The taps lie in the history, the newest one included: a layer's input is stored
there first and read back by the product, so that every product has the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .convolution import PRECISION
from .tiles import padded, silu, tiles_for, tiles_override

MAX_LAYERS = 4
"""All layers' parameters are arguments of the kernel."""


def score_one_column(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    num_new: Tensor,
    num_before: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    dilation: int,
) -> Tensor:
    """See `hybridize_kernels.token_scorer_step`; for T = 1, at most `MAX_LAYERS` layers and a kernel above 1."""
    batch, _, heads, head_size = k.shape
    logits = torch.empty(batch, 1, heads, dtype=torch.float32, device=k.device)
    constants = step_constants(weights[0].shape[0], weights[0].shape[1] // (2 * head_size), head_size, biases)
    blocks = triton.cdiv(batch, constants["BLOCK_B"])
    launch(
        _step_kernel,
        (blocks * heads,),
        (
            *(k, v, history, num_new, num_before),
            *of_every_layer([weight.contiguous() for weight in weights]),
            *of_every_layer([bias.contiguous() for bias in biases]),
            output_weight.contiguous(),
            output_bias.contiguous(),
            logits,
        ),
        (
            *(k.stride(0), k.stride(2), v.stride(0), v.stride(2)),
            *(batch, heads, blocks, dilation, history.shape[-1]),
        ),
        **constants,
    )
    return logits


def of_every_layer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One for each of `MAX_LAYERS` layers; the first stands for those that are not there and is not looked at."""
    return [*tensors, *[tensors[0]] * (MAX_LAYERS - len(tensors))]


def step_constants(scorers: int, kernel: int, head_size: int, biases: Sequence[Tensor]) -> dict[str, Any]:
    """The constants of a kernel that calls `logits_of_rows`, and its options; biases: `[..., C']`, one a layer."""
    outputs = [bias.shape[-1] for bias in biases]
    tile = tiles_for(max(outputs), torch.float32, False, tiles_override()).step
    constants: dict[str, Any] = {"D": head_size, "BLOCK_D": padded(head_size), "LAYERS": len(outputs)}
    for n in range(MAX_LAYERS):
        there = n < len(outputs)
        constants |= {f"N{n}": outputs[n] if there else 1, f"BLOCK_N{n}": padded(outputs[n]) if there else 1}
    return constants | {
        "BLOCK_B": tile.tokens,
        "BLOCK_C": tile.channels,
        "KERNEL": kernel,
        "SHARED": scorers == 1,
        "PRECISION": PRECISION,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit  # type: ignore[untyped-decorator]
def _add_stored_taps(
    z,  # [BLOCK_B, BLOCK_N]
    ring,  # [BLOCK_B] pointers to a layer's [stored, C]
    in_batch,
    number,  # [BLOCK_B], of the newest token
    stored,
    dilation,
    w_ptr,  # [KERNEL · C, N]
    FIRST: tl.constexpr,  # taps FIRST <= tap < END; the last of KERNEL is the newest token's
    END: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_N)
    chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    for part in tl.range(FIRST * chunks, END * chunks, num_stages=STAGES):
        tap = part // chunks
        channels = part % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = channels < C
        slot = (number + tap * dilation) % stored  # of token number − stored + tap · dilation
        inside = in_batch[:, None] & in_c[None, :]
        x = tl.load((ring + slot * C)[:, None] + channels[None, :], mask=inside, other=0.0)
        rows = (tap * C + channels) * N
        inside = in_c[:, None] & (columns < N)[None, :]
        w = tl.load(w_ptr + rows[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.dot(x, w, z, input_precision=PRECISION)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _activated(z, bias_ptr, position, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """SiLU(z + bias), and zero where the layer's token lies before the text."""
    columns = tl.arange(0, BLOCK_N)
    z += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    return silu(tl.where((position >= 0)[:, None] & (columns < N)[None, :], z, 0.0))


@triton.jit  # type: ignore[untyped-decorator]
def _layer(
    x,  # [BLOCK_B, BLOCK_X], the newest inputs
    ring,
    takes,  # [BLOCK_B], rows that have a new token
    in_batch,
    number,
    position,  # of the token that the layer's output belongs to
    stored,
    dilation,
    w_ptr,
    bias_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    z = tl.zeros([BLOCK_B, BLOCK_N], dtype=tl.float32)
    z = _add_stored_taps(
        z, ring, in_batch, number, stored, dilation, w_ptr, 0, KERNEL - 1, C, N, BLOCK_C, BLOCK_N, PRECISION, STAGES
    )
    tl.debug_barrier()  # the oldest input has been read from the slot that the newest one takes
    channels = tl.arange(0, BLOCK_X)
    at = (ring + number % stored * C)[:, None] + channels[None, :]
    tl.store(at, x, mask=takes[:, None] & (channels < C)[None, :])
    tl.debug_barrier()  # other threads read it
    z = _add_stored_taps(
        z, ring, in_batch, number, stored, dilation, w_ptr,
        KERNEL - 1, KERNEL, C, N, BLOCK_C, BLOCK_N, PRECISION, STAGES,
    )  # fmt: skip
    return _activated(z, bias_ptr, position, N, BLOCK_N)


@triton.jit  # type: ignore[untyped-decorator]
def logits_of_rows(
    key_ptrs,  # [BLOCK_B], of [D]
    value_ptrs,
    ring,  # [BLOCK_B], of the history [width] of a row and head
    takes,  # [BLOCK_B], rows that have a new token
    in_batch,
    number,  # [BLOCK_B], of the newest token, at least 0
    dilation,
    scorer,
    w0_ptr,  # [H or 1, KERNEL · 2 D, N0]
    w1_ptr,
    w2_ptr,
    w3_ptr,
    bias0_ptr,  # [H or 1, N0]
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    output_weight_ptr,  # [H or 1, N]
    output_bias_ptr,  # [H or 1]
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
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The logits [BLOCK_B] that the rows' new tokens complete; takes these into the history."""
    stored = (KERNEL - 1) * dilation
    reach = stored // 2
    WIDTH: tl.constexpr = 2 * D

    z = tl.zeros([BLOCK_B, BLOCK_N0], dtype=tl.float32)
    w0_ptr += scorer * KERNEL * WIDTH * N0
    z = _add_stored_taps(
        z, ring, in_batch, number, stored, dilation, w0_ptr,
        0, KERNEL - 1, WIDTH, N0, BLOCK_C, BLOCK_N0, PRECISION, STAGES,
    )  # fmt: skip
    tl.debug_barrier()
    channels = tl.arange(0, BLOCK_D)[None, :]
    inside = takes[:, None] & (channels < D)
    newest = (ring + number % stored * WIDTH)[:, None] + channels
    key = tl.load(key_ptrs[:, None] + channels, mask=inside, other=0.0)
    tl.store(newest, key.to(tl.float32), mask=inside)
    value = tl.load(value_ptrs[:, None] + channels, mask=inside, other=0.0)
    tl.store(newest + D, value.to(tl.float32), mask=inside)
    tl.debug_barrier()
    z = _add_stored_taps(
        z, ring, in_batch, number, stored, dilation, w0_ptr,
        KERNEL - 1, KERNEL, WIDTH, N0, BLOCK_C, BLOCK_N0, PRECISION, STAGES,
    )  # fmt: skip
    position = number - reach
    x = _activated(z, bias0_ptr + scorer * N0, position, N0, BLOCK_N0)
    if LAYERS > 1:
        ring += stored * WIDTH
        position -= reach
        x = _layer(
            x, ring, takes, in_batch, number, position, stored, dilation,
            w1_ptr + scorer * KERNEL * N0 * N1, bias1_ptr + scorer * N1,
            N0, N1, BLOCK_B, BLOCK_C, BLOCK_N0, BLOCK_N1, KERNEL, PRECISION, STAGES,
        )  # fmt: skip
    if LAYERS > 2:
        ring += stored * N0
        position -= reach
        x = _layer(
            x, ring, takes, in_batch, number, position, stored, dilation,
            w2_ptr + scorer * KERNEL * N1 * N2, bias2_ptr + scorer * N2,
            N1, N2, BLOCK_B, BLOCK_C, BLOCK_N1, BLOCK_N2, KERNEL, PRECISION, STAGES,
        )  # fmt: skip
    if LAYERS > 3:
        ring += stored * N1
        position -= reach
        x = _layer(
            x, ring, takes, in_batch, number, position, stored, dilation,
            w3_ptr + scorer * KERNEL * N2 * N3, bias3_ptr + scorer * N3,
            N2, N3, BLOCK_B, BLOCK_C, BLOCK_N2, BLOCK_N3, KERNEL, PRECISION, STAGES,
        )  # fmt: skip

    LAST: tl.constexpr = N0 if LAYERS == 1 else N1 if LAYERS == 2 else N2 if LAYERS == 3 else N3
    BLOCK_LAST: tl.constexpr = x.shape[1]
    columns = tl.arange(0, BLOCK_LAST)
    weight = tl.load(output_weight_ptr + scorer * LAST + columns, mask=columns < LAST, other=0.0).to(tl.float32)
    logits = tl.sum(x * weight[None, :], axis=1) + tl.load(output_bias_ptr + scorer).to(tl.float32)
    return logits


@triton.jit(do_not_specialize=["batch", "heads", "blocks", "dilation"])  # type: ignore[untyped-decorator]
def _step_kernel(
    k_ptr,  # [B, 1, H, D]
    v_ptr,
    history_ptr,  # [B, H, width]
    num_new_ptr,  # [B]
    num_before_ptr,
    w0_ptr,  # [H or 1, KERNEL · 2 D, N0]
    w1_ptr,
    w2_ptr,
    w3_ptr,
    bias0_ptr,  # [H or 1, N0]
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    output_weight_ptr,  # [H or 1, N]
    output_bias_ptr,  # [H or 1]
    logits_ptr,  # [B, 1, H]
    k_stride_b,
    k_stride_h,
    v_stride_b,
    v_stride_h,
    batch,
    heads,
    blocks,
    dilation,
    history_width,
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
    head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    in_batch = rows < batch
    scorer = head
    if SHARED:
        scorer = head * 0
    number = tl.load(num_before_ptr + rows, mask=in_batch, other=0).to(tl.int32)
    takes = in_batch & (tl.load(num_new_ptr + rows, mask=in_batch, other=0) > 0)
    ring = history_ptr + (rows * heads + head) * history_width
    logits = logits_of_rows(
        k_ptr + (rows * k_stride_b + head * k_stride_h), v_ptr + (rows * v_stride_b + head * v_stride_h),
        ring, takes, in_batch, number, dilation, scorer,
        w0_ptr, w1_ptr, w2_ptr, w3_ptr, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr, output_weight_ptr, output_bias_ptr,
        D, BLOCK_D, N0, N1, N2, N3, BLOCK_N0, BLOCK_N1, BLOCK_N2, BLOCK_N3,
        LAYERS, BLOCK_B, BLOCK_C, KERNEL, PRECISION, STAGES,
    )  # fmt: skip
    tl.store(logits_ptr + rows * heads + head, logits, mask=in_batch)
