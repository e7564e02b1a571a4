"""Native sparse attention by the Triton kernels, as one differentiable function."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .combine import gate_gradients, key_gradients, query_gradient
from .compressed import attend_blocks
from .compressed_gradient import attend_blocks_backward
from .layout import Layout
from .lists import lists_by_block
from .pair_gradient import pair_gradients
from .places import Places, places_of
from .pooling import pool, pool_weight_gradient
from .selected import attend_selected, head_groups
from .selection import FORCED, choose_blocks
from .tiles import tiles_of


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
    call = _Call(block_size, num_selected_blocks, window, scale, places)
    output: Tensor = _NativeSparseAttention.apply(
        q, k, v, gates, compressed_k, compressed_v, key_pooling, value_pooling, call
    )
    if dense_below > 0:
        dense = places.attend_near(q, k, v, window=dense_below, scale=scale)
        output = torch.where((places.positions() < dense_below)[..., None, None], dense, output)
    return places.unsorted(output)


class _Call(NamedTuple):
    """What autograd does not see."""

    block_size: int
    num_selected_blocks: int
    window: int
    scale: float
    places: Places

    @property
    def layout(self) -> Layout:
        return self.places.layout


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
        layout, block_size, scale = call.layout, call.block_size, call.scale
        if compressed_k is None or compressed_v is None:
            pooled_k = pool(k, layout, block_size, key_pooling)
            pooled_v = pool(v, layout, block_size, value_pooling)
        else:
            pooled_k, pooled_v = (call.places.of_blocks(x) for x in (compressed_k, compressed_v))
        compressed, compressed_lse = attend_blocks(
            q, pooled_k, pooled_v, layout, block_size, scale, padded=call.places.padded
        )
        words = choose_blocks(
            q,
            pooled_k,
            compressed_lse,
            layout,
            block_size=block_size,
            num_selected_blocks=call.num_selected_blocks,
            scale=scale,
        )
        # The window branch keeps what its own backward pass needs.
        leaves = [x.detach().requires_grad_(any(ctx.needs_input_grad)) for x in (q, k, v)]
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            near = call.places.attend_near(*leaves, window=call.window, scale=scale)
        selected = attend_selected(
            q,
            k,
            v,
            words,
            compressed,
            near.detach(),
            gates,
            layout,
            block_size=block_size,
            num_selected_blocks=call.num_selected_blocks,
            scale=scale,
            tiles=tiles_of(q, k.shape[2], block_size),
            padded=call.places.padded,
            keep=any(ctx.needs_input_grad),
        )
        ctx.save_for_backward(
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
            *selected[:2],
        )
        ctx.call, ctx.near, ctx.leaves = call, near, leaves
        ctx.given = None if compressed_k is None else compressed_k.shape
        return selected.mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (
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
            selected,
            lse,
        ) = ctx.saved_tensors
        call: _Call = ctx.call
        layout, block_size, scale = call.layout, call.block_size, call.scale
        d_output = d_output.contiguous()
        outputs = (compressed, selected, ctx.near.detach())
        d_gates, delta, rows, d_selected, d_near = gate_gradients(d_output, outputs, gates, lse)
        near = torch.autograd.grad(ctx.near, ctx.leaves, d_near, retain_graph=True)
        dq_compressed, d_pooled_k, d_pooled_v = attend_blocks_backward(
            q,
            pooled_k,
            pooled_v,
            d_output,
            gates[..., 0],
            delta,
            compressed_lse,
            layout,
            block_size,
            scale,
            padded=call.places.padded,
        )
        batch, time, query_heads, head_size = q.shape
        heads, tiles = k.shape[2], tiles_of(q, k.shape[2], block_size)
        group = query_heads // heads
        lists = lists_by_block(
            words,
            layout,
            batch=batch,
            time=time,
            most_slots=max(FORCED, call.num_selected_blocks),
            block_size=block_size,
            entries_per_item=tiles.entries,
            padded=call.places.padded,
        )
        dq = torch.empty_like(q)
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        if call.places.padded:  # keys that belong to no block have no gradient
            dk.zero_()
            dv.zero_()
        pooling = None if key_pooling is None else (key_pooling.contiguous(), value_pooling.contiguous())
        groups = head_groups(heads, lists.entries.shape[1], group, head_size, q.element_size())
        dq_pairs = q.new_empty(len(groups[0]), lists.entries.shape[1], group, head_size)
        items = lists.items.shape[1]
        d_block = torch.empty(len(groups[0]), items, 2, block_size, head_size, dtype=torch.float32, device=q.device)
        for some in groups:
            pair_gradients(
                q,
                k,
                v,
                d_selected,
                rows,
                lists,
                layout,
                dq_pairs,
                d_block,
                heads=some,
                block_size=block_size,
                scale=scale,
                entries_per_item=tiles.entries,
                tile=tiles.gradient,
            )
            query_gradient(dq_pairs, lists, dq_compressed, near[0], dq, heads=some)
            key_gradients(
                d_block,
                lists,
                layout,
                (d_pooled_k, d_pooled_v),
                pooling,
                (near[1].contiguous(), near[2].contiguous()),
                (dk, dv),
                heads=some,
                block_size=block_size,
                add_pooled=ctx.given is None,
            )
        d_pooling: tuple[Tensor | None, Tensor | None] = (None, None)
        if pooling is not None:
            d_pooling = (
                pool_weight_gradient(k, d_pooled_k, layout, block_size).to(pooling[0].dtype),
                pool_weight_gradient(v, d_pooled_v, layout, block_size).to(pooling[1].dtype),
            )
        d_given: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.given is not None:
            d_given = (
                call.places.of_rows(d_pooled_k, ctx.given).to(q.dtype),
                call.places.of_rows(d_pooled_v, ctx.given).to(q.dtype),
            )
        return dq, dk, dv, d_gates, *d_given, *d_pooling, None
