"""Gated delta rule: linear attention whose state forgets by a decay and corrects by a delta (arXiv 2412.06464)."""

from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from .eager import gated_delta_rule as _eager
from .reference import gated_delta_rule as _reference

# The decode kernel walks the tokens one by one; past a few of them the chunked form is faster.
MAX_DECODE_TOKENS = 16
MAX_DECODE_HEAD_SIZE = 256

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · S_tᵀ q_t with S_t = a_t (I − b_t k_t k_tᵀ) S_{t−1} + b_t k_t v_tᵀ and a_t = exp(log_decay_t).

    Args:
        q, k: `[B, T, H, K]`. v: `[B, T, HV, V]`; HV is a multiple of H and value head n reads key head n // (HV / H).
        log_decay: `[B, T, HV]`, finite and at most 0. beta: `[B, T, HV]` in [0, 2].
            log_decay = 0 with beta = 0 leaves the state untouched: that is how padding is written.
        scale: factor on the output; K**-0.5 unless given.
        initial_state: `[B, HV, K, V]`; zeros unless given.
        output_final_state: also return the state after the last token.
        normalize_qk: L2-normalise q and k over K first.

    Returns:
        The output `[B, T, HV, V]` in v's dtype and, if asked for, the final state `[B, HV, K, V]` in fp32 (fp64 for
        fp64 inputs).

    Raises:
        ValueError: a shape does not fit the others.

    Source: Yang et al., Gated Delta Networks, https://arxiv.org/abs/2412.06464, eq. 10, with beta up to 2 allowed.
    """
    _check(q, k, v, log_decay, beta, initial_state)
    fits = q.shape[1] <= MAX_DECODE_TOKENS and max(q.shape[-1], v.shape[-1]) <= MAX_DECODE_HEAD_SIZE
    form = choose("gated_delta_rule", q, k, v, log_decay, beta, initial_state, has_kernel=True, kernel_fits=fits)
    if form == "triton":
        from .decode import gated_delta_rule as kernel

        run = untraced(kernel)
    else:
        run = _reference if form == "reference" else _eager
    return run(
        q,
        k,
        v,
        log_decay,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        normalize_qk=normalize_qk,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial_state: Tensor | None) -> None:
    op = "gated_delta_rule"
    for name, tensor in (("q", q), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected [batch, time, heads, head size]")
    batch, time, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    if heads == 0 or value_heads % heads:
        raise ValueError(f"{op}: {value_heads} value heads are not a multiple of {heads} key heads")
    check_shape(op, "k", k, (batch, time, heads, key_size))
    check_shape(op, "v", v, (batch, time, value_heads, value_size))
    check_shape(op, "log_decay", log_decay, (batch, time, value_heads))
    check_shape(op, "beta", beta, (batch, time, value_heads))
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (batch, value_heads, key_size, value_size))
