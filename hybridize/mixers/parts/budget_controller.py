"""The controller of the L1 weight that pulls the number of kept tokens towards the budget (arXiv 2510.20787)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hybridize.mixers.configs.token_eviction import TokenEvictionConfig


class BudgetController(nn.Module):
    """Watches how many tokens of a training sequence are kept and moves lambda, the weight of the L1 loss.

    K, the kept tokens, is an exponential mean over optimiser steps. Every `l1_every_steps` steps, with budget C:
    K >= high C: lambda grows; K <= low C: it shrinks; between: it holds. All of it is tensor arithmetic without a
    branch on the device's numbers. The buffers are the whole state between two steps and are saved with the mixer.

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
        self._observed: list[Tensor] = []
        self._sequence_tokens = 0

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
        self._observed.append(kept_share.detach().float())
        self._sequence_tokens = max(self._sequence_tokens, sequence_tokens)

    @torch.no_grad()
    def after_step(self, budget_tokens: int) -> None:
        """Ends an optimiser step: updates K, and lambda when it is due. Nothing happens if nothing was observed."""
        if not self._observed:
            return
        share = torch.stack(self._observed).mean(0)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(share)
            share = share / distributed.get_world_size()
        kept = share * self._sequence_tokens
        self._observed, sequence_tokens, self._sequence_tokens = [], self._sequence_tokens, 0

        config = self.config
        rate = min(1.0, 2 / (1 + config.l1_every_steps // 2))
        previous = torch.where(self.steps == 0, float(sequence_tokens), self.num_kept)
        self.num_kept.copy_(previous + rate * (kept - previous))
        self.steps.add_(1)

        first_change = (config.l1_initial_steps // config.l1_every_steps + 1) * config.l1_every_steps
        changed = self._changed(self.steps == first_change, budget_tokens)
        due = (self.steps % config.l1_every_steps == 0) & (self.steps >= first_change)
        self.l1_weight.copy_(torch.where(due, changed, self.l1_weight))

    def _changed(self, first: Tensor, budget_tokens: int) -> Tensor:
        config = self.config
        kept = self.num_kept if config.l1_sharing == "head" else self.num_kept.mean(0, keepdim=True)
        large = kept > config.l1_target_low * budget_tokens
        small = kept < config.l1_target_high * budget_tokens
        moved = torch.where(large & ~small, self.l1_weight * config.l1_increase, self.l1_weight)
        moved = torch.where(small & ~large, self.l1_weight / config.l1_decrease, moved)
        moved = torch.where(first, torch.where(large, config.l1_init, 0.0), moved).clamp(max=config.l1_max)
        moved = torch.where(moved < config.l1_min, 0.0, moved)
        return torch.where((moved == 0) & large, config.l1_min, moved)

    def metrics(self) -> dict[str, float]:
        """K over the key heads, and the mean lambda."""
        kept = self.num_kept.tolist()
        return {
            "kept_tokens_mean": sum(kept) / len(kept),
            "kept_tokens_min": min(kept),
            "kept_tokens_max": max(kept),
            "l1_weight": float(self.l1_weight.mean()),
        }
