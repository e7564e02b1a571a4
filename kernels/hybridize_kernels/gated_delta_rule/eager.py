"""The gated delta rule in plain PyTorch: chunked for training and prefill, recurrent for a few tokens.

Inside a chunk with inclusive decay sums g and entering state S, the corrections u_t = b_t (v_t − a_t S_{t−1}ᵀ k_t)
solve one unit lower triangular system, (I + A) U = diag(b) V − diag(b e^g) K S with A_ij = b_i e^(g_i − g_j) k_i·k_j
for j < i. Everything but the walk of S over the chunks is done for all chunks at once.
This file imports nothing but torch: exported models carry it.
"""

import torch
from torch import Tensor

CHUNK = 64
RECURRENT_TOKENS = 8


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

    q, k: `[B, T, H, K]`; v: `[B, T, HV, V]`, HV a multiple of H; log_decay, beta `[B, T, HV]`; state `[B, HV, K, V]`.
    Returns the output `[B, T, HV, V]` in v's dtype and, if asked for, the final state in fp32 (fp64 for fp64 inputs).
    Source: https://arxiv.org/abs/2412.06464 (chunked form: https://arxiv.org/abs/2406.06484, section 3).
    """
    batch, time, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    out_dtype = v.dtype
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    scale = key_size**-0.5 if scale is None else scale

    # Under autocast the matrix products would fall back to half precision, in which the solve is not safe.
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_decay, beta = (x.transpose(1, 2).to(dtype) for x in (q, k, v, log_decay, beta))  # [B, H, T, ...]
        if normalize_qk:
            q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)
            k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        q = q * scale
        if value_heads != heads:
            q = q.repeat_interleave(value_heads // heads, dim=1)
            k = k.repeat_interleave(value_heads // heads, dim=1)
        if initial_state is None:
            state = q.new_zeros(batch, value_heads, key_size, value_size)
        else:
            state = initial_state.to(dtype)
        tracked = any(x.requires_grad for x in (q, k, v, log_decay, beta, state))
        if time <= RECURRENT_TOKENS and not (torch.is_grad_enabled() and tracked):
            output, state = _recurrent(q, k, v, log_decay, beta, state)
        else:
            output, state = _chunked(q, k, v, log_decay, beta, state)
    return output.transpose(1, 2).to(out_dtype), state if output_final_state else None


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    decay = log_decay.exp()
    output = torch.empty_like(v)
    for t in range(v.shape[2]):
        state = state * decay[:, :, t, None, None]
        key = k[:, :, t, :, None]  # [B, HV, K, 1]
        delta = beta[:, :, t, None] * (v[:, :, t] - (state * key).sum(-2))
        state = state + key * delta[:, :, None, :]
        output[:, :, t] = (state * q[:, :, t, :, None]).sum(-2)
    return output, state


def _chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    time = q.shape[2]
    chunk = max(1, min(CHUNK, time))
    count = -(-time // chunk)
    q, k, v, log_decay, beta = (_split(x, count, chunk) for x in (q, k, v, log_decay, beta))  # [B, HV, N, C, ...]

    # Sums of a chunk's log decays reach −1000, where fp32 keeps no more than four digits of their differences.
    total = log_decay.double().cumsum(-1)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # Masked before the exponential: a positive difference would overflow, and 0 · inf is NaN in the backward pass.
    between = (total[..., :, None] - total[..., None, :]).to(q.dtype).masked_fill(future, float("-inf")).exp()
    from_start = total.exp().to(q.dtype)[..., None]  # [B, HV, N, C, 1]
    to_end = (total[..., -1:] - total).to(q.dtype).exp()[..., None]

    weighted = k * beta[..., None]
    # solve_triangular(unitriangular=True) takes the diagonal as one, which is the identity of I + A.
    system = (weighted @ k.transpose(-1, -2) * between).tril(-1)
    sides = torch.cat([v * beta[..., None], weighted * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    free, carried = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # U = free − carried · S

    within = q @ k.transpose(-1, -2) * between
    from_state = q * from_start
    into_state = (k * to_end).transpose(-1, -2)
    chunk_decay = from_start[..., -1:, :]  # [B, HV, N, 1, 1]

    # unbind, not indexing: the gradient of N slices of one tensor would be N tensors of its full size.
    parts = zip(*(x.unbind(2) for x in (free, carried, within, from_state, into_state, chunk_decay)), strict=True)
    outputs = []
    for free_n, carried_n, within_n, from_state_n, into_state_n, decay_n in parts:
        delta = free_n - carried_n @ state
        outputs.append(from_state_n @ state + within_n @ delta)
        state = state * decay_n + into_state_n @ delta
    if not outputs:
        return v.flatten(2, 3), state
    output: Tensor = torch.cat(outputs, dim=2)
    return output[:, :, :time], state


def _split(x: Tensor, count: int, chunk: int) -> Tensor:
    """`[B, H, T, ...]` -> `[B, H, N, C, ...]`, padded at the end by zeros, which leave the state untouched."""
    missing = count * chunk - x.shape[2]
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2)
    return x.reshape(*x.shape[:2], count, chunk, *x.shape[3:])
