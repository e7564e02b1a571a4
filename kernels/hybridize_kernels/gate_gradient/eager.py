"""The gradient of a gate in plain PyTorch: a chunk of queries at a time against all earlier keys."""

import torch
from torch import Tensor

QUERY_CHUNK = 128


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
    on: str,
    largest: bool = False,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `hybridize_kernels.gate_gradient`."""
    (batch, time, _, size), heads = q.shape, k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = size**-0.5 if scale is None else scale
    positions, first = _places(batch, time, positions, cu_seqlens, q.device)
    keys, values = (x.to(dtype).permute(0, 2, 3, 1) for x in (k, v))  # [B, H, D, T]
    result = torch.zeros(batch, heads, time, dtype=dtype, device=q.device)

    def rows_of(x: Tensor, start: int, stop: int) -> Tensor:
        """`[B, T, HQ, ...]` -> `[B, H, G, t, ...]`."""
        rows = x[:, start:stop].to(dtype)
        return rows.reshape(*rows.shape[:2], heads, -1, *rows.shape[3:]).movedim(1, 3)

    # A token's position is at most its column, so queries of the first `window` columns are near to everything.
    for start in range(min(window, time), time, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, time)
        num_far = stop - window  # columns that some query of the chunk may be far from
        column = torch.arange(stop, device=q.device)
        key_position = positions[:, None, :num_far]
        far = (key_position >= 0) & (positions[:, start:stop, None] - key_position >= window)
        far = far & (column[:num_far] >= first[:, start:stop, None])  # [B, t, S]
        shown = column[start:, None] < exit_row[:, :num_far].transpose(1, 2)[:, :, None]  # [B, H, t, S]
        log_sum = rows_of(log_sum_exp, start, stop)[..., None]
        # A float product, whatever the caller's autocast.
        with torch.autocast(q.device.type, enabled=False):
            s = scale * rows_of(q, start, stop).flatten(2, 3) @ keys[..., :num_far]
            moved = rows_of(output_gradient, start, stop).flatten(2, 3) @ values[..., :num_far]
        s, moved = (x.unflatten(2, (-1, stop - start)) for x in (s, moved))  # [B, H, G, t, S]
        s = s - log_sum
        weight = torch.where(shown[:, :, None], s.exp(), s.sigmoid() if hidden else 0.0)
        if on == "logit":
            moved = moved - rows_of(delta, start, stop)[..., None]
        counts = far[:, None, None] & log_sum.isfinite()
        summands = torch.where(counts, weight * moved, 0.0)
        seen = result[..., :num_far]
        seen.copy_(torch.maximum(seen, summands.abs().amax((2, 3))) if largest else seen + summands.sum((2, 3)))
    return result.transpose(1, 2)


def _places(
    batch: int, time: int, positions: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A number that counts the tokens of each text, −1 of padding, and the text's first column; both `[B, T]`."""
    column = torch.arange(time, device=device).expand(batch, -1)
    if cu_seqlens is None:
        return column if positions is None else positions, torch.zeros_like(column)
    bounds = cu_seqlens.long()
    document = torch.searchsorted(bounds, column.contiguous(), right=True) - 1
    return torch.where(column < bounds[-1], column, -1), bounds[document.clamp(max=len(bounds) - 1)]
