"""Native sparse attention: compressed blocks, selected blocks and a window, summed by gates (arXiv 2502.11089)."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Implementation, check_shape, choose, untraced
from .eager import native_sparse_attention as _eager
from .reference import native_sparse_attention as _reference

__all__ = ["native_sparse_attention"]

BLOCK_SIZES = (16, 32, 64, 128)
"""Tokens of a block that the kernels know; any number in eager and in the reference."""
MAX_HEAD_SIZE = 256
MAX_GROUP = 64
MAX_BLOCK_ELEMENTS = 64 * 256
"""Of a block's keys of one head, which the kernels hold on chip beside its values."""
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


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
    """Output = Σ gate · branch over the compressed, the selected and the window branch.

    A key's block is position // block_size. Query i sees the compressed key and value of each complete block
    c < (pos_i + 1) // block_size; the tokens j <= i of its chosen blocks; and the tokens with pos_i − pos_j < window.
    Chosen are block 0, the current and the previous block, then the complete blocks with the highest compressed
    probability summed over the query heads of the group (on a tie the lower block) up to num_selected_blocks in all.
    The choice carries no gradient. A branch without keys is 0. Queries at positions below `dense_below` use full causal
    attention instead, without gates.

    Eager masks all keys of every query. The Triton kernels cost what is seen: a query up to num_selected_blocks ·
    block_size + window tokens, and T / block_size compressed blocks, once for their branch and once for the choice.
    They run on CUDA where the order of the keys is known (each form of positions below but that of two different
    tensors), with blocks of 16, 32, 64 or 128 tokens (of 128, heads up to 128), up to 64 query heads a key head, value
    heads as large as key heads, up to 256, and all of q, k, v and what is compressed in one dtype.

    Args:
        q: `[B, T, HQ, D]`. k, v: `[B, S, H, D]`; H divides HQ; rotary positions already applied.
        gates: `[B, T, HQ, 3]`, already through the sigmoid, in the order compressed, selected, window.
        block_size, window, dense_below: tokens. num_selected_blocks: blocks, at least 1; the three that are always
            chosen count among them, and stay chosen where they are more.
        query_positions: `[B, T]` int64, real tokens counted from 0 in each row; −1 is padding and gives zeros.
        key_positions: `[B, S]` int64, as query_positions, in any order. The same tensor for both promises that the real
            tokens of a row are in order, with padding anywhere.
            Neither: no padding, keys in order from position 0, the queries are the last T of them.
        key_lengths: `[B]` int32 or int64, with query_positions and instead of key_positions: keys lie by position, slot
            j of row b holds position j, and slots from key_lengths[b] on are empty, whatever finite numbers they hold.
            It promises that the real queries of a row are the last of its keys, in order.
        cu_seqlens: `[N + 1]` int32 with B = 1 and S = T: bounds, the first 0 and the last T, of documents packed side
            by
            side, which do not see each other. Positions and blocks count in each document and are not given.
        scale: positive factor on the scores; D**-0.5 unless given.
        compressed_k, compressed_v: `[B, blocks, H, D]`, at least S // block_size blocks, as a cache keeps them (finite
            numbers where a block is not complete); pooled from k and v unless given. Differentiable.
        key_pooling, value_pooling: `[block_size, H, D]`, both or none: the compressed key of a block is Σ_i w_i ∘ k_i
            over its tokens, the value likewise. A learned compression: weights of 1 / block_size are the mean, which is
            what stands for None. Differentiable; not given with compressed_k, which is pooled already.

    Returns:
        `[B, T, HQ, D]`.

    Raises:
        ValueError: a shape does not fit the others, a count is out of range, or arguments exclude each other.

    Source: Yuan et al., https://arxiv.org/abs/2502.11089, eq. 5 to 12, with blocks that do not overlap and a linear
    compression in place of the paper's MLP.
    """
    op = "native_sparse_attention"
    for name, count in (("block_size", block_size), ("num_selected_blocks", num_selected_blocks), ("window", window)):
        if count < 1:
            raise ValueError(f"{op}: {name} is {count}, expected at least 1")
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale is {scale}, expected a positive factor")
    _check_heads(op, q, k, v, gates)
    _check_positions(op, q, k, query_positions, key_positions, key_lengths, cu_seqlens)
    _check_compression(op, k, v, block_size, (compressed_k, compressed_v), (key_pooling, value_pooling))
    if compressed_k is not None and cu_seqlens is not None:
        raise ValueError(f"{op}: compressed_k and compressed_v belong to a cache, not to documents of cu_seqlens")
    in_order = key_positions is None or key_positions is query_positions
    others = (gates, key_pooling, value_pooling)
    form = _choose(op, q, k, v, (compressed_k, compressed_v), others, block_size=block_size, in_order=in_order)
    run = {"reference": _reference, "eager": _eager, "triton": _triton}[form]
    return run(  # type: ignore[no-any-return, operator]
        q,
        k,
        v,
        gates,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        window=window,
        query_positions=query_positions,
        key_positions=key_positions,
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
        dense_below=dense_below,
        scale=scale,
        compressed_k=compressed_k,
        compressed_v=compressed_v,
        key_pooling=key_pooling,
        value_pooling=value_pooling,
    )


