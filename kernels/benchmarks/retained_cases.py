"""The cases of retained attention: their inputs, the op on them, and how many pairs they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridize_kernels import retained_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q `[B, T, HQ, D]`, k and v `[B, T, H, D]` -> `[B, T, HQ, D]`."""


@dataclass(frozen=True)
class Case:
    """Letters as everywhere; R: retained tokens a key head; capped: a budget of R over half of all tokens."""

    B: int
    T: int
    HQ: int
    H: int
    D: int
    W: int
    R: int
    capped: bool = False
    flex: bool = False

    def letters(self) -> dict[str, int | bool]:
        return {name: getattr(self, name) for name in ("B", "T", "HQ", "H", "D", "W", "R", "capped")}

    @property
    def budget(self) -> int | None:
        return self.R if self.capped else None


TINY = Case(2, 96, 4, 2, 16, 16, 8, flex=True)


def make_inputs(case: Case, device: str, *, gradient: bool = False) -> list[Tensor]:
    """q, k, v and score: R random tokens of each key head score above 0, or half of all where there is a cap."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(case.B, case.T, heads, case.D, device=device).to(dtype) for heads in (case.HQ, case.H, case.H)
    )
    value = torch.rand(case.B, case.T, case.H, device=device)
    kept = value > 0.5
    if not case.capped:
        kept = torch.zeros_like(kept).scatter_(1, value.argsort(1)[:, : case.R], True)
    score = torch.where(kept, value.clamp(min=1e-3), -1.0)
    return [x.requires_grad_(gradient) for x in (q, k, v, score)]


def visible_pairs(case: Case, score: Tensor, pattern: str) -> int:
    """(query, key, query head) triples that the pattern sees, exactly."""
    column = torch.arange(case.T, device=score.device)
    width = case.T if pattern == "dense" else case.W
    pairs = int((column + 1).clamp(max=width).sum()) * case.B * case.H
    if pattern == "retained":
        far = (score > 0).cumsum(1)[:, : max(0, case.T - case.W)]  # [B, T − W, H]: kept keys that have left the window
        pairs += int((far.clamp(max=case.R) if case.capped else far).sum())
    return pairs * (case.HQ // case.H)


def ours(score: Tensor, case: Case) -> Attention:
    return lambda q, k, v: retained_attention(q, k, v, score, window=case.W, budget=case.budget)
