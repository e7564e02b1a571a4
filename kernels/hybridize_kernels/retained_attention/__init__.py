"""Softmax attention over a window, sinks and retained tokens, with one meaning in training, prefill and decode."""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..dispatch import Implementation, check_shape, choose, needs_grad, untraced
from .eager import eviction_position as _eager_eviction_position
from .eager import retained_attention as _eager
from .reference import eviction_position as _reference_eviction_position
from .reference import retained_attention as _reference
from .score_gradient import GATES, Gate, ScoreGradient
from .score_gradient import retained_attention as _gated_eager

__all__ = ["eviction_position", "retained_attention"]

MAX_HEAD_SIZE = 256
MAX_GROUP = 64
DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@overload
def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retention_score: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    budget: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    ordered_from: int | None = None,
    cu_seqlens: Tensor | None = None,
    score_gradient: ScoreGradient = "straight_through",
    return_log_sum_exp: Literal[False] = False,
) -> Tensor: ...


@overload
def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retention_score: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    budget: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    ordered_from: int | None = None,
    cu_seqlens: Tensor | None = None,
    score_gradient: ScoreGradient = "straight_through",
    return_log_sum_exp: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def retained_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retention_score: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    budget: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    scale: float | None = None,
    ordered_from: int | None = None,
    cu_seqlens: Tensor | None = None,
    score_gradient: ScoreGradient = "straight_through",
    return_log_sum_exp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys it sees.

    Key j is kept when position(j) < sinks or score(j) > 0. Query i sees key j when 0 <= pos_j <= pos_i and either
    pos_i − pos_j < window, or j is kept and fewer than `budget` kept keys that have left i's window rank before j.
    Sinks rank first, then higher scores, then earlier positions: what a cache of `budget` slots holds when a token
    applies for a slot as it leaves the window and replaces the lowest-ranked one it beats.

    The cost is that of the pairs that are seen, T · (window + retained), where the Triton kernels run: on CUDA, with
    keys whose order is known (no positions, the same tensor for both, `ordered_from` or `cu_seqlens`).

    Args:
        q: `[B, T, HQ, D]`. k, v: `[B, S, H, D]`; H divides HQ; rotary positions already applied.
        retention_score: `[B, S, H]`, or None (nothing but window and sinks).
        window: tokens, the query itself included. sinks: tokens. budget: retained tokens, sinks included; None: no cap.
        query_positions: `[B, T]` int64, real tokens counted from 0 in each row; −1 is padding and gives zeros.
        key_positions: `[B, S]` or `[B, S, H]` int64, distinct in a row (and head), in any order; −1 is an empty slot.
            Neither: no padding, keys in order, the queries are the last T of them. The same tensor for both promises
            that the real tokens of a row are in order and counted from 0, with padding anywhere.
        scale: positive factor on q·k; D**-0.5 unless given.
        ordered_from: a promise about key_positions, which spares looking: keys are in order of position; from this
            column on positions are consecutive, after padding, the same for all heads, and the queries are the last T;
            the columns before it have left every query's window.
        cu_seqlens: `[N + 1]` int32 with B = 1 and S = T: bounds, from 0 to T, of documents packed side by side, which
            do not see each other. Positions count in each document and are not given.
        score_gradient: of a score, that of a gate of value 1 on its key's value ("straight_through"), over all queries
            that see the key: ⟨dv_j, v_j⟩ over the group's query heads. The others are of a gate that acts outside the
            window only (see `gate_gradient`): "outside" on the value, "logit" on the softmax's weight, "counterfactual"
            also on that of keys that are not retained, as if they were. "influence" is no gradient: the largest
            absolute summand of the last, for whoever regresses a score on it. They need as many keys as queries, in
            one order.
        return_log_sum_exp: also return the logarithm of each softmax's denominator; it has a gradient.

    Returns:
        `[B, T, HQ, D]`; with return_log_sum_exp also fp32 (fp64 of fp64) `[B, T, HQ]`, −inf where nothing is seen.
        An infinite score has no gradient, nor has a sink's, which stays whatever its score, unless "straight_through".

    Raises:
        ValueError: a shape does not fit the others, a count is out of range, or a score cannot have this gradient.
    """
    op = "retained_attention"
    _check_counts(op, sinks, budget, window)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q {list(q.shape)} and k {list(k.shape)} must be [batch, time, heads, head size]")
    (batch, time, query_heads, head_size), (keys, heads) = q.shape, k.shape[1:3]
    if heads == 0 or query_heads % heads:
        raise ValueError(f"{op}: {query_heads} query heads are not a multiple of {heads} key heads")
    check_shape(op, "k", k, (batch, keys, heads, head_size))
    check_shape(op, "v", v, (batch, keys, heads, v.shape[-1]))
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale is {scale}, expected a positive factor")
    if (query_positions is None) != (key_positions is None):
        raise ValueError(f"{op}: query_positions and key_positions are given together or not at all")
    if query_positions is None and time > keys:
        raise ValueError(f"{op}: {time} queries cannot be the last of {keys} keys; give positions")
    if query_positions is not None and key_positions is not None:
        check_shape(op, "query_positions", query_positions, (batch, time))
        _check_keys(op, key_positions, retention_score, (batch, keys, heads))
    elif retention_score is not None:
        check_shape(op, "retention_score", retention_score, (batch, keys, heads))
    if cu_seqlens is not None and (batch != 1 or keys != time or key_positions is not None):
        raise ValueError(f"{op}: cu_seqlens needs one row of as many keys as queries, and no positions")
    if ordered_from is not None and not (key_positions is not None and 0 <= ordered_from <= keys - time):
        raise ValueError(f"{op}: ordered_from is {ordered_from}, expected positions and at most {keys - time}")
    whole = time == keys and key_positions is query_positions and ordered_from is None
    gate = _gate_of(op, score_gradient, retention_score, whole=whole)
    form = _choose(
        q, k, v, retention_score, query_positions, key_positions, ordered_from=ordered_from, cu_seqlens=cu_seqlens
    )
    run: Any = {"reference": _reference, "eager": _eager, "triton": _triton}[form]
    if gate is not None:
        # Of a maximum the reference has no definition by autograd; that of `gate_gradient` is compared with its own.
        run = partial(_gated_eager if form == "eager" or (form == "reference" and gate.largest) else run, gate=gate)
    return run(  # type: ignore[no-any-return]
        q,
        k,
        v,
        retention_score,
        window=window,
        sinks=sinks,
        budget=budget,
        query_positions=query_positions,
        key_positions=key_positions,
        scale=scale,
        ordered_from=ordered_from,
        cu_seqlens=cu_seqlens,
        return_log_sum_exp=return_log_sum_exp,
    )


def _gate_of(op: str, score_gradient: str, score: Tensor | None, *, whole: bool) -> Gate | None:
    """None where no score needs a gradient, or the straight-through one is asked for."""
    if score_gradient not in GATES:
        raise ValueError(f"{op}: score_gradient is {score_gradient!r}, expected one of {', '.join(GATES)}")
    gate = GATES[score_gradient]
    if gate is None or not needs_grad(score):
        return None
    if not whole:
        raise ValueError(
            f"{op}: score_gradient {score_gradient!r} needs whole texts, as many keys as queries in one order; beside "
            "the keys of a cache it can only be 'straight_through'"
        )
    return gate


def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retention_score: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    *,
    ordered_from: int | None,
    cu_seqlens: Tensor | None,
) -> Implementation:
    known = key_positions is None or key_positions is query_positions or ordered_from is not None
    fits = (
        (known or cu_seqlens is not None)
        and min(q.numel(), k.numel()) > 0
        and q.dtype == k.dtype == v.dtype
        and {q.dtype, q.dtype if retention_score is None else retention_score.dtype} <= DTYPES
        and q.shape[0] * k.shape[2] < 2**16  # an axis of the grid
        and q.shape[-1] == v.shape[-1] <= MAX_HEAD_SIZE
        and q.shape[2] // k.shape[2] <= MAX_GROUP
        and max(q.shape[1], k.shape[1]) < 2**30
    )
    return choose(
        "retained_attention", q, k, v, retention_score, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True
    )


def _triton(*args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    from .attention import retained_attention as run  # needs Triton

    return untraced(run)(*args, **options)


def eviction_position(score: Tensor, key_positions: Tensor, *, sinks: int, budget: int | None, window: int) -> Tensor:
    """The position of the newest token outside the window from which on each key is no longer retained.

    Query i retains key j (outside its window) exactly when pos_i − window < eviction_position_j. The largest int64
    means never evicted; a key that is not kept, or has `budget` better ones before it, gets its own position; an empty
    slot −1.

    Args:
        score: `[B, S, H]`. key_positions: `[B, S]` or `[B, S, H]` int64.
        sinks, budget, window: as in retained_attention.
            The window moves every query's boundary alike, so it does not change the result.

    Returns:
        int64 `[B, S, H]`.
    """
    op = "eviction_position"
    _check_counts(op, sinks, budget, window)
    if score.ndim != 3:
        raise ValueError(f"{op}: score has shape {list(score.shape)}, expected [batch, keys, heads]")
    _check_keys(op, key_positions, score, tuple(score.shape))
    run = _reference_eviction_position if choose(op, score) == "reference" else _eager_eviction_position
    return run(score, key_positions, sinks=sinks, budget=budget, window=window)


def _check_counts(op: str, sinks: int, budget: int | None, window: int) -> None:
    if window < 1:
        raise ValueError(f"{op}: window is {window}, expected at least 1 (the query itself)")
    if sinks < 0:
        raise ValueError(f"{op}: sinks is {sinks}, expected at least 0")
    if budget is not None and budget < 0:
        raise ValueError(f"{op}: budget is {budget}, expected at least 0, or None for no cap")


def _check_keys(op: str, positions: Tensor, score: Tensor | None, expected: tuple[int, ...]) -> None:
    if positions.ndim == 3:
        check_shape(op, "key_positions", positions, expected)
    else:
        check_shape(op, "key_positions", positions, expected[:2])
    if score is not None:
        check_shape(op, "retention_score", score, expected)
