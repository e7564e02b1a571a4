"""Gated delta rule: linear attention whose state forgets by a decay and corrects by a delta (arXiv 2412.06464)."""

import torch
from torch import Tensor

from ..dispatch import check_shape, choose, needs_grad, untraced
from .eager import gated_delta_rule as _eager
from .reference import gated_delta_rule as _reference
from .step import gated_delta_rule_step

MAX_DECODE_TOKENS = 16
"""The decode kernel walks the tokens one by one; past a few of them the chunked form is faster."""
MAX_HEAD_SIZE = 256

__all__ = ["gated_delta_rule", "gated_delta_rule_step"]


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
    cu_seqlens: Tensor | None = None,
    store_states: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · S_tᵀ q_t with S_t = a_t (I − b_t k_t k_tᵀ) S_{t−1} + b_t k_t v_tᵀ and a_t = exp(log_decay_t).

    There are HS states, and each of HQ, H and HV divides HS: state head n reads query head n // (HS / HQ), key head
    n // (HS / H) and value head n // (HS / HV). So grouped keys and values of a pretrained model are never repeated in
    memory, nor are the keys of a model with more value heads than key heads.

    Args:
        q: `[B, T, HQ, K]`. k: `[B, T, H, K]`. v: `[B, T, HV, V]`.
        log_decay: `[B, T, HS]`, finite and at most 0. beta: `[B, T, HS]` in [0, 2].
            log_decay = 0 with beta = 0 leaves the state untouched: that is how padding is written.
        scale: factor on the output; K**-0.5 unless given.
        initial_state: `[B, HS, K, V]`; zeros unless given.
        output_final_state: also return the state after the last token.
        normalize_qk: L2-normalise q and k over K first.
        cu_seqlens: `[N + 1]` integers, 0 first: B is 1, and N sequences lie one after the other, each with a state of
            its own (initial and final states `[N, HS, K, V]`). Behind the last of them the output and all gradients
            are 0. Kernels never read it on the host; it is taken for changed when torch counts a change of it, which
            it does not of what is written through `.data` or by another library.
        store_states: in training, keep the state that enters each chunk of tokens for the backward pass (2 K V / C
            bytes a token and head in bf16, and as much again for other intermediates); otherwise compute them again.

    Returns:
        The output `[B, T, HS, V]` in v's dtype and, if asked for, the final state `[B, HS, K, V]` in fp32 (fp64 for
        fp64 inputs).

    Raises:
        ValueError: a shape does not fit the others.

    Source: Yang et al., Gated Delta Networks, https://arxiv.org/abs/2412.06464, eq. 10, with beta up to 2 allowed.
    """
    _check(q, k, v, log_decay, beta, initial_state, cu_seqlens)
    tensors = (q, k, v, log_decay, beta, initial_state)
    halves_or_single = all(x.dtype != torch.float64 for x in (q, k, v))
    fits = halves_or_single and max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_SIZE
    form = choose("gated_delta_rule", *tensors, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
    options = {
        "scale": scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "normalize_qk": normalize_qk,
    }
    if form == "triton" and q.shape[1] <= MAX_DECODE_TOKENS and cu_seqlens is None and not needs_grad(*tensors):
        from .step_kernel import gated_delta_rule as recurrent

        return untraced(recurrent)(q, k, v, log_decay, beta, **options)
    if form == "triton":
        from .chunked import gated_delta_rule as chunked

        run = untraced(chunked)
    else:
        run = _reference if form == "reference" else _eager
    return run(q, k, v, log_decay, beta, **options, cu_seqlens=cu_seqlens, store_states=store_states)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    op = "gated_delta_rule"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected [batch, time, heads, head size]")
    batch, time, _, key_size = q.shape
    value_size = v.shape[3]
    if log_decay.ndim != 3:
        raise ValueError(f"{op}: log_decay has shape {list(log_decay.shape)}, expected [batch, time, state heads]")
    heads = log_decay.shape[2]
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        if tensor.shape[2] == 0 or heads % tensor.shape[2]:
            raise ValueError(f"{op}: {heads} state heads are not a multiple of {tensor.shape[2]} {name} heads")
    check_shape(op, "k", k, (batch, time, k.shape[2], key_size))
    check_shape(op, "v", v, (batch, time, v.shape[2], value_size))
    check_shape(op, "log_decay", log_decay, (batch, time, heads))
    check_shape(op, "beta", beta, (batch, time, heads))
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
            raise ValueError(
                f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)} and q a batch of {batch}, "
                "expected [N + 1] with N > 0, and one row"
            )
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        check_shape(op, "initial_state", initial_state, (sequences, heads, key_size, value_size))
