"""Retention as a soft gate: every token stays, weaker the less it is worth, until training has made the choice hard.

A gate g_j in (0, 1) multiplies the weight that a query gives to key j once it has left the window, as log g_j on the
logit; the window itself is untouched. With the gates of a binary concrete distribution whose temperature falls, this
is how dynamic memory sparsification trains its eviction (arXiv 2506.05345, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hybridize_kernels import retained_attention

_PADDED_TO = 8
"""Features of a head, with the gate's, are made a multiple of it for the matrix units."""


def concrete_log_gates(logit: Tensor, temperature: float) -> Tensor:
    """log of binary concrete samples, log sigmoid((x + l) / temperature) with logistic noise l; of any shape."""
    uniform = torch.rand_like(logit).clamp(1e-6, 1.0 - 1e-6)
    return functional.logsigmoid((logit + uniform.logit()) / temperature)


def soft_budget_loss(logit: Tensor, budget: int) -> Tensor:
    """By how much the expected share of retained tokens exceeds the budget's, the mean over heads; a scalar.

    logit: [B, T, H]; a token is retained with probability sigmoid(x). budget: tokens of a text.
    """
    share = torch.sigmoid(logit.float()).mean((0, 1))
    return functional.relu(share - min(budget / logit.shape[1], 1.0)).mean()


def softly_retained_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, window: int, sinks: int, scale: float
) -> Tensor:
    """Causal attention in which keys beyond the window count g_j times; at g = 1 it is full attention.

    Window and past are attended to apart and joined by their log-sum-exps: the past is causal attention of the queries
    from `window` on over the keys that far before them, with log g as one more product of query and key.

    Args:
        q: [B, T, HQ, D]. k, v: [B, T, H, D], RoPE applied. Rows are texts without padding.
        log_gate: [B, T, H], at most 0; those of the first `sinks` tokens do not count, they are 0.
        window: tokens, the query itself included. scale: factor on q·k.

    Returns:
        [B, T, HQ, D].
    """
    num_tokens, head_size = q.shape[1], q.shape[3]
    near, near_lse = retained_attention(q, k, v, window=window, scale=scale, return_log_sum_exp=True)
    num_far = num_tokens - window
    if num_far <= 0:
        return near
    bias = torch.where(torch.arange(num_far, device=k.device)[:, None] < sinks, 0.0, log_gate[:, :num_far])
    width = -(-(head_size + 1) // _PADDED_TO) * _PADDED_TO
    ones = torch.ones_like(q[:, window:, :, :1])
    far, far_lse = retained_attention(
        functional.pad(torch.cat((q[:, window:], ones), dim=-1), (0, width - head_size - 1)),
        functional.pad(
            torch.cat((k[:, :num_far], (bias / scale).to(k.dtype)[..., None]), dim=-1), (0, width - head_size - 1)
        ),
        functional.pad(v[:, :num_far], (0, width - head_size)),
        window=num_far,
        scale=scale,
        return_log_sum_exp=True,
    )
    share = torch.sigmoid(far_lse - near_lse[:, window:])[..., None]
    joined = near[:, window:] + share * (far[..., :head_size].float() - near[:, window:].float())
    return torch.cat((near[:, :window], joined.to(near.dtype)), dim=1)
