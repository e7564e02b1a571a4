"""The gated delta rule in plain PyTorch: chunked for training and prefill, recurrent for a few tokens.

Inside a chunk with inclusive decay sums g and entering state S, the corrections u_t = b_t (v_t − a_t S_{t−1}ᵀ k_t)
solve one unit lower triangular system, (I + A) U = diag(b) V − diag(b e^g) K S with A_ij = b_i e^(g_i − g_j) k_i·k_j
for j < i. Everything but the walk of S over the chunks is done for all chunks at once.
Decoding steps are in place, and wait for no device. This file imports nothing but torch: exported models carry it.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

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
    cu_seqlens: Tensor | None = None,
    store_states: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """o_t = scale · S_tᵀ q_t with S_t = a_t (I − b_t k_t k_tᵀ) S_{t−1} + b_t k_t v_tᵀ and a_t = exp(log_decay_t).

    q `[B, T, HQ, K]`, k `[B, T, H, K]`, v `[B, T, HV, V]`, log_decay and beta `[B, T, HS]`, state `[B, HS, K, V]`;
    each of HQ, H, HV divides HS. cu_seqlens `[N + 1]`: N sequences are packed into the one row, and states are
    `[N, HS, K, V]`. store_states concerns kernels only. Returns the output `[B, T, HS, V]` in v's dtype and, if asked
    for, the final state in fp32 (fp64 for fp64 inputs).
    Source: https://arxiv.org/abs/2412.06464 (chunked form: https://arxiv.org/abs/2406.06484, section 3).
    """
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        parts = [
            gated_delta_rule(
                *(x[:, begin:end] for x in (q, k, v, log_decay, beta)),
                scale=scale,
                initial_state=None if initial_state is None else initial_state[n : n + 1],
                output_final_state=output_final_state,
                normalize_qk=normalize_qk,
            )
            for n, (begin, end) in enumerate(pairwise(ends))
        ]
        states = [state for _, state in parts if state is not None]
        rest = v.new_zeros(1, q.shape[1] - ends[-1], log_decay.shape[2], v.shape[3])
        return torch.cat([*(output for output, _ in parts), rest], dim=1), torch.cat(states) if states else None
    key_size, value_size, heads = q.shape[-1], v.shape[-1], log_decay.shape[2]
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
        # State head n reads query head n // (HS / HQ), and so on.
        q, k, v = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v))
        if initial_state is None:
            state = q.new_zeros(q.shape[0], heads, key_size, value_size)
        else:
            state = initial_state.to(dtype)
        tracked = any(x.requires_grad for x in (q, k, v, log_decay, beta, state))
        if q.shape[2] <= RECURRENT_TOKENS and not (torch.is_grad_enabled() and tracked):
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
    """Takes T tokens into the states `[S, HS, K, V]`, in place, and returns `[B, T, HS, V]` in v's dtype.

    q: `[B, T, HQ, K]`; k: `[B, T, H, K]`; v: `[B, T, HV, V]`; log_decay, beta: `[B, T, HS]`, raw where decay_rate and
    decay_bias `[HS]`, or beta_ceiling, are given; slots: `[B]`, −1 for a row that is left out; real: `[B, T]`, False
    for padding; output_scale: `[HS, V]`; gate: `[B, T, HS, V]`; rotary: cos and sin `[B or 1, T, R]`, given where q
    and k are those before RoPE.
    """
    if rotary is not None:
        q, k = (_rotated(x, *(table.unsqueeze(2) for table in rotary)) for x in (q, k))
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, time, _, key_size = k.shape
    heads, value_size = state.shape[1], state.shape[3]
    if batch * time == 0:
        return v.new_zeros(batch, time, heads, value_size)
    scale = key_size**-0.5 if scale is None else scale
    there = q.new_ones(batch, time, dtype=torch.bool) if real is None else real.bool()
    if slots is not None:
        there = there & (slots >= 0)[:, None]
    there = there[..., None]  # [B, T, 1]

    # Under autocast the matrix products would fall back to half precision.
    with torch.autocast(q.device.type, enabled=False):
        log_a, b = log_decay.to(dtype), beta.to(dtype)
        if decay_rate is not None and decay_bias is not None:
            log_a = -decay_rate.to(dtype).exp() * F.softplus(log_a + decay_bias.to(dtype))
        if beta_ceiling is not None:
            b = beta_ceiling * torch.sigmoid(b)
        a, b = log_a.exp().masked_fill(~there, 1.0), b.masked_fill(~there, 0.0)
        # Padding may hold anything, and 0 · NaN is NaN.
        q, k, v_ = (x.to(dtype).masked_fill(~there[..., None], 0.0) for x in (q, k, v))
        if normalize_qk:
            q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)
            k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
        q, k, v_ = (x.repeat_interleave(heads // x.shape[2], dim=2) if x.shape[2] < heads else x for x in (q, k, v_))

        own = state[:batch] if slots is None else state[slots.clamp(min=0)]
        S = own.to(dtype)  # [B, HS, K, V]; of this type already and without slots, the state itself
        out = v_.new_empty(batch, time, heads, value_size)
        both = torch.stack((k, q), dim=3)  # [B, T, HS, 2, K]
        for t in range(time):
            # What the state holds under the key, and what the query sees of it, in one pass; u adds (k·q) u to that.
            held, seen = (a[:, t, :, None, None] * (both[:, t] @ S)).unbind(2)
            u = b[:, t, :, None] * (v_[:, t] - held)
            S.mul_(a[:, t, :, None, None]).addcmul_(k[:, t, :, :, None], u[:, :, None, :])
            out[:, t] = scale * (seen + (k[:, t] * q[:, t]).sum(-1, keepdim=True) * u)

        if slots is not None:
            _put_back(state, slots, S)
        elif S.data_ptr() != own.data_ptr():
            own.copy_(S)
        if norm_epsilon is not None:
            out = F.rms_norm(out, (value_size,), eps=norm_epsilon)
        if output_scale is not None:
            out = out * output_scale.to(dtype)
        if gate is not None:
            out = out * (2.0 * torch.sigmoid(gate.to(dtype)))
    return out.masked_fill(~there[..., None], 0.0).to(v.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the op `rotary`, bit for bit: a pair's two numbers lie R/2 apart, what follows the first R passes through."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    y = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return torch.cat((y, rest), dim=-1)


def _put_back(state: Tensor, slots: Tensor, new: Tensor) -> None:
    """Row b of new to state[slots[b]] where there is one.

    Nothing here asks the device which rows those are: a row without a slot writes what the first row with one does. If
    there is none, all rows were read from state[0], and write it as it was.
    """
    rows, valid = torch.arange(len(slots), device=slots.device), slots >= 0
    source = torch.where(valid, rows, valid.int().argmax())
    state[slots.clamp(min=0)[source]] = new[source].to(state.dtype)
