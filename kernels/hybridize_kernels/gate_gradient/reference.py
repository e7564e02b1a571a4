"""The gradient of a gate by the definition: the whole matrix of weights, then its far entries."""

import torch
from torch import Tensor


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
    on: str,
    largest: bool = False,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `hybridize_kernels.gate_gradient`; fp64 inputs are computed and returned in fp64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (batch, time, query_heads, size), heads = q.shape, k.shape[2]
    group = query_heads // heads
    scale = size**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(group, dim=2).to(dtype) for x in (k, v))
    log_sum_exp, delta = (x.to(dtype).transpose(1, 2)[..., None] for x in (log_sum_exp, delta))  # [B, HQ, T, 1]

    row = torch.arange(time, device=q.device)
    document = torch.zeros(batch, time, dtype=torch.int64, device=q.device)
    if positions is None:
        positions = row.expand(batch, -1)
    if cu_seqlens is not None:
        for bound in cu_seqlens[1:].tolist():
            document[:, bound:] += 1
        positions = torch.where(document < len(cu_seqlens) - 1, positions, -1)
    same = document[:, :, None] == document[:, None, :]
    far = same & (positions >= 0)[:, None] & (positions[:, :, None] - positions[:, None, :] >= window)
    far = far[:, None] & log_sum_exp.isfinite()  # [B, HQ, T, T]
    shown = row[:, None] < exit_row.transpose(1, 2)[:, :, None]
    shown = shown.repeat_interleave(group, dim=1)

    s = scale * torch.einsum("bthd,bshd->bhts", q.to(dtype), k) - log_sum_exp
    weight = torch.where(shown, s.exp(), s.sigmoid() if hidden else 0.0)
    moved = torch.einsum("bthd,bshd->bhts", output_gradient.to(dtype), v)
    if on == "logit":
        moved = moved - delta
    summands = torch.where(far, weight * moved, 0.0).unflatten(1, (heads, group))  # [B, H, G, T, T]
    result: Tensor = summands.abs().amax((2, 3)) if largest and time else summands.sum((2, 3))
    return result.transpose(1, 2)
