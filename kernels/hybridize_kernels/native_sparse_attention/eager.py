"""Native sparse attention in plain PyTorch: masks over all keys, a chunk of queries at a time.

This form shows what the op means at a bearable speed; it saves no work over full attention.
This file imports nothing but torch: exported models carry it.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_CHUNK = 512


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
    """Σ gate · branch over compressed blocks, selected blocks and the window.

    q: `[B, T, HQ, D]`; k, v: `[B, S, H, D]`; gates: `[B, T, HQ, 3]` in that order; query_positions: `[B, T]`;
    key_positions: `[B, S]` (−1: padding), or key_lengths: `[B]` (slot j holds position j, if any); with neither the
    queries are the last T of S keys in order; cu_seqlens `[N + 1]` bounds documents, of one row, that do not see each
    other. A compressed block is the mean of its tokens, or Σ_i w_i ∘ x_i with key_pooling, value_pooling
    `[block_size, H, D]`, or what compressed_k, compressed_v `[B, blocks, H, D]` give. Queries at positions below
    `dense_below` use full causal attention. Source: https://arxiv.org/abs/2502.11089.
    """
    if cu_seqlens is not None:
        # split, not indexing: the gradient of N slices of one tensor would be N tensors of its full size.
        sizes = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
        documents = [
            native_sparse_attention(
                *document,
                block_size=block_size,
                num_selected_blocks=num_selected_blocks,
                window=window,
                dense_below=dense_below,
                scale=scale,
                key_pooling=key_pooling,
                value_pooling=value_pooling,
            )
            for document in zip(*(x.split(sizes, dim=1) for x in (q, k, v, gates)), strict=True)
        ]
        return torch.cat(documents, dim=1)
    batch, time, query_heads, head_size = q.shape
    heads = k.shape[2]
    scale = head_size**-0.5 if scale is None else scale
    if key_positions is None:
        key_positions = torch.arange(k.shape[1], device=k.device).expand(batch, -1)
        if key_lengths is not None:
            key_positions = torch.where(key_positions < key_lengths[:, None], key_positions, -1)
    if query_positions is None:
        query_positions = key_positions[:, k.shape[1] - time :]
    if compressed_k is None or compressed_v is None:
        compressed_k = _pool(k, key_positions, block_size, key_pooling)
        compressed_v = _pool(v, key_positions, block_size, value_pooling)

    # One row of attention a key head, so that a mask serves all query heads of its group.
    group = query_heads // heads
    q = q.reshape(batch, time, heads, group, head_size).permute(0, 2, 3, 1, 4)  # [B, H, G, T, D]
    gates = gates.reshape(batch, time, heads, group, 3).permute(0, 2, 3, 1, 4)  # [B, H, G, T, 3]
    k, v, compressed_k, compressed_v = (x.transpose(1, 2) for x in (k, v, compressed_k, compressed_v))  # [B, H, S, D]
    key_position = key_positions[:, None, None, :]  # [B, 1, 1, S]
    outputs = []
    for start in range(0, max(time, 1), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        position = query_positions[:, None, rows, None]  # [B, 1, t, 1]
        query, gate = q[:, :, :, rows], gates[:, :, :, rows].to(q.dtype)
        compressed, weights = _compressed(query, compressed_k, compressed_v, position, block_size, scale)
        causal = (key_position >= 0) & (key_position <= position)
        chosen = _choose_blocks(weights.detach().sum(2), position, block_size, num_selected_blocks)  # [B, H, t, blocks]
        block = (key_position // block_size).clamp(0, chosen.shape[-1] - 1)
        selected_mask = causal & chosen.gather(-1, block.expand(*chosen.shape[:-1], -1))
        if dense_below > 0:
            # Full causal attention is the selected branch with every block chosen, let through alone.
            dense = position < dense_below
            selected_mask = selected_mask | (causal & dense)
            only_selected = gate.new_tensor([0.0, 1.0, 0.0])
            gate = torch.where(dense[:, :, None], only_selected, gate)
        selected = _attend(query, k, v, selected_mask, scale)
        near = _attend(query, k, v, causal & (position - key_position < window), scale)
        outputs.append(gate[..., 0:1] * compressed + gate[..., 1:2] * selected + gate[..., 2:3] * near)
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _pool(x: Tensor, key_positions: Tensor, block_size: int, weights: Tensor | None = None) -> Tensor:
    """`[B, S, H, D]` -> `[B, blocks, H, D]`: means of the blocks, or Σ_i w_i ∘ x_i with weights `[block_size, H, D]`.

    Summed in fp32 at least; incomplete blocks are never looked at.
    """
    batch, keys, heads, size = x.shape
    blocks = -(-keys // block_size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, given = x.to(dtype), x.dtype
    if weights is not None:
        x = x * weights.to(dtype)[key_positions % block_size]
    # Padding goes to one block more, which is cut off.
    block = torch.where(key_positions >= 0, key_positions // block_size, blocks).clamp(max=blocks)
    index = block[:, :, None, None].expand(x.shape)
    total = torch.zeros(batch, blocks + 1, heads, size, dtype=dtype, device=x.device).scatter_add(1, index, x)[
        :, :blocks
    ]
    return (total / block_size if weights is None else total).to(given)


def _compressed(
    q: Tensor, block_k: Tensor, block_v: Tensor, position: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The branch over complete blocks `[B, H, G, t, D]` and its probabilities `[B, H, G, t, blocks]`, fp32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # the choice of blocks hangs on these probabilities
        complete = torch.arange(block_k.shape[2], device=q.device) < (position + 1) // block_size  # [B, 1, t, blocks]
        complete = complete[:, :, None]
        logits = scale * (q.to(dtype) @ block_k[:, :, None].to(dtype).transpose(-1, -2))
        # A row without blocks keeps finite logits; its weights are set to zero after the softmax.
        hidden = ~complete & complete.any(-1, keepdim=True)
        weights = torch.where(complete, logits.masked_fill(hidden, float("-inf")).softmax(-1), 0.0)
        return (weights @ block_v[:, :, None].to(dtype)).to(q.dtype), weights


def _choose_blocks(importance: Tensor, position: Tensor, block_size: int, num_selected_blocks: int) -> Tensor:
    """importance `[B, H, t, blocks]`, position `[B, 1, t, 1]` -> bool `[B, H, t, blocks + 1]`."""
    # The current block may be one that has no mean yet.
    importance = F.pad(importance, (0, 1))
    block = torch.arange(importance.shape[-1], device=position.device)
    current = position.clamp(min=0) // block_size
    forced = (block == 0) | (block == current) | (block == current - 1)
    complete = block < (position + 1) // block_size
    importance = importance.masked_fill(~complete, -1.0).masked_fill(forced, float("inf"))
    best = importance.argsort(dim=-1, descending=True, stable=True)[..., :num_selected_blocks]
    chosen = torch.zeros_like(importance, dtype=torch.bool).scatter(-1, best, True)
    return (chosen & complete) | forced


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q `[B, H, G, t, D]`, k and v `[B, H, S, D]`, mask `[B, 1 | H, t, S]` -> `[B, H, G, t, D]`; blind rows give 0."""
    batch, heads, group = q.shape[:3]
    if q.device.type == "cpu":
        # A GPU would have to wait for the count of these; there the whole mask is the cheaper way.
        seen = mask.flatten(0, 2).any(0)
        if 4 * int(seen.sum()) < 3 * seen.numel():
            index = seen.nonzero().squeeze(-1)
            k, v, mask = k[:, :, index], v[:, :, index], mask[..., index]
    if k.shape[2] == 0:
        return (q * 0).sum(-1, keepdim=True).expand(*q.shape[:-1], v.shape[-1])
    blind = ~mask.any(-1, keepdim=True)
    mask = (mask | blind).expand(batch, heads, -1, -1)
    output = F.scaled_dot_product_attention(
        q.flatten(0, 1),  # [B·H, G, t, D]
        k.flatten(0, 1)[:, None].expand(-1, group, -1, -1),
        v.flatten(0, 1)[:, None].expand(-1, group, -1, -1),
        attn_mask=mask.flatten(0, 1)[:, None],
        scale=scale,
    )
    return output.view(batch, heads, *output.shape[1:]).masked_fill(blind[:, :, None], 0.0)
