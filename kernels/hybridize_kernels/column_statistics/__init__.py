"""What later queries look back at: for each key the probabilities that it gets after it has left a window."""

import torch
from torch import Tensor

from ..dispatch import check_shape, check_texts, choose, untraced
from .eager import attention_log_sum_exp as _eager_log_sum_exp
from .eager import column_statistics as _eager
from .reference import attention_log_sum_exp as _reference_log_sum_exp
from .reference import column_statistics as _reference

MAX_HEAD_SIZE = 256  # a tile of more does not fit into shared memory

__all__ = ["attention_log_sum_exp", "column_statistics"]


@torch.no_grad()
def column_statistics(
    q: Tensor,
    k: Tensor,
    log_sum_exp: Tensor | None = None,
    *,
    window: int,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    need_sum: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The largest and the summed probability that queries of the group at distance >= window give to each key.

    The probability is that of full causal attention, p_ij = exp(scale · q_i·k_j − log_sum_exp_i). It has no gradient.

    Args:
        q: `[B, T, HQ, D]`. k: `[B, T, H, D]`; H divides HQ; rotary positions already applied.
        log_sum_exp: `[B, T, HQ]` fp32, natural, over every key j <= i; computed from q and k unless given.
        window: tokens, the query itself included.
        positions: `[B, T]` int64, −1 is padding; the real tokens of a row stand in order and are counted from 0.
        cu_seqlens: int `[N + 1]` from 0 to at most T: the bounds of N documents packed into a batch of one row.
        scale: factor on q·k; D**-0.5 unless given.
        need_sum: False saves the exponentials, for a caller that wants the largest only.

    Returns:
        largest: `[B, T, H]` fp32, natural logarithm of the largest probability; −inf where no query is that far.
        summed: `[B, T, H]` fp32, sum of the probabilities; None unless need_sum.

    Raises:
        ValueError: a shape does not fit the others, or window < 1.
    """
    op = "column_statistics"
    check_texts(op, q, k, positions, cu_seqlens)
    if window < 1:
        raise ValueError(f"{op}: window is {window}, expected at least 1 (the query itself)")
    if log_sum_exp is not None:
        check_shape(op, "log_sum_exp", log_sum_exp, tuple(q.shape[:3]))
    form = choose(op, q, k, has_kernel=True, kernel_fits=q.shape[-1] <= MAX_HEAD_SIZE and q.dtype == k.dtype)
    if form == "triton":
        from .kernel import column_statistics as kernel

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    return run(
        q,
        k,
        log_sum_exp,
        window=window,
        positions=positions,
        cu_seqlens=cu_seqlens,
        scale=scale,
        need_sum=need_sum,
    )


@torch.no_grad()
def attention_log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Natural logarithm of Σ_{j <= i} exp(scale · q_i·k_j), what the softmax of full causal attention divides by.

    Args: as in `column_statistics`.

    Returns:
        `[B, T, HQ]` fp32, −inf where a query is padding. It has no gradient.

    Raises:
        ValueError: a shape does not fit the others.
    """
    op = "attention_log_sum_exp"
    check_texts(op, q, k, positions, cu_seqlens)
    form = choose(op, q, k, has_kernel=True, kernel_fits=q.shape[-1] <= MAX_HEAD_SIZE and q.dtype == k.dtype)
    if form == "triton":
        from .kernel import attention_log_sum_exp as kernel

        run = untraced(kernel)
    else:
        run = _reference_log_sum_exp if form == "reference" else _eager_log_sum_exp
    return run(q, k, positions=positions, cu_seqlens=cu_seqlens, scale=scale)
