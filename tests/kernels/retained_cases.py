"""Calls of retained attention in every layout, and how its kernels are compared with the reference on them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

import pytest
import torch
from torch import Tensor

from hybridize_kernels import retained_attention
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, outputs_and_gradients

PACKAGE = "hybridize_kernels.retained_attention"
plan = import_module(f"{PACKAGE}.plan")
attention = import_module(f"{PACKAGE}.attention")
eviction = import_module(f"{PACKAGE}.eviction")
lists = import_module(f"{PACKAGE}.lists")
tiles = import_module(f"{PACKAGE}.tiles")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_TILES = "forward=32,16,4,1;query=16,16,4,1;key=16,16,4,1"


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, chunks and scans so short that a few dozen tokens fill many of them."""
    monkeypatch.setenv(tiles.VARIABLE, SMALL_TILES)
    monkeypatch.setattr(plan, "CHUNK", 16)
    monkeypatch.setattr(lists, "SCAN", 32)
    monkeypatch.setattr(lists, "ALONE", 64)
    for name, value in (("LENGTH", 16), ("SCAN", 16), ("CANDIDATES", 16)):
        monkeypatch.setattr(eviction, name, value)
    monkeypatch.setattr(attention, "plan_of", lru_cache(plan.Plan))  # no plan of other chunks and scans


@dataclass(frozen=True)
class Case:
    """One call. positive: share of the scores above zero; layout: what `arguments` makes of it."""

    time: int
    heads: int = 2
    group: int = 2
    size: int = 16
    window: int = 7
    sinks: int = 2
    budget: int | None = None
    layout: str = "plain"
    positive: float = 0.4
    prefix: int = 0
    batch: int = 2
    dtype: torch.dtype = torch.float32
    scored: bool = True

    def arguments(self) -> tuple[list[Tensor], dict[str, object]]:
        batch = 1 if self.layout == "documents" else self.batch
        keys = self.time + (self.prefix + self.window if self.layout.startswith("continued") else 0)
        shape = (batch, keys, self.heads)
        q = torch.randn(batch, self.time, self.heads * self.group, self.size)
        k, v = torch.randn(*shape, self.size), torch.randn(*shape, self.size)
        score = torch.rand(shape) - 1 + self.positive
        inputs = [x.to(DEVICE, self.dtype) for x in (q, k, v)] + [score.to(DEVICE)] * self.scored
        return inputs, {
            "window": self.window,
            "sinks": self.sinks,
            "budget": self.budget,
            **self.order(keys, batch),
        }

    def order(self, keys: int, batch: int) -> dict[str, object]:
        if self.layout == "padded":
            # The first row is padded at its left, the second anywhere, a third would be all padding.
            positions = torch.full((max(batch, 3), self.time), -1)
            positions[0] = (torch.arange(self.time) - self.time // 3).clamp(min=-1)
            real = torch.rand(self.time) > 0.4
            positions[1, real] = torch.arange(int(real.sum()))
            positions = positions[-batch:].contiguous().to(DEVICE)
            return {"query_positions": positions, "key_positions": positions}
        if self.layout == "documents":
            cuts = sorted(torch.randint(0, self.time + 1, (3,)).tolist())
            return {"cu_seqlens": torch.tensor([0, *cuts, self.time], dtype=torch.int32, device=DEVICE)}
        if self.layout.startswith("continued"):
            # Slots of an earlier cache, some of them empty, then the window's tokens, then new ones.
            seen = 3 * self.window + 2 * self.prefix
            positions = torch.full((batch, keys, self.heads), -1)
            for row in range(batch):
                for head in range(self.heads):
                    held = int(torch.randint(0, self.prefix + 1, ()))
                    slots = torch.randperm(seen - self.window + 1)[:held].sort().values
                    positions[row, self.prefix - held : self.prefix, head] = slots
            positions[:, self.prefix :] = torch.arange(seen - self.window, seen + self.time)[None, :, None]
            if self.layout == "continued short":  # the window was not full: padding after the slots
                positions[0, self.prefix : self.prefix + 3] = -1
            positions = positions.to(DEVICE)
            last = positions[:, keys - self.time :, 0].contiguous()
            return {"query_positions": last, "key_positions": positions, "ordered_from": self.prefix}
        return {}


def op_of(case: Case, options: dict[str, object]) -> Callable[..., tuple[Tensor, Tensor]]:
    def op(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output, log_sum_exp = retained_attention(*inputs, return_log_sum_exp=True, **options)
        return output, torch.where(log_sum_exp.isfinite(), log_sum_exp, 7.0)

    return op


def assert_kernels_agree(case: Case) -> None:
    """Outputs, log-sum-exps and every gradient; twice, with equal bits."""
    inputs, options = case.arguments()
    op = op_of(case, options)
    outputs, gradients = outputs_and_gradients("triton", op, inputs)
    again = outputs_and_gradients("triton", op, inputs)
    assert all(torch.equal(x, y) for x, y in zip(outputs + gradients, again[0] + again[1], strict=True))
    expected, expected_gradients = outputs_and_gradients("reference", op, [x.double() for x in inputs])
    for name, x, y in zip(("output", "log-sum-exp"), outputs, expected, strict=True):
        assert_close(name, x, y, OUTPUT[case.dtype])
    for name, x, y in zip(("dq", "dk", "dv", "dscore"), gradients, expected_gradients, strict=False):
        assert_close(name, x, y, GRADIENT[case.dtype])
