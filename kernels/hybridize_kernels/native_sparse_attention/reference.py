"""Native sparse attention as its definition reads: one query of one row after the other."""

from itertools import pairwise

import torch
from torch import Tensor


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
    """See `hybridize_kernels.native_sparse_attention`; the loop below is what the other forms must equal."""
    if cu_seqlens is not None:
        # What documents that do not see each other are: one call each.
        documents = [
            native_sparse_attention(
                *(x[:, start:stop] for x in (q, k, v, gates)),
                block_size=block_size,
                num_selected_blocks=num_selected_blocks,
                window=window,
                dense_below=dense_below,
                scale=scale,
                key_pooling=key_pooling,
                value_pooling=value_pooling,
            )
            for start, stop in pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(documents, dim=1)
    slots = torch.arange(k.shape[1], device=k.device).expand(len(k), -1)
    if key_lengths is not None:
        key_positions = torch.where(slots < key_lengths[:, None], slots, -1)
    key_positions = slots if key_positions is None else key_positions
    query_positions = slots[:, k.shape[1] - q.shape[1] :] if query_positions is None else query_positions
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    rows = []
    for b in range(q.shape[0]):
        key_position = key_positions[b]
        keys, values = k[b].to(dtype), v[b].to(dtype)  # [S, H, D]
        if compressed_k is None or compressed_v is None:
            block_keys = _pool(keys, key_position, block_size, key_pooling)
            block_values = _pool(values, key_position, block_size, value_pooling)
        else:
            block_keys, block_values = compressed_k[b].to(dtype), compressed_v[b].to(dtype)
        outputs = [values.new_zeros(0, q.shape[2], values.shape[-1])]
        for t in range(q.shape[1]):
            position = int(query_positions[b, t])
            query = q[b, t].to(dtype).unflatten(0, (-1, group))  # [H, G, D]
            causal = (key_position >= 0) & (key_position <= position)
            everywhere = causal[:, None].expand(-1, k.shape[2])
            if position < dense_below:
                output, _ = _attend(query, keys, values, everywhere, scale)
                outputs.append(output.flatten(0, 1)[None])
                continue
            complete = (torch.arange(len(block_keys), device=q.device) < (position + 1) // block_size)[:, None]
            compressed, weights = _attend(query, block_keys, block_values, complete.expand(-1, k.shape[2]), scale)
            chosen = _choose_blocks(weights.detach().sum(1), position, block_size, num_selected_blocks)
            block = torch.where(causal, key_position // block_size, 0)
            selected, _ = _attend(query, keys, values, everywhere & chosen[:, block].T, scale)
            near, _ = _attend(query, keys, values, everywhere & (position - key_position < window)[:, None], scale)
            branches = torch.stack([compressed, selected, near], dim=-1).flatten(0, 1)  # [HQ, D, 3]
            outputs.append((branches * gates[b, t].to(dtype)[:, None]).sum(-1)[None])
        rows.append(torch.cat(outputs))
    return torch.stack(rows).to(q.dtype)


def _pool(x: Tensor, key_position: Tensor, block_size: int, weights: Tensor | None) -> Tensor:
    """x `[S, H, D]` -> `[complete blocks, H, D]`: means, or Σ_i w_i ∘ x_i with weights `[block_size, H, D]`."""
    in_order = x[key_position.argsort()][int((key_position < 0).sum()) :]
    complete = len(in_order) // block_size
    blocks: Tensor = in_order[: complete * block_size].unflatten(0, (complete, block_size))
    return blocks.mean(1) if weights is None else (weights.to(x.dtype) * blocks).sum(1)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query `[H, G, D]`, keys and values `[S, H, D]`, mask `[S, H]` -> output `[H, G, D]`, weights `[H, G, S]`."""
    visible = mask.T[:, None, :]
    logits = scale * torch.einsum("hgd,shd->hgs", query, keys)
    if not bool(mask.any()):
        weights = logits * 0
    else:
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hgs,shd->hgd", weights, values), weights


def _choose_blocks(importance: Tensor, position: int, block_size: int, num_selected_blocks: int) -> Tensor:
    """importance `[H, blocks]` -> bool `[H, blocks up to the current one]`."""
    current = max(position, 0) // block_size
    complete = (position + 1) // block_size
    forced = {0, max(current - 1, 0), current}
    chosen = torch.zeros(importance.shape[0], current + 1, dtype=torch.bool, device=importance.device)
    for head, scores in enumerate(importance):
        others = [c for c in range(complete) if c not in forced]
        others.sort(key=lambda c: (-float(scores[c]), c))
        picked = sorted(forced) + others[: max(0, num_selected_blocks - len(forced))]
        chosen[head, picked] = True
    return chosen
