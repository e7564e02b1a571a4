"""The token scorer in plain PyTorch: each convolution is a matrix product for all taps, then a sum over them.

Keys and values are two inputs of the first convolution, so that they are never copied side by side.
This file imports nothing but torch: exported models carry it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def token_scorer(
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    real: Tensor | None,
    *,
    dilation: int,
    dropout: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """One logit a token and head: dilated convolutions over time with SiLU, then a projection.

    k, v: `[B, T, H, D]`; weights `[H or 1, kernel · C, C']`, biases `[H or 1, C']`, output_weight `[H or 1, C, 1]`,
    output_bias `[H or 1, 1]`; real: `[B, T]` bool, False for padding, which is not between real tokens, or None;
    cu_seqlens: `[N + 1]`, the bounds of documents of one row that do not see each other.
    Returns `[B, T, H]` in fp32 (fp64 for fp64 keys). Source: https://arxiv.org/abs/2510.20787.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    compute_dtype = dtype if compute_dtype is None else compute_dtype
    num_tokens = k.shape[1]
    inputs = [k, v] if real is None else [torch.where(real[:, :, None, None], x, 0.0) for x in (k, v)]
    documents = None if cu_seqlens is None else documents_of_tokens(cu_seqlens, k.device, num_tokens)
    with torch.autocast(k.device.type, enabled=False):
        for weight, bias in zip(weights, biases, strict=True):
            taps = weight.to(compute_dtype).unflatten(1, (-1, sum(x.shape[-1] for x in inputs)))
            reach = dilation * (taps.shape[1] - 1) // 2
            z = bias.to(dtype)
            start = 0
            for x in inputs:
                x = F.dropout(x.to(compute_dtype), dropout)
                x = F.pad(x, (0, 0, 0, 0, reach, reach))
                # All taps' products at once, then each from its place in time.
                factors = taps[:, :, start : start + x.shape[-1]].transpose(1, 2)  # [H or 1, C, kernel, C']
                products = _multiply(x, factors.flatten(2)).unflatten(-1, factors.shape[2:])
                for tap in range(taps.shape[1]):
                    product = products[:, tap * dilation : tap * dilation + num_tokens, :, tap]
                    z = z + _of_same(documents, tap * dilation - reach, product).to(dtype)
                start += x.shape[-1]
            # Masked before SiLU (SiLU(0) = 0), a padded row equals one whose text starts at the edge.
            inputs = [F.silu(z if real is None else torch.where(real[:, :, None, None], z, 0.0))]
        # Never rounded to the type of the products: rounded logits would tie, and ties are decided by age.
        return (_multiply(inputs[0], output_weight.to(dtype)) + output_bias.to(dtype)).squeeze(-1)


def documents_of_tokens(cu_seqlens: Tensor, device: torch.device, num_tokens: int) -> tuple[Tensor, Tensor]:
    """int32 `[T]` each: where the document of a token begins, and where it ends. Nothing is asked of the device."""
    bounds = cu_seqlens.to(device, torch.int32)
    token = torch.arange(num_tokens, device=device, dtype=torch.int32)
    document = torch.searchsorted(bounds[1:-1], token, right=True)
    return bounds[document], bounds[document + 1]


def _of_same(documents: tuple[Tensor, Tensor] | None, distance: int, products: Tensor) -> Tensor:
    """The products `[B, T, ...]` with the token `distance` after each, 0 where that is of another document."""
    if documents is None or distance == 0:
        return products
    start, end = documents
    source = torch.arange(len(start), device=start.device) + distance
    same = ((source >= start) & (source < end)).view(-1, *(1,) * (products.ndim - 2))
    return torch.where(same, products, 0.0)


def token_scorer_step(
    k: Tensor,
    v: Tensor,
    history: Tensor,
    num_new: Tensor,
    num_before: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    output_weight: Tensor,
    output_bias: Tensor,
    *,
    dilation: int,
) -> Tensor:
    """The scores that further tokens complete: column t's logit is that of the token `margin` before it.

    k, v: `[B, T, H, D]`, of which the first num_new `[B]` columns of a row are tokens; num_before `[B]` tokens came
    before them. history `[B, H, width]` holds every convolution's last P = (kernel − 1) · dilation inputs, that of
    token n in slot n mod P; it is zero before the first token and written in place. Returns `[B, T, H]`, of meaning up
    to column num_new, without gradient.
    """
    dtype = torch.promote_types(history.dtype, torch.float32)
    num_tokens = k.shape[1]
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        position = num_before[:, None] + torch.arange(num_tokens, device=k.device)  # [B, T]
        x = torch.cat((k, v), dim=-1).to(dtype)
        start = 0
        for weight, bias in zip(weights, biases, strict=True):
            channels = x.shape[-1]
            taps = weight.to(dtype).unflatten(1, (-1, channels))
            stored = dilation * (taps.shape[1] - 1)
            ring = history[:, :, start : start + stored * channels].unflatten(2, (stored, channels))
            slots = torch.arange(stored, device=k.device)
            oldest_first = (num_before[:, None] + slots) % max(1, stored)
            past = ring.gather(2, _over(oldest_first, ring)).transpose(1, 2).to(dtype)
            text = torch.cat((past, x), dim=1)  # [B, stored + T, H, C]
            # Of the last `stored` inputs, the one whose number ends up in each slot.
            latest = num_new[:, None] + (slots - num_before[:, None] - num_new[:, None]) % max(1, stored)
            ring.copy_(text.transpose(1, 2).gather(2, _over(latest, ring)))
            z = bias.to(dtype)
            for tap in range(taps.shape[1]):
                z = z + _multiply(text[:, tap * dilation : tap * dilation + num_tokens], taps[:, tap])
            # The layer's output is that of the token in the middle of its taps; before the text there is none.
            position = position - stored // 2
            x = F.silu(torch.where((position >= 0)[:, :, None, None], z, 0.0))
            start += stored * channels
        return (_multiply(x, output_weight.to(dtype)) + output_bias.to(dtype)).squeeze(-1)


def _over(index: Tensor, ring: Tensor) -> Tensor:
    """[B, n] -> [B, H, n, C], for a gather along slots."""
    return index.long()[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3])


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, H, C] by weight [H or 1, C, C'] -> [B, T, H, C']."""
    if weight.shape[0] == 1:
        return x @ weight[0]
    return torch.einsum("bthc,hcd->bthd", x, weight)
