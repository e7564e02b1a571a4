"""One decoding step of retained attention over a fixed-size cache: append, evict and attend, in place."""

from typing import Any

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from ..rotary.tables import check_tables
from .eager import retained_decode as _eager
from .reference import retained_decode as _reference

__all__ = ["retained_decode"]

MAX_HEAD_SIZE = 256
MAX_TILE = 8192  # numbers of a group's queries, a row each in a tile of the kernel: 128 heads of size 64


def retained_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    last_position: Tensor,
    *,
    window: int,
    sinks: int = 0,
    positions: Tensor,
    scale: float | None = None,
    scores: Tensor | None = None,
    retained_positions: Tensor | None = None,
    num_retained: Tensor | None = None,
    fresh_score: Tensor | None = None,
    margin: int = 0,
    workspace: dict[str, Tensor] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Takes one new token a row into the cache and attends from it; equals `retained_attention` at every step.

    The cache holds W + C slots a key head. Slots [0, W) are a ring: position p lies in slot p mod W. Slots [W, W + C)
    hold the retained tokens, in no order, the first `num_retained` of them occupied. A step at position p:

    1. `fresh_score`, if given, is the final score of position p − margin.
    2. The token at p − W leaves the ring. If it is a sink or scores above 0, it takes a free slot, or that of the
       lowest-ranked retained token if it ranks before it: sinks first, then higher scores, then earlier positions.
    3. The new token, with score 0 until it is final, takes ring slot p mod W.
    4. Softmax attention over the ring and the retained slots.

    Without scores nothing but the sinks is retained: C is `sinks`, and the sink at position j lies in slot W + j.

    Args:
        q: `[B, 1, HQ, D]`. k, v: `[B, 1, H, D]`; H divides HQ. Rows of any of them may lie apart, as in slices of one
            projection. Rotary positions are applied already, unless `rotary` is given.
        keys, values: `[B, H, W + C, D]`, contiguous, updated in place.
        last_position: `[B]` int32, −1 for an empty row, updated in place.
        window: W, tokens, the query itself included. sinks: tokens, at most C.
        positions: `[B, 1]` int64 or int32, one above `last_position`; −1 is padding: its row stays as it is, its output
            is 0.
        scale: factor on the scores; D**-0.5 unless given.
        scores: `[B, H, W + C]` float32, retained_positions: `[B, H, C]` int32 (−1: empty), num_retained: `[B, H]`
            int32; contiguous, updated in place; all three or none.
        fresh_score: `[B, H]` float32. margin: tokens, at most W.
        workspace: a dictionary that belongs to this cache, in which the kernel leaves its scratch memory from one step
            for the next. None: every step makes its own.
        rotary: cos and sin `[B or 1, 1, R]`, R even and at most D. Given, q and k are those before RoPE, and the step
            rotates both first, as the op `rotary` of the same form does.

    Returns:
        `[B, 1, HQ, D]`, in the type of q. There is no gradient.

    Raises:
        ValueError: a shape does not fit the others, the cache is not contiguous, or a count is out of range.
    """
    op = "retained_decode"
    if q.ndim != 4 or q.shape[1] != 1:
        raise ValueError(f"{op}: q {list(q.shape)} must be [batch, 1, query heads, head size]")
    if keys.ndim != 4:
        raise ValueError(f"{op}: keys {list(keys.shape)} must be [batch, heads, slots, head size]")
    batch, _, query_heads, head_size = q.shape
    heads, slots = keys.shape[1:3]
    if heads == 0 or query_heads % heads:
        raise ValueError(f"{op}: {query_heads} query heads are not a multiple of {heads} key heads")
    capacity = slots - window
    _check_counts(op, window, capacity, sinks, margin)
    for name, tensor, expected in (
        ("k", k, (batch, 1, heads, head_size)),
        ("v", v, (batch, 1, heads, head_size)),
        ("keys", keys, (batch, heads, slots, head_size)),
        ("values", values, (batch, heads, slots, head_size)),
        ("last_position", last_position, (batch,)),
        ("positions", positions, (batch, 1)),
        ("scores", scores, (batch, heads, slots)),
        ("retained_positions", retained_positions, (batch, heads, capacity)),
        ("num_retained", num_retained, (batch, heads)),
        ("fresh_score", fresh_score, (batch, heads)),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, expected)
            if name not in ("k", "v", "positions", "fresh_score") and not tensor.is_contiguous():
                raise ValueError(f"{op}: {name} is updated in place and must be contiguous")
    if len({scores is None, retained_positions is None, num_retained is None}) != 1:
        raise ValueError(f"{op}: scores, retained_positions and num_retained are given together or not at all")
    if scores is None and (capacity != sinks or fresh_score is not None):
        raise ValueError(f"{op}: without scores there are as many slots beside the window as sinks, and no fresh_score")
    check_tables(op, rotary, batch, 1, head_size)
    tile = (1 << (query_heads // heads - 1).bit_length()) * (1 << (head_size - 1).bit_length())
    fits = head_size <= MAX_HEAD_SIZE and tile <= MAX_TILE
    form = choose(op, q, k, v, keys, values, *(rotary or ()), has_kernel=True, kernel_fits=fits)
    options: dict[str, Any] = {
        "window": window,
        "sinks": sinks,
        "positions": positions,
        "scale": head_size**-0.5 if scale is None else float(scale),
        "scores": scores,
        "retained_positions": retained_positions,
        "num_retained": num_retained,
        "fresh_score": fresh_score,
        "margin": margin,
        "rotary": rotary,
    }
    if form == "triton":
        from .kernel import retained_decode as kernel  # imports Triton, which need not be there

        return untraced(kernel)(q, k, v, keys, values, last_position, workspace=workspace, **options)
    run = _reference if form == "reference" else _eager
    return run(q, k, v, keys, values, last_position, **options)


def _check_counts(op: str, window: int, capacity: int, sinks: int, margin: int) -> None:
    if window < 1 or capacity < 0:
        raise ValueError(f"{op}: window is {window}, expected 1 to the number of slots ({window + capacity})")
    if not 0 <= sinks <= capacity:
        raise ValueError(f"{op}: sinks is {sinks}, expected 0 to {capacity}, the slots beside the window")
    if not 0 <= margin <= window:
        raise ValueError(f"{op}: margin is {margin}, expected 0 to window ({window})")
