"""The next token of every row, drawn by numbers that are given: the same numbers give the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: the logits are divided by it; 0: always the likeliest token.
        top_p: only the likeliest tokens that together have this probability are drawn (nucleus sampling, Holtzman et
            al. 2020, https://arxiv.org/abs/1904.09751); 1: all.
        top_k: only so many of the likeliest tokens are drawn; 0: all. top_p is then of what they have.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"must be 0 or above, is {self.temperature}.", where="--temperature")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"must be above 0 and at most 1, is {self.top_p}.", where="--top-p")
        if self.top_k < 0:
            raise UsageError(f"must be 0 or above, is {self.top_k}.", where="--top-k")


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draws by the inverse of the cumulative distribution; of equally likely tokens at temperature 0, the first.

    Args:
        logits: [B, vocabulary].
        uniform: [B] fp32, in [0, 1).

    Returns:
        [B] int64: the first token up to which, with it, the probabilities come to more than the number.
    """
    if sampling.temperature == 0:
        return _likeliest(logits)
    logits = logits.float()
    scaled = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        upto = scaled.softmax(-1).cumsum(-1)
        return _first_above(upto, uniform * upto[:, -1])
    scaled, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        scaled, tokens = scaled[:, : sampling.top_k], tokens[:, : sampling.top_k]
    probability = scaled.softmax(-1)
    upto = probability.cumsum(-1)
    # The first token of the nucleus is drawn from even where it alone has more than top_p.
    last = ((upto - probability) < sampling.top_p).sum(-1, keepdim=True).clamp(min=1) - 1
    drawn = _first_above(upto, uniform * upto.gather(-1, last).squeeze(-1))
    return tokens.gather(-1, torch.minimum(drawn[:, None], last)).squeeze(-1)


def _likeliest(logits: Tensor) -> Tensor:
    """The first of the largest logits, in two steps where a row divides: many processors share a row."""
    parts = next((count for count in (64, 32, 16) if logits.shape[-1] % count == 0), 1)
    of_part, place = logits.reshape(len(logits), parts, -1).max(-1)
    part = of_part.argmax(-1, keepdim=True)
    found: Tensor = part * (logits.shape[-1] // parts) + place.gather(-1, part)
    return found.squeeze(-1)


def _first_above(upto: Tensor, number: Tensor) -> Tensor:
    # Rounding may make the product as large as the whole sum.
    return (upto <= number[:, None]).sum(-1).clamp(max=upto.shape[-1] - 1)
