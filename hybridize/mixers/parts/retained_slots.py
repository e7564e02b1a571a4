"""Which tokens stay in the retained slots of a token-eviction state when many tokens come at once.

Entries are tensors [B, S, H, ...] by name, in order of position: keys, values, float32 scores, positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.mixers.parts.slots import take


def completed(scores: Tensor, positions: Tensor, fresh: Tensor, first: Tensor, num_fresh: Tensor) -> Tensor:
    """Writes the scores that have become final.

    Args:
        scores, positions: [B, S, H] of the entries. fresh: [B, n, H], of which column t is position first + t.
        first, num_fresh: [B]; of a row's columns the first `num_fresh` count.
    """
    column = positions - first[:, None, None]
    final = (positions >= 0) & (column >= 0) & (column < num_fresh[:, None, None])
    return torch.where(final, take(fresh, column.clamp(0, fresh.shape[1] - 1)), scores)


def fill_retained(
    state: dict[str, Tensor], entries: dict[str, Tensor], last: Tensor, *, window: int, sinks: int
) -> None:
    """Writes the best of what has left the window: sinks first, then by score, of equals the earlier.

    Args:
        state: keys, values [B, H, W + C, D], scores [B, H, W + C], retained_positions [B, H, C], num_retained [B, H].
        entries: keys, values, scores, positions. last: [B], newest position of each row. window, sinks: tokens.
    """
    positions, scores = entries["positions"], entries["scores"]
    sink = positions < sinks
    kept = (positions >= 0) & (positions <= (last - window)[:, None, None]) & (sink | (scores > 0))
    rank = torch.where(sink, torch.inf, scores).masked_fill(~kept, -torch.inf)
    best = rank.argsort(dim=1, descending=True, stable=True)[:, : state["retained_positions"].shape[2]]
    kept = kept.gather(1, best).transpose(1, 2)  # [B, H, n]
    slots = slice(window, window + best.shape[1])
    for name in ("keys", "values", "scores"):
        state[name][:, :, slots] = take(entries[name], best).transpose(1, 2)
    state["retained_positions"].fill_(-1)
    chosen = positions.gather(1, best).transpose(1, 2)
    state["retained_positions"][:, :, : best.shape[1]] = torch.where(kept, chosen, -1).to(torch.int32)
    state["num_retained"].copy_(kept.sum(-1))
