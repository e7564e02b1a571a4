"""Native sparse attention: compressed blocks, selected blocks and a window, summed by gates (arXiv 2502.11089)."""

from torch import Tensor

from ..dispatch import check_shape, choose
from .eager import native_sparse_attention as _eager
from .reference import native_sparse_attention as _reference

__all__ = ["native_sparse_attention"]


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    block_size: int,
    num_selected_blocks: int,
    window: int,
    query_positions: Tensor,
    key_positions: Tensor,
    dense_below: int = 0,
    scale: float | None = None,
    compressed_k: Tensor | None = None,
    compressed_v: Tensor | None = None,
) -> Tensor:
    """Output = Σ gate · branch over the compressed, the selected and the window branch.

    A key's block is position // block_size. Query i sees the mean key and value of each complete block
    c < (pos_i + 1) // block_size; the tokens j <= i of its chosen blocks; and the tokens with pos_i − pos_j < window.
    Chosen are block 0, the current and the previous block, then the complete blocks with the highest compressed
    probability summed over the query heads of the group (on a tie the lower block) up to num_selected_blocks in all.
    The choice carries no gradient. A branch without keys is 0. Queries at positions below `dense_below` use full causal
    attention instead, without gates.

    Args:
        q: `[B, T, HQ, D]`. k, v: `[B, S, H, D]`; H divides HQ; rotary positions already applied.
        gates: `[B, T, HQ, 3]`, already through the sigmoid, in the order compressed, selected, window.
        block_size, num_selected_blocks (at least 1), window, dense_below: tokens, blocks, tokens, tokens.
        query_positions: `[B, T]`, key_positions: `[B, S]`, int64, real tokens counted from 0 in each row; −1 is padding
            (a padded query gives zeros).
        scale: factor on the scores; D**-0.5 unless given.
        compressed_k, compressed_v: `[B, blocks, H, D]`, means that a cache keeps; computed from k and v unless given.

    Returns:
        `[B, T, HQ, D]`.

    Raises:
        ValueError: a shape does not fit the others, or a count is out of range.

    Source: Yuan et al., https://arxiv.org/abs/2502.11089, with mean pooling for the learned compression.
    """
    op = "native_sparse_attention"
    for name, count in (("block_size", block_size), ("num_selected_blocks", num_selected_blocks), ("window", window)):
        if count < 1:
            raise ValueError(f"{op}: {name} is {count}, expected at least 1")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q {list(q.shape)} and k {list(k.shape)} must be [batch, time, heads, head size]")
    (batch, time, query_heads, head_size), (keys, heads) = q.shape, k.shape[1:3]
    if heads == 0 or query_heads % heads:
        raise ValueError(f"{op}: {query_heads} query heads are not a multiple of {heads} key heads")
    check_shape(op, "k", k, (batch, keys, heads, head_size))
    check_shape(op, "v", v, (batch, keys, heads, v.shape[-1]))
    check_shape(op, "gates", gates, (batch, time, query_heads, 3))
    check_shape(op, "query_positions", query_positions, (batch, time))
    check_shape(op, "key_positions", key_positions, (batch, keys))
    if (compressed_k is None) != (compressed_v is None):
        raise ValueError(f"{op}: compressed_k and compressed_v belong together: give both or none")
    if compressed_k is not None and compressed_v is not None:
        check_shape(op, "compressed_k", compressed_k, (batch, compressed_k.shape[1], heads, head_size))
        check_shape(op, "compressed_v", compressed_v, (batch, compressed_k.shape[1], heads, v.shape[-1]))
    run = _reference if choose(op, q, k, v, gates) == "reference" else _eager
    return run(
        q,
        k,
        v,
        gates,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        window=window,
        query_positions=query_positions,
        key_positions=key_positions,
        dense_below=dense_below,
        scale=scale,
        compressed_k=compressed_k,
        compressed_v=compressed_v,
    )
