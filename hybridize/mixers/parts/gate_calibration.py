"""How a recurrent mixer finds the start that is nearest to what softmax attention does with a text.

Every head is fitted by itself to the head of the teacher, over a grid of half-lives and corrections; what is linear in
the rest has its least squares in closed form. Nothing of size T x T exists but for `_CHUNK_QUERIES` queries at once.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

CANDIDATES = tuple(product((1.0, 4.0, 16.0, 64.0, 256.0, 1024.0), (0.3, 0.9)))
"""Half-lives, in tokens, and betas that are tried. On SmolLM2-135M's layers 2, 10, 18 and 26 a finer grid with betas
down to 0.02 starts nearer (0.56, not 0.58), but from small betas 80 steps lead less far (0.262, not 0.254)."""
_CHUNK_QUERIES = 128
_RIDGE = 0.3
"""Of the gate's regression, as a share of the mean of the diagonal. With 16 sequences of 512 tokens the same layers
start at 0.555, 0.567 and 0.593 with 0.1, 1 and 10 (finer grid)."""
_SMALLEST_POWER = 1e-20
"""Keeps a head that is silent from dividing by zero."""


def softmax_heads(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, scale: float, window: int | None) -> Tensor:
    """What causal softmax attention makes of each head.

    Args:
        q: [B, T, HQ, D]. k, v: [B, T, H, D]; H divides HQ. q and k after RoPE.
        positions: [B, T] place of each token in its document; documents lie end to end.
        scale: factor on q·k.
        window: how many tokens a query sees, itself included; None: all before it.

    Returns:
        [B, T, HQ, D] in v's dtype.
    """
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    token = torch.arange(q.shape[1], device=q.device)
    first = token - positions  # [B, T], where the query's document begins
    if window is not None:
        first = torch.maximum(first, token - window + 1)
    parts = []
    for start in range(0, q.shape[1], _CHUNK_QUERIES):
        query = token[start : start + _CHUNK_QUERIES]
        seen = (token <= query[:, None]) & (token >= first[:, query, None])  # [B, chunk, T]
        scores = torch.einsum("bthd,bshd->bhts", q[:, query], keys).float() * scale
        shares = scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
        parts.append(torch.einsum("bhts,bshd->bthd", shares.to(values.dtype), values))
    return torch.cat(parts, dim=1)


class ChannelFit:
    """Least squares of y ≈ s · x, with an s [HQ, D] for each channel, over as many tokens as are added."""

    def __init__(self) -> None:
        self._xx, self._xy, self._yy = (torch.zeros(()) for _ in range(3))

    def add(self, x: Tensor, y: Tensor) -> None:
        """x, y: [B, T, HQ, D]."""
        x, y = x.float(), y.float()
        self._xx, self._xy, self._yy = (
            (a * b).sum((0, 1)).double() + before.to(a.device)
            for a, b, before in ((x, x, self._xx), (x, y, self._xy), (y, y, self._yy))
        )

    def scale(self) -> Tensor:
        """s, [HQ, D] fp64."""
        return self._xy / self._xx.clamp_min(_SMALLEST_POWER)

    def error(self) -> Tensor:
        """||y − s x||² of each head, [HQ] fp64."""
        return (self._yy - self.scale() * self._xy).sum(-1)


class GateFit:
    """Ridge regression of y ≈ (1 + w·h / 2) · x with one w [hidden_size] for each head.

    1 + z / 2 is 2·sigmoid(z) near its start: what is found is the weight of a gate of that form.
    """

    def __init__(self) -> None:
        self._hidden: list[Tensor] = []
        self._power: list[Tensor] = []
        self._slope: list[Tensor] = []

    def add(self, hidden: Tensor, x: Tensor, y: Tensor) -> None:
        """hidden: [B, T, hidden_size]. x, y: [B, T, HQ, D]."""
        x, y = x.float(), y.float()
        self._hidden.append(hidden.flatten(0, 1))
        self._power.append(x.square().sum(-1).flatten(0, 1) / 4)
        self._slope.append((x * (y - x)).sum(-1).flatten(0, 1) / 2)

    def weight(self) -> Tensor:
        """w, [HQ, hidden_size] fp32."""
        hidden = torch.cat(self._hidden).float()
        powers, slopes = torch.cat(self._power), torch.cat(self._slope)
        # Autocast would round the normal equations to bfloat16, and they might not be positive definite any more.
        with torch.autocast(hidden.device.type, enabled=False):
            rows = [_ridge(hidden, *of_head) for of_head in zip(powers.T, slopes.T, strict=True)]
        return torch.stack(rows)


def _ridge(hidden: Tensor, power: Tensor, slope: Tensor) -> Tensor:
    """The minimum [hidden_size] of sum_n power_n (w·h_n)² / 2 − slope_n (w·h_n), and the ridge."""
    normal = (hidden * power[:, None]).T @ hidden
    diagonal = normal.diagonal()
    diagonal += _RIDGE * diagonal.mean() + _SMALLEST_POWER
    return torch.cholesky_solve((hidden.T @ slope)[:, None], torch.linalg.cholesky(normal))[:, 0]
