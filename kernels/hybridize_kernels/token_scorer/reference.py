"""The token scorer as its equations read: one token after the other."""

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
    """See `hybridize_kernels.token_scorer`; the loop below is what the other forms must equal."""
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().tolist()
        logits = [
            token_scorer(
                document_k,
                document_v,
                weights,
                biases,
                output_weight,
                output_bias,
                None,
                dilation=dilation,
                dropout=dropout,
                compute_dtype=compute_dtype,
            )
            for document_k, document_v in zip(k.split(lengths, dim=1), v.split(lengths, dim=1), strict=True)
        ]
        return torch.cat(logits, dim=1)
    real = k.new_ones(k.shape[:2], dtype=torch.bool) if real is None else real
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    num_tokens = k.shape[1]
    x = torch.cat((k, v), dim=-1).to(dtype)
    x = torch.where(real[:, :, None, None], x, 0.0)
    for weight, bias in zip(weights, biases, strict=True):
        x = F.dropout(x, dropout)
        taps = weight.to(dtype).unflatten(1, (-1, x.shape[-1]))  # [H or 1, kernel, C, C']
        reach = dilation * (taps.shape[1] - 1) // 2
        outputs = [x.new_zeros(*x.shape[:1], 0, x.shape[2], bias.shape[-1])]
        for t in range(num_tokens):
            z = bias.to(dtype).expand(x.shape[0], x.shape[2], -1)
            for tap in range(taps.shape[1]):
                source = t - reach + tap * dilation
                if 0 <= source < num_tokens:
                    z = z + (x[:, source, :, None, :] @ taps[:, tap]).squeeze(-2)
            outputs.append(torch.where(real[:, t, None, None], F.silu(z), 0.0)[:, None])
        x = torch.cat(outputs, dim=1)
    return _project(x, output_weight, output_bias)


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
    """See `hybridize_kernels.token_scorer_step`; columns past a row's new tokens give zero here."""
    dtype = torch.float64 if history.dtype == torch.float64 else torch.float32
    num_rows, num_tokens, num_heads, _ = k.shape
    x = torch.cat((k, v), dim=-1).to(dtype)
    logits = x.new_zeros(num_rows, num_tokens, num_heads)
    for row in range(num_rows):
        for t in range(int(num_new[row])):
            token = x[row, t]  # [H, C]
            position = int(num_before[row]) + t
            start = 0
            for weight, bias in zip(weights, biases, strict=True):
                taps = weight.to(dtype).unflatten(1, (-1, token.shape[-1]))
                stored = dilation * (taps.shape[1] - 1)
                end = start + stored * token.shape[-1]
                ring = history[row, :, start:end].unflatten(1, (stored, token.shape[-1]))
                number = int(num_before[row]) + t
                z = bias.to(dtype) + (token[:, None] @ taps[:, -1]).squeeze(-2)
                for tap in range(taps.shape[1] - 1):
                    z = z + (ring[:, (number + tap * dilation) % stored, None].to(dtype) @ taps[:, tap]).squeeze(-2)
                if stored:
                    ring[:, number % stored] = token
                # The layer speaks of the token in the middle of its taps; before the text all is zero.
                position -= stored // 2
                token = F.silu(z) if position >= 0 else torch.zeros_like(z)
                start = end
            logits[row, t] = _project(token[None, None], output_weight, output_bias)[0, 0]
    return logits


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, T, H, C] by [H or 1, C, 1] and [H or 1, 1] -> [B, T, H]."""
    return (x * weight.to(x.dtype).squeeze(-1)).sum(-1) + bias.to(x.dtype).squeeze(-1)
