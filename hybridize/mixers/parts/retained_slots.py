"""Which tokens stay in the slots of a token-eviction state.

Entries are tensors [B, S, H, ...] by name: keys, values, float32 scores (0 until final), int32 positions (-1: empty).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridize.mixers.parts.slots import take

SLOTS = ("keys", "values", "scores", "positions")


def rank_entries(scores: Tensor, positions: Tensor, last: Tensor, *, window: int, sinks: int) -> Tensor:
    """Who stays, highest first: the window and sinks (+inf), kept tokens by score, everything else (-inf).

    Args:
        scores, positions: [B, S, H]. last: [B], newest position of each row. window, sinks: tokens.
    """
    stays = (positions > (last - window)[:, None, None]) | (positions < sinks)
    rank = torch.where(scores > 0, scores, -torch.inf)
    rank = torch.where(stays, torch.inf, rank)
    return torch.where(positions >= 0, rank, -torch.inf)


def lowest_ranked(rank: Tensor, positions: Tensor) -> Tensor:
    """[B, 1, H]: the entry that goes first; of equals the latest."""
    lowest = rank == rank.amin(1, keepdim=True)
    return torch.where(lowest, positions, -2).argmax(1, keepdim=True)


def best_ranked(entries: dict[str, Tensor], rank: Tensor, num_slots: int) -> dict[str, Tensor]:
    """The `num_slots` entries that rank first, of equals the earlier; empty slots where there are fewer."""
    by_position = entries["positions"].argsort(dim=1, stable=True)
    by_rank = take(rank, by_position).argsort(dim=1, descending=True, stable=True)[:, :num_slots]
    kept = take(by_position, by_rank)
    missing = num_slots - kept.shape[1]
    best = {name: take(entries[name].detach(), kept) for name in SLOTS}
    best["positions"] = torch.where(take(rank, kept) > -torch.inf, best["positions"], -1)
    padding = {name: (0, 0) * (tensor.ndim - 2) + (0, missing) for name, tensor in best.items()}
    return {name: F.pad(best[name], padding[name], value=-1 if name == "positions" else 0) for name in SLOTS}


def completed(scores: Tensor, positions: Tensor, fresh: Tensor, before: Tensor, last: Tensor, margin: int) -> Tensor:
    """Writes the scores that have become final: those of positions in (before - m, last - m].

    Args:
        scores, positions: [B, S, H] of the entries. fresh: [B, n, H], of which column n - 1 is position `last`.
        before, last: [B] last position before and after this call.
    """
    column = positions - last[:, None, None] + fresh.shape[1] - 1
    final = (positions > (before - margin)[:, None, None]) & (positions <= (last - margin)[:, None, None])
    final = final & (positions >= 0)
    return torch.where(final, take(fresh, column.clamp(0, fresh.shape[1] - 1).long()), scores)


def real_tokens_last(positions: Tensor) -> Tensor:
    """positions [B, T] -> [B, T]: the columns with padding first, else in the order they were."""
    return (positions >= 0).to(torch.uint8).argsort(dim=1, stable=True)
