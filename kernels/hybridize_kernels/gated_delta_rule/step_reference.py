"""Decoding steps of the gated delta rule as the equation reads: one row, token and head after the other."""

import torch
from torch import Tensor

from ..rotary.reference import rotary as rotate


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
    scale: float,
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
    """See `hybridize_kernels.gated_delta_rule_step`; what the other forms must equal."""
    if rotary is not None:
        q, k = rotate(q, k, *rotary)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, time = q.shape[:2]
    heads, value_size = state.shape[1], state.shape[3]
    queries, keys, values = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v))
    if normalize_qk:
        queries = queries / (queries.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        keys = keys / (keys.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    log_a, b = log_decay.to(dtype), beta.to(dtype)
    if decay_rate is not None and decay_bias is not None:
        log_a = -decay_rate.to(dtype).exp() * torch.nn.functional.softplus(log_a + decay_bias.to(dtype))
    if beta_ceiling is not None:
        b = beta_ceiling * b.sigmoid()

    output = v.new_zeros(batch, time, heads, value_size)
    for row in range(batch):
        slot = row if slots is None else int(slots[row])
        if slot < 0:
            continue
        for n in range(heads):
            S = state[slot, n].to(dtype)
            for t in range(time):
                if real is not None and not real[row, t]:
                    continue
                query, key, value = queries[row, t, n], keys[row, t, n], values[row, t, n]
                S = log_a[row, t, n].exp() * S
                u = b[row, t, n] * (value - S.T @ key)
                S = S + torch.outer(key, u)
                o = scale * (S.T @ query)
                if norm_epsilon is not None:
                    o = o / (o.square().mean() + norm_epsilon).sqrt()
                if output_scale is not None:
                    o = o * output_scale[n].to(dtype)
                if gate is not None:
                    o = o * 2 * gate[row, t, n].to(dtype).sigmoid()
                output[row, t, n] = o.to(v.dtype)
            state[slot, n] = S.to(state.dtype)
    return output
