"""The controller of the L1 weight that pulls the number of kept tokens towards the budget (arXiv 2510.20787)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from hybridize.mixers.configs.token_eviction import TokenEvictionConfig

_LEAST_SHARE = 1e-6
"""Of the budget; keeps the logarithm of nothing finite."""
_LEAST_KEPT = 0.5
_MOST_LOGARITHMS = 2.0
"""How far kept tokens count as off the budget, at most."""
THRESHOLD_RATE = 0.05
"""By how much of the spread of a head's logits its threshold moves, for each natural logarithm it is off."""


class _Observation(NamedTuple):
    """Of a micro-batch: the share [H] of its scored tokens that is kept, how many of a text's are scored, and the
    standard deviation [H] of their logits, if that was taken."""

    kept_share: Tensor
    sequence_tokens: int | Tensor
    spread: Tensor | None = None


class BudgetController(nn.Module):
    """Watches how many tokens of a training sequence are kept, and with `budget_control: l1` moves lambda, the weight
    of the L1 loss.

    K, the kept tokens, is an exponential mean over optimiser steps. In each of them, with budget C and n =
    `l1_every_steps`, lambda moves by a factor that depends on how far K is outside of [low C, high C]:

        K > high C:  lambda *= increase^(min(log2(K / high C), 1) / n)
        K < low C:   lambda /= decrease^(min(log2(low C / K), 1) / n)

    The paper moves lambda every n steps by the whole factor, however small the error: near the budget, where K answers
    to a few per cent of lambda with twice as much or nothing, it swings between the two for ever. All of this is tensor
    arithmetic without a branch on the device's numbers. The buffers are the whole state between two steps and are saved
    with the mixer.

    With `budget_control: threshold` there is no loss. What a logit has to exceed follows the number of kept tokens, as
    the biases of experts follow their loads (arXiv 2408.15664), with steps in proportion: threshold += rate · spread ·
    log(K / C), K of the step alone. No head can be lost: one that keeps nothing is given a lower threshold.

    Args:
        config: the constants, by their recipe keys.
        num_heads: H, key heads.
    """

    num_kept: Tensor
    l1_weight: Tensor
    steps: Tensor
    threshold: Tensor | None
    """[H], what a logit has to exceed; None: zero."""

    def __init__(self, config: TokenEvictionConfig, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("num_kept", torch.empty(num_heads))
        self.register_buffer("l1_weight", torch.empty(num_heads if config.l1_sharing == "head" else 1))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.register_buffer("threshold", torch.empty(num_heads) if config.budget_control == "threshold" else None)
        self._observed: list[_Observation] = []

    def initialise(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self._observed = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the buffers but leaves them in float32: lambda starts at 1e-9 and is changed in small ratios."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def observe(self, kept_share: Tensor, sequence_tokens: int | Tensor, logit: Tensor | None = None) -> None:
        """Notes a micro-batch.

        Args:
            kept_share: [H] share of its tokens with a positive score.
            sequence_tokens: tokens of a sequence that are scored.
            logit: [B, T, H], of which a threshold needs the spread.
        """
        spread = None if self.threshold is None or logit is None else logit.detach().float().flatten(0, 1).std(0)
        self._observed.append(_Observation(kept_share.detach().float(), sequence_tokens, spread))

    def take_observations(self) -> list[_Observation]:
        """What was noted since the last step; nothing is noted then."""
        observed, self._observed = self._observed, []
        return observed

    def give_observations(self, observations: Iterable[_Observation]) -> None:
        """Notes them again."""
        self._observed += observations

    @torch.no_grad()
    def after_step(self, budget_tokens: int) -> None:
        """Ends an optimiser step: updates K, and lambda once it has begun, or the threshold. Nothing happens if nothing
        was observed."""
        if not self._observed:
            return
        kept, sequence_tokens, spread = _mean_of(self.take_observations())

        config = self.config
        rate = min(1.0, 2 / (1 + config.l1_every_steps // 2))
        previous = torch.where(self.steps == 0, sequence_tokens, self.num_kept)
        self.num_kept.copy_(previous + rate * (kept - previous))
        self.steps.add_(1)

        if self.threshold is not None and spread is not None:
            off = (kept.clamp(min=_LEAST_KEPT) / budget_tokens).log().clamp(-_MOST_LOGARITHMS, _MOST_LOGARITHMS)
            self.threshold.add_(THRESHOLD_RATE * spread * off)
            return
        if config.budget_control == "cap":
            return
        first_change = (config.l1_initial_steps // config.l1_every_steps + 1) * config.l1_every_steps
        changed = self._changed(self.steps == first_change, budget_tokens)
        self.l1_weight.copy_(torch.where(self.steps >= first_change, changed, self.l1_weight))

    def _changed(self, first: Tensor, budget_tokens: int) -> Tensor:
        config = self.config
        kept = self.num_kept if config.l1_sharing == "head" else self.num_kept.mean(0, keepdim=True)
        shares = (kept / budget_tokens).clamp(min=_LEAST_SHARE)
        # In octaves, at most one of the two above zero.
        excess = (shares / config.l1_target_high).log2().clamp(0, 1)
        lack = (config.l1_target_low / shares).log2().clamp(0, 1)
        exponent = math.log(config.l1_increase) * excess - math.log(config.l1_decrease) * lack
        large = shares > config.l1_target_low
        moved = self.l1_weight * (exponent / config.l1_every_steps).exp()
        moved = torch.where(first, torch.where(large, config.l1_init, 0.0), moved).clamp(max=config.l1_max)
        moved = torch.where(moved < config.l1_min, 0.0, moved)
        return torch.where((moved == 0) & large, config.l1_min, moved)

    def metrics(self) -> dict[str, Tensor]:
        """K over the key heads, and the mean lambda, each a scalar on the device."""
        return {
            "kept_tokens_mean": self.num_kept.mean(),
            "kept_tokens_min": self.num_kept.amin(),
            "kept_tokens_max": self.num_kept.amax(),
            "l1_weight": self.l1_weight.mean(),
        }


def _mean_of(observed: list[_Observation]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Kept tokens [H], scored tokens [] of a text and the spread [H] of logits, over micro-batches and processes."""
    shares, tokens, spreads = zip(*observed, strict=True)
    lengths = [n for n in tokens if isinstance(n, int)]
    if len(lengths) == len(tokens):
        length = shares[0].new_full((), float(max(lengths)))
        kept = torch.stack(shares).mean(0) * max(lengths)
    else:
        all_lengths = torch.stack([shares[0].new_full((), float(n)) if isinstance(n, int) else n for n in tokens])
        kept = (torch.stack(shares) * all_lengths[:, None]).mean(0)
        length = all_lengths.mean()
    known = [spread for spread in spreads if spread is not None]
    parts = [kept, length[None], *([torch.stack(known).mean(0)] if known else [])]
    if distributed.is_available() and distributed.is_initialized():
        # One reduction of one shape, whatever each process has seen.
        together = torch.cat(parts)
        distributed.all_reduce(together)
        parts = list((together / distributed.get_world_size()).split([len(part) for part in parts]))
    return parts[0], parts[1][0], parts[2] if known else None
