"""What the loss says of each key once it has left a query's window: the gradient of a gate that acts only there."""

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import check_shape, check_texts, choose, untraced
from .eager import gate_gradient as _eager
from .reference import gate_gradient as _reference

MAX_HEAD_SIZE = 256  # a tile of more does not fit into shared memory
MAX_GRID = 2**16

Place = Literal["value", "logit"]

__all__ = ["gate_gradient"]


@torch.no_grad()
def gate_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output_gradient: Tensor,
    log_sum_exp: Tensor,
    delta: Tensor,
    exit_row: Tensor,
    *,
    window: int,
    hidden: bool,
    on: Place,
    largest: bool = False,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The gradient of a gate on each key that only queries at distance >= window pass through.

    With s_ij = scale · q_i·k_j − log_sum_exp_i, over the queries i of the key's document and of its group's heads,

        w_ij = exp(s_ij) where i < exit_row_j, else sigmoid(s_ij) if `hidden`, else 0
        on "value": Σ_i w_ij do_i·v_j          on "logit": Σ_i w_ij (do_i·v_j − delta_i)

    One more key of weight exp(s) moves a softmax's output by sigmoid(s) (v_j − o_i), whatever s is: of a key that a
    query does not see, the second is what the loss would change, to first order, if the query saw it. With `largest`
    it is the largest summand instead of the sum, and no gradient: how much the key matters to the query that it matters
    to most. It has no gradient itself.

    Args:
        q: `[B, T, HQ, D]`. k: `[B, T, H, D]`; H divides HQ; rotary positions already applied. v: `[B, T, H, V]`.
        output_gradient: `[B, T, HQ, V]`, the loss by the attention's output o.
        log_sum_exp: `[B, T, HQ]` fp32, natural, over what each query sees; −inf where it sees nothing.
        delta: `[B, T, HQ]` fp32, do_i·o_i, less the gradient of log_sum_exp where it has one.
        exit_row: int `[B, T, H]`, the first row of q that no longer sees the key outside its window; 0: none does.
        window: tokens, the query itself included.
        hidden: also over the queries that do not see the key.
        on: what the gate multiplies, the key's value or its weight in the softmax.
        largest: the largest of the summands, without their signs, instead of their sum.
        positions: `[B, T]` int64, −1 is padding; the real tokens of a row stand in order and are counted from 0.
        cu_seqlens: int `[N + 1]` from 0 to at most T: the bounds of N documents packed into a batch of one row.
        scale: factor on q·k; D**-0.5 unless given.

    Returns:
        `[B, T, H]` fp32 (fp64 of fp64), 0 where no query is that far.

    Raises:
        ValueError: a shape does not fit the others, window < 1, or `on` is neither.
    """
    op = "gate_gradient"
    if window < 1:
        raise ValueError(f"{op}: window is {window}, expected at least 1 (the query itself)")
    if on not in ("value", "logit"):
        raise ValueError(f"{op}: on is {on!r}, expected 'value' or 'logit'")
    check_texts(op, q, k, positions, cu_seqlens)
    size = v.shape[-1]
    check_shape(op, "v", v, (*k.shape[:3], size))
    check_shape(op, "output_gradient", output_gradient, (*q.shape[:3], size))
    for name, tensor in (("log_sum_exp", log_sum_exp), ("delta", delta)):
        check_shape(op, name, tensor, tuple(q.shape[:3]))
    check_shape(op, "exit_row", exit_row, tuple(k.shape[:3]))
    fits = (
        v.shape[-1] == q.shape[-1] <= MAX_HEAD_SIZE
        and q.dtype == k.dtype == v.dtype == output_gradient.dtype
        and k.shape[0] * k.shape[2] < MAX_GRID
    )
    form = choose(op, q, k, v, output_gradient, has_kernel=True, kernel_fits=fits)
    if form == "triton":
        from .kernel import gate_gradient as kernel

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    return run(
        q,
        k,
        v,
        output_gradient,
        log_sum_exp,
        delta,
        exit_row,
        window=window,
        hidden=hidden,
        on=on,
        largest=largest,
        positions=positions,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )
