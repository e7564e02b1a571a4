"""Training-free eviction by its definition: one query after the other, one key head at a time, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.evaluation.baselines.config import PolicyConfig
from hybridize.evaluation.baselines.policies import POOL_TOKENS, RECENT_QUERIES, fixed_worth


def reference(
    q: Tensor, k: Tensor, v: Tensor, unrotated: Tensor, config: PolicyConfig, scale: float, layer: int
) -> Tensor:
    """q [B, T, HQ, D], k, v, unrotated [B, T, H, D] -> [B, T, HQ, D]."""
    out = torch.empty_like(q)
    group = q.shape[2] // k.shape[2]
    fixed = fixed_worth(config.policy, unrotated, torch.arange(q.shape[1]), layer=layer, seed=config.seed)
    for row in range(q.shape[0]):
        for head in range(k.shape[2]):
            heads = slice(head * group, (head + 1) * group)
            out[row, :, heads] = _one_head(
                q[row, :, heads], k[row, :, head], v[row, :, head], fixed[row, :, head], config, scale
            )
    return out


def _one_head(q: Tensor, k: Tensor, v: Tensor, fixed: Tensor, config: PolicyConfig, scale: float) -> Tensor:
    """q [T, G, D], k, v [T, D], fixed [T]."""
    out = torch.empty_like(q)
    retained: list[int] = []
    competed = 0
    received = [0.0] * len(q)

    def probabilities(i: int) -> dict[int, Tensor]:
        """What query i gives to each token it sees, [G]."""
        seen = [j for j in range(i + 1) if i - j < config.window or j in retained]
        weights = torch.stack([scale * q[i] @ k[j] for j in seen], dim=-1).softmax(-1)  # [G, S]
        return {j: weights[:, n] for n, j in enumerate(seen)}

    for i in range(len(q)):
        if i % config.step == 0:
            leaving = min(i, i + config.step - config.window)
            if leaving > competed:
                candidates = retained + list(range(competed, leaving))
                worth = _worth(config, candidates, i, received, fixed, probabilities)
                ranked = sorted(
                    range(len(candidates)),
                    key=lambda n: (-float("inf") if candidates[n] < config.sink_tokens else -worth[n], candidates[n]),
                )
                retained = sorted(candidates[n] for n in ranked[: config.budget])
                competed = leaving
        given = probabilities(i)
        for j, share in given.items():
            received[j] += float(share.sum())
        out[i] = sum(share[:, None] * v[j] for j, share in given.items())
    return out


def _worth(config, candidates, now, received, fixed, probabilities) -> list[float]:  # type: ignore[no-untyped-def]
    if config.policy == "accumulated_attention":
        return [received[j] for j in candidates]
    if not config.dynamic:
        return [float(fixed[j]) for j in candidates]
    asked = range(max(0, now - (RECENT_QUERIES if config.policy == "recent_attention" else 1)), now)
    sums = [0.0] * len(candidates)
    for i in asked:
        given = probabilities(i)
        for n, j in enumerate(candidates):
            sums[n] += float(given[j].mean()) if j in given else 0.0
    if config.policy == "last_attention":
        return sums
    reach = POOL_TOKENS // 2
    return [max(s for j, s in zip(candidates, sums, strict=True) if abs(i - j) <= reach) for i in candidates]
