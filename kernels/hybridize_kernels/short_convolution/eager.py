"""A causal depthwise convolution in plain PyTorch: a sum of shifted products, the text compacted where it is padded.

This file imports nothing but torch: exported models carry it.
"""

import functools
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
    """Causal convolution over the real tokens of each row; padding between them is stepped over.

    x: `[B, T, H, D]`; taps: `[H · D, n]`, the newest token last; tail: `[B, n − 1, H · D]`, the tokens before, zeros
    unless given; real: `[B, T]` bool, or None where nothing is padding; activation: None or "silu"; cu_seqlens:
    `[N + 1]`, the bounds of documents of one row that do not see each other, without tails and padding. Returns the
    output `[B, T, H, D]` in x's dtype, 0 at padding, and, if asked for, the tail after the text.
    """
    batch, num_tokens, heads, head_size = x.shape
    num_taps = taps.shape[1]
    held = num_taps - 1
    text = x.flatten(2)  # [B, T, channels]
    before = text.new_zeros(batch, held, text.shape[2]) if tail is None else tail.to(x.dtype)
    order = None
    if real is None:
        text = torch.cat((before, text), dim=1)
    else:
        # Padding is moved to the front, before the tail, so that every real token follows the real one before it.
        known = torch.cat((real.new_ones(batch, held), real), dim=1)
        order = known.long().argsort(dim=1, stable=True)  # [B, n − 1 + T]
        row = torch.arange(batch, device=x.device)[:, None]
        text = torch.cat((before, torch.where(real[..., None], text, 0.0)), dim=1)[row, order]
    after = text[:, num_tokens:].contiguous() if output_tail else None
    if order is not None:
        text = F.pad(text, (0, 0, held, 0))
    # A sum of shifted products: on a CPU twice as fast as a convolution with a group a channel. It is fp32 at least.
    weights = taps.to(torch.promote_types(x.dtype, torch.float32))
    length = text.shape[1] - held
    shifted = [text[:, tap : tap + length] for tap in range(num_taps)]
    if cu_seqlens is not None:
        place = places_in_documents(cu_seqlens, x.device, num_tokens)[:, None]
        # Chosen, not multiplied: what another document holds may not be finite.
        shifted = [torch.where(place >= held - tap, part, 0.0) for tap, part in enumerate(shifted[:-1])] + shifted[-1:]
    y = functools.reduce(torch.add, (part * weights[:, tap] for tap, part in enumerate(shifted)))
    if activation == "silu":
        y = F.silu(y)
    if order is not None:
        y = y[row, order.argsort(dim=1)[:, held:]]
    return y.to(x.dtype).unflatten(2, (heads, head_size)), after


def short_convolutions(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    *,
    real: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`short_convolution` of each text `[B, T, H_i, D]` with its taps `[H_i · D, n]`, without tails."""
    return tuple(
        short_convolution(x, weight, real=real, activation=activation, cu_seqlens=cu_seqlens)[0]
        for x, weight in zip(xs, taps, strict=True)
    )


def places_in_documents(cu_seqlens: Tensor, device: torch.device, num_tokens: int) -> Tensor:
    """int32 `[T]`: how many tokens of its document come before each token. Nothing is asked of the device."""
    bounds = cu_seqlens.to(device, torch.int32)
    token = torch.arange(num_tokens, device=device, dtype=torch.int32)
    document = torch.searchsorted(bounds[1:-1], token, right=True)
    return token - bounds[document]


@torch.no_grad()
def short_convolution_step(
    xs: Sequence[Tensor],
    taps: Sequence[Tensor],
    tail: Tensor,
    real: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """The convolutions of several texts `[B, T, H_i, D]` that share one tail `[B, n − 1, Σ H_i · D]`, updated in place.

    taps: `[H_i · D, n]` each; real: `[B, T]` bool or None. Returns the outputs, each `[B, T, H_i, D]`; no gradient.
    """
    heads = [x.shape[2] for x in xs]
    y, after = short_convolution(
        torch.cat(tuple(xs), dim=2),
        torch.cat(tuple(taps)),
        tail=tail,
        real=real,
        activation=activation,
        output_tail=True,
    )
    assert after is not None
    tail.copy_(after)
    return tuple(part.to(x.dtype) for part, x in zip(y.split(heads, dim=2), xs, strict=True))
