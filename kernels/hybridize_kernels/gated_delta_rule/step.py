"""Decoding steps of the gated delta rule over states that are updated in place."""

from typing import Any

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, untraced
from ..rotary.tables import check_tables
from .eager import gated_delta_rule_step as _eager
from .step_reference import gated_delta_rule_step as _reference

__all__ = ["gated_delta_rule_step"]

MAX_TOKENS = 16
"""Past so many tokens a step of the kernel, which walks them one by one, is not what to call."""
MAX_HEAD_SIZE = 256


@torch.no_grad()
def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    decay_rate: Tensor | None = None,
    decay_bias: Tensor | None = None,
    beta_ceiling: float | None = None,
    real: Tensor | None = None,
    norm_epsilon: float | None = None,
    output_scale: Tensor | None = None,
    gate: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Walks the states over T tokens, in place, and returns what the queries see of them, finished if asked for.

    For each token, with a = exp(log_decay) and b = beta:

        S ← a S,    u = b (v − Sᵀ k),    S ← S + k uᵀ,    o = scale · Sᵀ q

    Then, each where it is given: o ← o / √(mean o² + norm_epsilon), o ← output_scale ∘ o, o ← 2 σ(gate) ∘ o.

    Args:
        q: `[B, T, HQ, K]`. k: `[B, T, H, K]`. v: `[B, T, HV, V]`. Each number of heads divides HS, the number of
            states of a row: state n reads query head n // (HS / HQ), and keys and values likewise.
        log_decay: `[B, T, HS]`, at most 0. beta: `[B, T, HS]`.
        state: `[S, HS, K, V]`, contiguous, in fp32, bf16 or fp16 (fp64 for fp64 inputs, without a kernel).
        slots: `[B]` int32 or int64, below S: row b has state[slots[b]], which no other row has; −1: the row is left
            out, its output is 0. None: row b has state[b].
        scale: factor on the output; K**-0.5 unless given.
        normalize_qk: L2-normalise q and k over K first.
        decay_rate, decay_bias: `[HS]`, both or none. Given, log_decay holds x of
            log a = −exp(decay_rate) · softplus(x + decay_bias).
        beta_ceiling: given, beta holds x of b = beta_ceiling · σ(x).
        real: `[B, T]` bool. Where False is padding, which may hold anything: the state stays, the output is 0.
        norm_epsilon: given, each head's output is normalised by its root mean square over V.
        output_scale: `[HS, V]`. gate: `[B, T, HS, V]`.
        rotary: cos and sin `[B or 1, T, R]`, R even and at most K. Given, q and k are those before RoPE, and the step
            rotates both first, as the op `rotary` of the same form does, before it normalises them.

    Returns:
        `[B, T, HS, V]`, in the type of v. There is no gradient.

    Raises:
        ValueError: a shape does not fit the others, the state is not contiguous, or has another type.

    Source: Yang et al., Gated Delta Networks, https://arxiv.org/abs/2412.06464, eq. 10.
    """
    op = "gated_delta_rule_step"
    _check(op, q, k, v, log_decay, beta, state, slots)
    heads, value_size = state.shape[1], state.shape[3]
    for name, tensor, expected in (
        ("decay_rate", decay_rate, (heads,)),
        ("decay_bias", decay_bias, (heads,)),
        ("real", real, q.shape[:2]),
        ("output_scale", output_scale, (heads, value_size)),
        ("gate", gate, (*q.shape[:2], heads, value_size)),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, expected)
    check_tables(op, rotary, q.shape[0], q.shape[1], state.shape[2])
    if (decay_rate is None) != (decay_bias is None):
        raise ValueError(f"{op}: decay_rate and decay_bias are given together or not at all")
    options: dict[str, Any] = {
        "slots": slots,
        "scale": k.shape[3] ** -0.5 if scale is None else float(scale),
        "normalize_qk": normalize_qk,
        "decay_rate": decay_rate,
        "decay_bias": decay_bias,
        "beta_ceiling": beta_ceiling,
        "real": real,
        "norm_epsilon": norm_epsilon,
        "output_scale": output_scale,
        "gate": gate,
        "rotary": rotary,
    }
    fits = q.shape[1] <= MAX_TOKENS and max(state.shape[2:]) <= MAX_HEAD_SIZE
    floats = (q, k, v, log_decay, beta, state, decay_rate, decay_bias, output_scale, gate, *(rotary or ()))
    form = choose(op, *floats, has_kernel=True, kernel_fits=fits)
    if form == "triton":
        from .step_kernel import gated_delta_rule_step as kernel  # imports Triton, which need not be there

        return untraced(kernel)(q, k, v, log_decay, beta, state, **options)
    run = _reference if form == "reference" else _eager
    return run(q, k, v, log_decay, beta, state, **options)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, slots: Tensor | None
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected [batch, time, heads, head size]")
    if state.ndim != 4:
        raise ValueError(f"{op}: state has shape {list(state.shape)}, expected [slots, heads, key size, value size]")
    if state.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{op}: state is {state.dtype}, expected a floating type of 16 bits or more")
    if not state.is_contiguous():
        raise ValueError(f"{op}: state is updated in place and must be contiguous")
    (batch, time), (heads, key_size, value_size) = q.shape[:2], state.shape[1:]
    for name, tensor, size in (("q", q, key_size), ("k", k, key_size), ("v", v, value_size)):
        if tensor.shape[2] == 0 or heads % tensor.shape[2]:
            raise ValueError(f"{op}: {heads} state heads are not a multiple of the {tensor.shape[2]} heads of {name}")
        check_shape(op, name, tensor, (batch, time, tensor.shape[2], size))
    check_shape(op, "log_decay", log_decay, (batch, time, heads))
    check_shape(op, "beta", beta, (batch, time, heads))
    if slots is not None:
        check_shape(op, "slots", slots, (batch,))
        if slots.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{op}: slots are {slots.dtype}, expected int32 or int64")
    elif state.shape[0] < batch:
        raise ValueError(f"{op}: {state.shape[0]} states for {batch} rows")
