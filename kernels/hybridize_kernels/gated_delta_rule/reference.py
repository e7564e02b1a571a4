"""The gated delta rule as its equation reads: one token after the other."""

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
) -> tuple[Tensor, Tensor | None]:
    """See `hybridize_kernels.gated_delta_rule`; the loop below is what the other forms must equal."""
    batch, time, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    scale = key_size**-0.5 if scale is None else scale

    q, k = q.to(dtype), k.to(dtype)
    if normalize_qk:
        q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q = q.repeat_interleave(value_heads // heads, dim=2)  # [B, T, HV, K]
    k = k.repeat_interleave(value_heads // heads, dim=2)
    decay = log_decay.to(dtype).exp()

    state = q.new_zeros(batch, value_heads, key_size, value_size) if initial_state is None else initial_state.to(dtype)
    outputs = [v.new_zeros(batch, 0, value_heads, value_size)]
    for t in range(time):
        state = decay[:, t, :, None, None] * state
        read = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        delta = beta[:, t, :, None].to(dtype) * (v[:, t].to(dtype) - read)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], delta)
        output = scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t])
        outputs.append(output.to(v.dtype)[:, None])
    return torch.cat(outputs, dim=1), state if output_final_state else None
