"""A decoding step of native sparse attention told as a story, one row at a time."""

import torch
from torch import Tensor

from ..native_sparse_attention.reference import native_sparse_attention


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
    dense_below: int,
    scale: float,
    key_pooling: Tensor | None = None,
    value_pooling: Tensor | None = None,
) -> Tensor:
    """See `hybridize_kernels.native_sparse_decode`; what the other forms must equal."""
    output = torch.zeros_like(q)
    for row, position in enumerate(positions[:, 0].tolist()):
        if position < 0:
            continue
        if position >= keys.shape[1]:
            output[row] = float("nan")
            continue
        keys[row, position], values[row, position] = k[row, 0], v[row, 0]
        lengths[row] = position + 1
        if (position + 1) % block_size == 0:
            block, first = position // block_size, position + 1 - block_size
            compressed_k[row, block] = _pooled(keys[row, first : position + 1], key_pooling)
            compressed_v[row, block] = _pooled(values[row, first : position + 1], value_pooling)
        here = slice(row, row + 1)
        output[here] = native_sparse_attention(
            q[here],
            keys[here, : position + 1].to(q.dtype),
            values[here, : position + 1].to(q.dtype),
            gates[here],
            block_size=block_size,
            num_selected_blocks=num_selected_blocks,
            window=window,
            query_positions=positions[here],
            key_positions=torch.arange(position + 1, device=q.device)[None],
            dense_below=dense_below,
            scale=scale,
            compressed_k=compressed_k[here, : (position + 1) // block_size].to(q.dtype),
            compressed_v=compressed_v[here, : (position + 1) // block_size].to(q.dtype),
        )
    return output


def _pooled(tokens: Tensor, weights: Tensor | None) -> Tensor:
    """tokens `[block_size, H, D]` -> `[H, D]`."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if weights is None:
        return tokens.to(wide).mean(0)
    return (weights.to(wide) * tokens.to(wide)).sum(0)