def _choose(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    compressed: tuple[Tensor | None, ...],
    others: tuple[Tensor | None, ...],
    *,
    block_size: int,
    in_order: bool,
) -> Implementation:
    fits = (
        in_order
        and block_size in BLOCK_SIZES
        and min(q.numel(), k.numel()) > 0
        and {x.dtype for x in (k, v, *compressed) if x is not None} == {q.dtype}
        and {x.dtype for x in (q, *others) if x is not None} <= DTYPES
        and q.shape[0] * k.shape[2] < 2**16  # an axis of the grid
        and q.shape[-1] == v.shape[-1] <= MAX_HEAD_SIZE
        and q.shape[2] // k.shape[2] <= MAX_GROUP
        and block_size * (1 << (q.shape[-1] - 1).bit_length()) <= MAX_BLOCK_ELEMENTS
        and max(q.shape[1], k.shape[1]) < 2**30
    )
    return choose(op, q, k, v, *compressed, *others, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)


def _triton(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **options: Any) -> Tensor:
    from .attention import native_sparse_attention as run  # needs Triton

    result: Tensor = untraced(run)(q, k, v, gates, **options)
    return result


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q {list(q.shape)} and k {list(k.shape)} must be [batch, time, heads, head size]")
    (batch, time, query_heads, head_size), (keys, heads) = q.shape, k.shape[1:3]
    if heads == 0 or query_heads % heads:
        raise ValueError(f"{op}: {query_heads} query heads are not a multiple of {heads} key heads")
    check_shape(op, "k", k, (batch, keys, heads, head_size))
    check_shape(op, "v", v, (batch, keys, heads, v.shape[-1]))
    check_shape(op, "gates", gates, (batch, time, query_heads, 3))


def _check_positions(
    op: str,
    q: Tensor,
    k: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    (batch, time), keys = q.shape[:2], k.shape[1]
    of_keys = [x for x in (key_positions, key_lengths) if x is not None]
    if len(of_keys) != (query_positions is not None):
        raise ValueError(f"{op}: give query_positions with either key_positions or key_lengths, or none of the three")
    if query_positions is None and time > keys:
        raise ValueError(f"{op}: {time} queries cannot be the last of {keys} keys; give positions")
    for name, x, expected in (
        ("query_positions", query_positions, (batch, time)),
        ("key_positions", key_positions, (batch, keys)),
        ("key_lengths", key_lengths, (batch,)),
    ):
        if x is not None:
            check_shape(op, name, x, expected)
    if cu_seqlens is not None and (batch != 1 or keys != time or query_positions is not None):
        raise ValueError(f"{op}: cu_seqlens needs one row of as many keys as queries, and no positions")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or len(cu_seqlens) < 2):
        raise ValueError(
            f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, expected the bounds of a document at least"
        )


def _check_compression(
    op: str,
    k: Tensor,
    v: Tensor,
    block_size: int,
    compressed: tuple[Tensor | None, Tensor | None],
    pooling: tuple[Tensor | None, Tensor | None],
) -> None:
    for names, pair in (("compressed_k and compressed_v", compressed), ("key_pooling and value_pooling", pooling)):
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(f"{op}: {names} belong together: give both or none")
    if compressed[0] is not None and pooling[0] is not None:
        raise ValueError(f"{op}: compressed_k and compressed_v are pooled already: give them or key_pooling")
    batch, keys, heads = k.shape[:3]
    for names, x, like in zip("kv", compressed, (k, v), strict=True):
        if x is not None:
            blocks = max((keys // block_size, *x.shape[1:2]))
            check_shape(op, f"compressed_{names}", x, (batch, blocks, heads, like.shape[-1]))
    for names, x, like in zip(("key", "value"), pooling, (k, v), strict=True):
        if x is not None:
            check_shape(op, f"{names}_pooling", x, (block_size, heads, like.shape[-1]))
