"""A causal depthwise convolution told token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def short_convolution(
    x: Tensor,
    taps: Tensor,
    *,
    tail: Tensor | None = None,
    real: Tensor | None = None,
    activation: str | None = None,
    output_tail: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `hybridize_kernels.short_convolution`; what the other forms must equal."""
    if cu_seqlens is not None:
        documents = x.split(cu_seqlens.diff().tolist(), dim=1)
        return torch.cat([short_convolution(part, taps, activation=activation)[0] for part in documents], dim=1), None
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, time, heads, head_size = x.shape
    held = taps.shape[1] - 1
    weights = taps.to(dtype)
    rows, tails = [], []
    for row in range(batch):
        before = x.new_zeros(held, heads * head_size) if tail is None else tail[row]
        text = [token.to(dtype) for token in before]
        outputs = []
        for t in range(time):
            if real is not None and not real[row, t]:
                outputs.append(torch.zeros_like(x[row, t], dtype=dtype))
                continue
            text.append(x[row, t].flatten().to(dtype))
            y = torch.zeros_like(text[-1])
            for back in range(held + 1):
                y = y + weights[:, held - back] * text[-1 - back]
            outputs.append((F.silu(y) if activation == "silu" else y).view(heads, head_size))
        rows.append(torch.stack(outputs) if outputs else torch.zeros_like(x[row], dtype=dtype))
        tails.append(torch.stack(text[len(text) - held :]))
    if not rows:
        rows, tails = [x[0:0]], [x.new_zeros(0, held, heads * head_size)]
        return rows[0], tails[0] if output_tail else None
    return torch.stack(rows).to(x.dtype), torch.stack(tails).to(x.dtype) if output_tail else None


def short_convolutions(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    *,
    real: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See `hybridize_kernels.short_convolutions`; what the other forms must equal."""
    return tuple(
        short_convolution(x, weight, real=real, activation=activation, cu_seqlens=cu_seqlens)[0]
        for x, weight in zip(xs, taps, strict=True)
    )


@torch.no_grad()
def short_convolution_step(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    tail: Tensor,
    real: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """See `hybridize_kernels.short_convolution_step`; what the other forms must equal."""
    outputs = []
    parts = tail.split([weight.shape[0] for weight in taps], dim=2)
    for x, weight, part in zip(xs, taps, parts, strict=True):
        y, after = short_convolution(x, weight, tail=part, real=real, activation=activation, output_tail=True)
        assert after is not None
        part.copy_(after)
        outputs.append(y)
    return tuple(outputs)
