"""The next token of every row, drawn by numbers that are given: the same numbers give the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridize.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_p: only the likeliest tokens that together have this probability are drawn (nucleus sampling, Holtzman et
            al. 2020, https://arxiv.org/abs/1904.09751); 1: all.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            hint = "Give a number above 0: without chance every text would be the same."
            raise UsageError(f"must be above 0, is {self.temperature}.", where="--temperature", hint=hint)
        if not 0 < self.top_p <= 1:
            raise UsageError(f"must be above 0 and at most 1, is {self.top_p}.", where="--top-p")


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draws by the inverse of the cumulative distribution.

    Args:
        logits: [B, vocabulary].
        uniform: [B] fp32, in [0, 1).

    Returns:
        [B] int64: the first token up to which, with it, the probabilities come to more than the number.
    """
    probability = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p == 1:
        upto = probability.cumsum(-1)
        return _first_above(upto, uniform * upto[:, -1])
    probability, tokens = probability.sort(dim=-1, descending=True, stable=True)
    upto = probability.cumsum(-1)
    last = ((upto - probability) < sampling.top_p).sum(-1, keepdim=True) - 1
    drawn = _first_above(upto, uniform * upto.gather(-1, last).squeeze(-1))
    return tokens.gather(-1, drawn[:, None].minimum(last)).squeeze(-1)


def _first_above(upto: Tensor, number: Tensor) -> Tensor:
    # Rounding may make the product as large as the whole sum.
    return (upto <= number[:, None]).sum(-1).clamp(max=upto.shape[-1] - 1)
