"""Native sparse attention by the Triton kernels, as one differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import needs_grad
from ..retained_attention.attention import Attended
from .combine import gate_gradients
from .compressed import attend_blocks
from .compressed_gradient import attend_blocks_backward
from .places import Places, places_of
from .pooling import pool, pool_weight_gradient
from .selected import attend_selected
from .selected_gradient import Others, selected_gradients
from .selection import choose_blocks
from .window import Window, attend_window, window_gradients

GATES = 3
"""Place of the gates among the tensors of the function."""


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    block_size: int,
    num_selected_blocks: int,
    window: int,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dense_below: int = 0,
    scale: float | None = None,
    compressed_k: Tensor | None = None,
    compressed_v: Tensor | None = None,
    key_pooling: Tensor | None = None,
    value_pooling: Tensor | None = None,
) -> Tensor:
    """See `hybridize_kernels.native_sparse_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    places = places_of(q, k, query_positions, key_positions, key_lengths, cu_seqlens, block_size)
    q, gates = places.sorted(q), places.sorted(gates)
    if key_lengths is None:
        k, v = places.sorted(k), places.sorted(v)
    keep = needs_grad(q, k, v, gates, compressed_k, compressed_v, key_pooling, value_pooling)
    call = _Call(block_size, num_selected_blocks, window, scale, places, keep)
    output: Tensor = _NativeSparseAttention.apply(
        q, k, v, gates, compressed_k, compressed_v, key_pooling, value_pooling, call
    )
    if dense_below > 0:
        output = places.with_dense(output, q, k, v, below=dense_below, scale=scale)
    return places.unsorted(output)


class _Call(NamedTuple):
    """What autograd does not see; keep: whether there will be a backward pass."""

    block_size: int
    num_selected_blocks: int
    window: int
    scale: float
    places: Places
    keep: bool


class _Saved(NamedTuple):
    """The tensors of a forward pass that its backward pass reads; window, window_*: of the window branch."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    key_pooling: Tensor | None
    value_pooling: Tensor | None
    compressed: Tensor
    compressed_lse: Tensor
    words: Tensor
    selected: Tensor
    selected_lse: Tensor
    window_q: Tensor
    window_k: Tensor
    window_v: Tensor
    window: Tensor
    window_lse: Tensor


class _NativeSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        compressed_k: Tensor | None,
        compressed_v: Tensor | None,
        key_pooling: Tensor | None,
        value_pooling: Tensor | None,
        call: _Call,
    ) -> Tensor:
        q, gates = q.contiguous(), gates.contiguous()
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        block_size, num_selected_blocks, window, scale, places, keep = call
        layout, padded = places.layout, places.padded
        if compressed_k is None or compressed_v is None:
            pooled_k = pool(k, layout, block_size, key_pooling)
            pooled_v = pool(v, layout, block_size, value_pooling)
        else:
            pooled_k, pooled_v = places.of_blocks(compressed_k), places.of_blocks(compressed_v)
        compressed, compressed_lse = attend_blocks(q, pooled_k, pooled_v, layout, block_size, scale, padded=padded)
        sizes: dict[str, int] = {"block_size": block_size, "num_selected_blocks": num_selected_blocks}
        words = choose_blocks(q, pooled_k, compressed_lse, layout, scale=scale, **sizes)
        branch = attend_window(q, k, v, places, window=window, scale=scale)
        selected = attend_selected(
            q,
            k,
            v,
            words,
            compressed,
            branch.attended.output,
            gates,
            layout,
            scale=scale,
            padded=padded,
            keep=keep,
            **sizes,
        )
        ctx.save_for_backward(
            *_Saved(
                q,
                k,
                v,
                gates,
                pooled_k,
                pooled_v,
                key_pooling,
                value_pooling,
                compressed,
                compressed_lse,
                words,
                selected.output,
                selected.log_sum_exp,
                *branch.attended[:5],
            )
        )
        ctx.call, ctx.window = call, (branch.attended.work, branch.tokens)
        ctx.given = None if compressed_k is None else compressed_k.shape
        return selected.mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = _Saved(*ctx.saved_tensors)
        q, k, v, gates = saved[:4]
        block_size, num_selected_blocks, _, scale, places, _ = ctx.call
        layout, padded = places.layout, places.padded
        d_output = d_output.contiguous()
        outputs = (saved.compressed, saved.selected, saved.window)
        d_gates, delta, rows, d_selected, d_window = gate_gradients(d_output, outputs, gates, saved.selected_lse)
        if not any(needed for n, needed in enumerate(ctx.needs_input_grad) if n != GATES):
            return *[None] * GATES, d_gates, None, None, None, None, None
        work, tokens = ctx.window
        dq_window, dk_window, dv_window = window_gradients(
            Window(Attended(*saved[-5:], work), tokens), d_window, k.shape[1]
        )
        dq_compressed, *d_pooled = attend_blocks_backward(
            q,
            saved.pooled_k,
            saved.pooled_v,
            d_output,
            gates[..., 0],
            delta,
            saved.compressed_lse,
            layout,
            block_size,
            scale,
            padded=padded,
        )
        pooling = None
        if saved.key_pooling is not None and saved.value_pooling is not None:
            pooling = saved.key_pooling.contiguous(), saved.value_pooling.contiguous()
        dq, dk, dv = selected_gradients(
            q,
            k,
            v,
            d_selected,
            rows,
            saved.words,
            Others(dq_window, dq_compressed, dk_window, dv_window, d_pooled if ctx.given is None else None, pooling),
            layout,
            block_size=block_size,
            num_selected_blocks=num_selected_blocks,
            scale=scale,
            padded=padded,
        )
        d_given: list[Tensor | None] = [None, None]
        if ctx.given is not None:
            d_given = [places.of_rows(x, ctx.given).to(q.dtype) for x in d_pooled]
        d_pooling: list[Tensor | None] = [None, None]
        if pooling is not None:
            d_pooling = [
                pool_weight_gradient(x, d, layout, block_size).to(weights.dtype)
                for x, d, weights in zip((k, v), d_pooled, pooling, strict=True)
            ]
        return dq, dk, dv, d_gates, *d_given, *d_pooling, None
