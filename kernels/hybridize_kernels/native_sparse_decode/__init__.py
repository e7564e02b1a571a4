"""One decoding step of native sparse attention over a cache by position: append, pool and attend, in place."""

from typing import Any

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import native_sparse_decode as _eager
from .reference import native_sparse_decode as _reference

__all__ = ["native_sparse_decode"]

MAX_HEAD_SIZE = 256
MAX_TILE = 16384  # numbers of a group's queries, a row each in a tile of the kernel: 64 heads of size 256
MAX_BLOCKS = 32768  # whose importance one program holds at once: two million tokens in blocks of 64


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
    """Takes one new token a row into the cache and attends from it; equals `native_sparse_attention` at every step.

    The token at position p lies in slot p. A step at position p:

    1. The new key and value take slot p; the length becomes p + 1.
    2. If p is the last token of its block, the block's keys and values are pooled, once and for all: their mean, or
       with pooling weights Σ_i w_i ∘ k_i, summed in fp32.
    3. The three branches of `native_sparse_attention` and their gated sum. Read are the pooled blocks, the tokens of
       the chosen blocks and those of the window, and nothing else.

    Args:
        q: `[B, 1, HQ, D]`. k, v: `[B, 1, H, D]`; H divides HQ; rotary positions already applied.
        gates: `[B, 1, HQ, 3]`, already through the sigmoid, in the order compressed, selected, window.
        keys, values: `[B, capacity, H, D]`, contiguous, updated in place.
        compressed_k, compressed_v: `[B, capacity // block_size, H, D]`, contiguous, updated in place.
        lengths: `[B]` int32, tokens so far, updated in place.
        block_size, num_selected_blocks (at least 1), window, dense_below: tokens, blocks, tokens, tokens.
        positions: `[B, 1]` int64 or int32, equal to `lengths`; −1 is padding: its row stays as it is, its output is 0.
            At a position for which there is no slot the row stays as it is too, and its output is NaN.
        scale: positive factor on the scores; D**-0.5 unless given.
        key_pooling, value_pooling: `[block_size, H, D]`, both or none.
        workspace: a dictionary that belongs to this cache, in which the kernel leaves its scratch memory from one step
            for the next. None: every step makes its own.

    Returns:
        `[B, 1, HQ, D]`, in the type of q. There is no gradient.

    Raises:
        ValueError: a shape does not fit the others, the cache is not contiguous, or a count is out of range.

    Source: Yuan et al., https://arxiv.org/abs/2502.11089, with pooling as in `native_sparse_attention`.
    """
    op = "native_sparse_decode"
    for name, count in (("block_size", block_size), ("num_selected_blocks", num_selected_blocks), ("window", window)):
        if count < 1:
            raise ValueError(f"{op}: {name} is {count}, expected at least 1")
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale is {scale}, expected a positive factor")
    if q.ndim != 4 or q.shape[1] != 1:
        raise ValueError(f"{op}: q {list(q.shape)} must be [batch, 1, query heads, head size]")
    if keys.ndim != 4:
        raise ValueError(f"{op}: keys {list(keys.shape)} must be [batch, capacity, heads, head size]")
    batch, _, query_heads, head_size = q.shape
    capacity, heads = keys.shape[1:3]
    if heads == 0 or query_heads % heads:
        raise ValueError(f"{op}: {query_heads} query heads are not a multiple of {heads} key heads")
    if capacity < 1:
        raise ValueError(f"{op}: the cache has no slots")
    blocks = capacity // block_size
    for name, tensor, expected in (
        ("k", k, (batch, 1, heads, head_size)),
        ("v", v, (batch, 1, heads, head_size)),
        ("gates", gates, (batch, 1, query_heads, 3)),
        ("keys", keys, (batch, capacity, heads, head_size)),
        ("values", values, (batch, capacity, heads, head_size)),
        ("compressed_k", compressed_k, (batch, blocks, heads, head_size)),
        ("compressed_v", compressed_v, (batch, blocks, heads, head_size)),
        ("lengths", lengths, (batch,)),
        ("positions", positions, (batch, 1)),
    ):
        check_shape(op, name, tensor, expected)
        if name not in ("k", "v", "gates", "positions") and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is updated in place and must be contiguous")
    if (key_pooling is None) != (value_pooling is None):
        raise ValueError(f"{op}: key_pooling and value_pooling belong together: give both or none")
    if key_pooling is not None and value_pooling is not None:
        check_shape(op, "key_pooling", key_pooling, (block_size, heads, head_size))
        check_shape(op, "value_pooling", value_pooling, (block_size, heads, head_size))
    tile = (1 << (query_heads // heads - 1).bit_length()) * (1 << (head_size - 1).bit_length())
    fits = head_size <= MAX_HEAD_SIZE and tile <= MAX_TILE and blocks <= MAX_BLOCKS
    form = choose(op, q, k, v, keys, values, has_kernel=True, kernel_fits=fits)
    options: dict[str, Any] = {
        "block_size": block_size,
        "num_selected_blocks": num_selected_blocks,
        "window": window,
        "positions": positions,
        "dense_below": dense_below,
        "scale": head_size**-0.5 if scale is None else float(scale),
        "key_pooling": key_pooling,
        "value_pooling": value_pooling,
    }
    cache = keys, values, compressed_k, compressed_v, lengths
    if form == "triton":
        from .launches import native_sparse_decode as kernel  # imports Triton, which need not be there

        return untraced(kernel)(q, k, v, gates, *cache, workspace=workspace, **options)
    run = _reference if form == "reference" else _eager
    return run(q, k, v, gates, *cache, **options)
