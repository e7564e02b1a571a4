"""A decoding step of native sparse attention in plain PyTorch: in place, and without waiting for the device.

This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ALWAYS_CHOSEN = 3  # the first, the previous and the current block


@torch.no_grad()
def native_sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    keys: Tensor,
    values: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    num_selected_blocks: int,
    window: int,
    positions: Tensor,
    dense_below: int = 0,
    scale: float | None = None,
    key_pooling: Tensor | None = None,
    value_pooling: Tensor | None = None,
    workspace: dict[str, Tensor] | None = None,
) -> Tensor:
    """Takes one token a row into a cache by position (updated in place) and attends from it.

    q: `[B, 1, HQ, D]`; k, v: `[B, 1, H, D]`; gates: `[B, 1, HQ, 3]` of the compressed, the selected and the window
    branch; keys, values: `[B, capacity, H, D]`; compressed_k, compressed_v: `[B, capacity // block_size, H, D]`;
    lengths: `[B]`; positions: `[B, 1]`, −1 for padding; pooling: `[block_size, H, D]`, None: the mean. The workspace is
    not needed here.
    """
    batch, _, query_heads, head_size = q.shape
    capacity, heads = keys.shape[1:3]
    scale = head_size**-0.5 if scale is None else scale
    position = positions[:, 0].long()  # [B]
    real = (position >= 0) & (position < capacity)
    slot = position.clamp(0, capacity - 1)
    _put(keys, slot, k[:, 0], real)
    _put(values, slot, v[:, 0], real)
    lengths.copy_(torch.where(real, position + 1, lengths))
    complete = real & ((position + 1) % block_size == 0)
    _pool(keys, compressed_k, slot, complete, block_size, key_pooling)
    _pool(values, compressed_v, slot, complete, block_size, value_pooling)

    query = q.reshape(batch, heads, query_heads // heads, head_size)
    gate = gates.reshape(*query.shape[:3], 3).to(q.dtype)
    compressed, weights = _compressed(query, compressed_k, compressed_v, (slot + 1) // block_size, scale)
    chosen = _chosen_blocks(weights.sum(2), slot // block_size, num_selected_blocks)  # [B, H, n]
    token = chosen[..., None] * block_size + torch.arange(block_size, device=q.device)
    token = torch.where(chosen[..., None] >= 0, token, -1).flatten(2)  # [B, H, n · block_size]
    if dense_below > 0:
        # Full causal attention is the selected branch with every token chosen, let through alone.
        dense = slot < dense_below
        room = max(token.shape[2], min(dense_below, capacity))
        token = F.pad(token, (0, room - token.shape[2]), value=-1)
        token = torch.where(dense[:, None, None], torch.arange(room, device=q.device), token)
        gate = torch.where(dense[:, None, None, None], gate.new_tensor([0.0, 1.0, 0.0]), gate)
    near = slot[:, None, None] - torch.arange(min(window, capacity), device=q.device)
    selected = _attend(query, keys, values, token, slot, scale)
    in_window = _attend(query, keys, values, near.expand(-1, heads, -1), slot, scale)
    output = gate[..., 0:1] * compressed + gate[..., 1:2] * selected + gate[..., 2:3] * in_window
    nothing = torch.where(position < 0, 0.0, float("nan")).to(q.dtype)[:, None, None, None]
    return torch.where(real[:, None, None, None], output, nothing).reshape(q.shape)


def _put(cache: Tensor, slot: Tensor, new: Tensor, valid: Tensor) -> None:
    """Writes new `[B, H, D]` to slot `[B]` of cache `[B, S, H, D]` where valid `[B]`."""
    rows = torch.arange(len(slot), device=slot.device)
    cache[rows, slot] = torch.where(valid[:, None, None], new.to(cache.dtype), cache[rows, slot])


def _pool(
    cache: Tensor, pooled: Tensor, slot: Tensor, complete: Tensor, block_size: int, weights: Tensor | None
) -> None:
    """Writes the pooled tokens of the block of slot `[B]` to pooled `[B, blocks, H, D]` where complete `[B]`."""
    if pooled.shape[1] == 0:
        return
    block = (slot // block_size).clamp(max=pooled.shape[1] - 1)
    token = block[:, None] * block_size + torch.arange(block_size, device=slot.device)
    wide = torch.promote_types(cache.dtype, torch.float32)
    tokens = cache[torch.arange(len(slot), device=slot.device)[:, None], token].to(wide)  # [B, block_size, H, D]
    _put(pooled, block, tokens.mean(1) if weights is None else (weights.to(wide) * tokens).sum(1), complete)


def _compressed(q: Tensor, block_k: Tensor, block_v: Tensor, count: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The branch over the first count `[B]` blocks, `[B, H, G, D]`, and its probabilities `[B, H, G, blocks]`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # the choice of blocks hangs on these probabilities
        complete = (torch.arange(block_k.shape[1], device=q.device) < count[:, None])[:, None, None]
        logits = scale * (q.to(dtype) @ block_k.permute(0, 2, 3, 1).to(dtype))
        # A row without blocks keeps finite logits; its weights are set to zero after the softmax.
        hidden = ~complete & (count > 0)[:, None, None, None]
        weights = torch.where(complete, logits.masked_fill(hidden, float("-inf")).softmax(-1), 0.0)
        # What lies in a block that is not complete yet may be anything, and 0 · NaN is NaN.
        seen = block_v.transpose(1, 2).masked_fill(~complete.transpose(2, 3), 0.0)
        return (weights @ seen.to(dtype)).to(q.dtype), weights


def _chosen_blocks(importance: Tensor, current: Tensor, num_selected_blocks: int) -> Tensor:
    """importance `[B, H, blocks]`, current `[B]` -> numbers of the chosen blocks `[B, H, n]`, −1 for none."""
    importance = F.pad(importance, (0, 1))  # the current block may be one that is not pooled yet
    block, last = torch.arange(importance.shape[-1], device=current.device), current[:, None]
    forced = (block == 0) | (block == last) | (block == last - 1)
    importance = importance.masked_fill((block > last)[:, None], -1.0).masked_fill(forced[:, None], float("inf"))
    best = importance.argsort(dim=-1, descending=True, stable=True)[..., : max(num_selected_blocks, ALWAYS_CHOSEN)]
    num_forced = (current + 1).clamp(max=ALWAYS_CHOSEN)
    num_chosen = torch.minimum(num_forced.clamp(min=num_selected_blocks), current + 1)
    rank = torch.arange(best.shape[-1], device=current.device)
    return torch.where((rank < num_chosen[:, None])[:, None], best, -1)


def _attend(q: Tensor, keys: Tensor, values: Tensor, token: Tensor, last: Tensor, scale: float) -> Tensor:
    """q `[B, H, G, D]` over the slots token `[B, H, n]` that lie in 0 .. last `[B]` -> `[B, H, G, D]`."""
    seen = (token >= 0) & (token <= last[:, None, None])
    # Any slot that holds a token serves where there is none to be seen.
    index = torch.where(seen, token, last[:, None, None]).transpose(1, 2)[..., None].expand(-1, -1, -1, q.shape[-1])
    k, v = (x.gather(1, index).transpose(1, 2).to(q.dtype) for x in (keys, values))  # [B, H, n, D]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, :, None], scale=scale)
