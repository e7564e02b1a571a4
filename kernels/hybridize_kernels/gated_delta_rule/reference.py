"""The gated delta rule as its equation reads: one token after the other."""

from itertools import pairwise

import torch
from torch import Tensor


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
    """See `hybridize_kernels.gated_delta_rule`; the loop below is what the other forms must equal."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    heads, key_size, value_size = log_decay.shape[2], q.shape[-1], v.shape[-1]
    scale = key_size**-0.5 if scale is None else scale
    # (row, begin, end) of each sequence
    sequences = [(row, 0, q.shape[1]) for row in range(q.shape[0])]
    if cu_seqlens is not None:
        sequences = [(0, begin, end) for begin, end in pairwise(cu_seqlens.tolist())]

    q, k = q.to(dtype), k.to(dtype)
    if normalize_qk:
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q, k, values = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v.to(dtype)))
    decay, beta = log_decay.to(dtype).exp(), beta.to(dtype)

    outputs = [q.new_zeros(0, heads, value_size)]
    states = [q.new_zeros(0, heads, key_size, value_size)]
    for n, (row, begin, end) in enumerate(sequences):
        state = q.new_zeros(heads, key_size, value_size) if initial_state is None else initial_state[n].to(dtype)
        for t in range(begin, end):
            state = decay[row, t, :, None, None] * state
            read = torch.einsum("hkv,hk->hv", state, k[row, t])
            delta = beta[row, t, :, None] * (values[row, t] - read)
            state = state + torch.einsum("hk,hv->hkv", k[row, t], delta)
            outputs.append(scale * torch.einsum("hkv,hk->hv", state, q[row, t])[None])
        states.append(state[None])
    missing = q.shape[0] * q.shape[1] - len(outputs) + 1  # behind the last packed sequence
    outputs.append(q.new_zeros(missing, heads, value_size))
    output = torch.cat(outputs).view(*q.shape[:2], heads, value_size).to(v.dtype)
    return output, torch.cat(states) if output_final_state else None
