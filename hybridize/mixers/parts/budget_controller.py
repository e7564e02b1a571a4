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


class _Observation(NamedTuple):
    """Of a micro-batch: the share [H] of its scored tokens that is kept, and how many of a text's are scored."""

    kept_share: Tensor
    sequence_tokens: int | Tensor


class BudgetController(nn.Module):
    """Watches how many tokens of a training sequence are kept and moves lambda, the weight of the L1 loss.

    K, the kept tokens, is an exponential mean over optimiser steps. In each of them, with budget C and n =
    `l1_every_steps`, lambda moves by a factor that depends on how far K is outside of [low C, high C]:

        K > high C:  lambda *= increase^(min(log2(K / high C), 1) / n)
        K < low C:   lambda /= decrease^(min(log2(low C / K), 1) / n)

    The paper moves lambda every n steps by the whole factor, however small the error: near the budget, where K answers
    to a few per cent of lambda with twice as much or nothing, it swings between the two for ever. All of this is tensor
    arithmetic without a branch on the device's numbers. The buffers are the whole state between two steps and are saved
    with the mixer.

    Args:
        config: the constants, by their recipe keys.
        num_heads: H, key heads.
    """

    num_kept: Tensor
    l1_weight: Tensor
    steps: Tensor

    def __init__(self, config: TokenEvictionConfig, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("num_kept", torch.empty(num_heads))
        self.register_buffer("l1_weight", torch.empty(num_heads if config.l1_sharing == "head" else 1))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
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

    def observe(self, kept_share: Tensor, sequence_tokens: int) -> None:
        """Notes a micro-batch.

        Args:
            kept_share: [H] share of its tokens with a positive score.
            sequence_tokens: tokens of a sequence that are scored.
        """
        self._observed.append(_Observation(kept_share.detach().float(), sequence_tokens))

    @torch.no_grad()
    def observe_documents(self, kept: Tensor, lengths: Tensor) -> None:
        """Notes a micro-batch of packed documents.

        What counts is a document that outgrows its cache: the mean is over those longer than window and budget, or,
        where there is none, over all.

        Args:
            kept: [N, H] how many tokens of each document have a positive score. lengths: [N] its tokens.
        """
        config = self.config
        long = lengths > config.window_tokens + config.budget_tokens
        counts = torch.where(long.any(), long, lengths > 0).float()  # [N]; empty ones only fill up the bounds
        number = counts.sum()
        scored = ((lengths - config.margin_tokens).clamp(min=0) * counts).sum() / number
        kept_tokens = (kept * counts[:, None]).sum(0) / number
        self._observed.append(_Observation(kept_tokens / scored.clamp(min=1.0), scored))

    def take_observations(self) -> list[_Observation]:
        """What was noted since the last step; nothing is noted then."""
        observed, self._observed = self._observed, []
        return observed

    def give_observations(self, observations: Iterable[_Observation]) -> None:
        """Notes them again."""
        self._observed += observations

    @torch.no_grad()
    def after_step(self, budget_tokens: int) -> None:
        """Ends an optimiser step: updates K, and lambda once it has begun. Nothing happens if nothing was observed."""
        if not self._observed:
            return
        kept, sequence_tokens = _mean_of(self._observed)
        self._observed = []

        config = self.config
        rate = min(1.0, 2 / (1 + config.l1_every_steps // 2))
        previous = torch.where(self.steps == 0, sequence_tokens, self.num_kept)
        self.num_kept.copy_(previous + rate * (kept - previous))
        self.steps.add_(1)

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


def _mean_of(observed: list[_Observation]) -> tuple[Tensor, Tensor]:
    """Kept tokens [H] and scored tokens [] of a text, over micro-batches and processes."""
    shares, tokens = zip(*observed, strict=True)
    lengths = [n for n in tokens if isinstance(n, int)]
    if len(lengths) == len(tokens):
        length = shares[0].new_full((), float(max(lengths)))
        kept = torch.stack(shares).mean(0) * max(lengths)
    else:
        all_lengths = torch.stack([shares[0].new_full((), float(n)) if isinstance(n, int) else n for n in tokens])
        kept = (torch.stack(shares) * all_lengths[:, None]).mean(0)
        length = all_lengths.mean()
    if distributed.is_available() and distributed.is_initialized():
        # One reduction of one shape, whatever each process has seen.
        both = torch.cat((kept, length[None]))
        distributed.all_reduce(both)
        both = both / distributed.get_world_size()
        kept, length = both[:-1], both[-1]
    return kept, length
