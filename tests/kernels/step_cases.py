"""Random decoding steps of the gated delta rule, and their comparison with the reference in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize_kernels import use_implementation
from hybridize_kernels.dispatch import Implementation
from hybridize_kernels.gated_delta_rule.step import gated_delta_rule_step
from tests.kernels.tolerances import OUTPUT, assert_close

Step = Callable[..., Tensor]
SPARE = 2
"""States beyond those of the rows, which no row may touch where there are slots."""


@dataclass(frozen=True)
class Steps:
    """heads: of q, k and v, and of the state. raw, finish, padding, slots: whether those arguments are there."""

    batch: int = 3
    time: int = 1
    heads: tuple[int, int, int, int] = (2, 2, 2, 2)
    key: int = 12
    value: int = 10
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    raw: bool = False
    normalize: bool = True
    padding: bool = False
    slots: torch.dtype | None = None
    norm: bool = False
    scale: bool = False
    gate: bool = False
    strided: bool = False
    device: str = "cpu"

    def arguments(self) -> dict[str, Any]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64).to(self.dtype).to(self.device)

        batch, time, (query_heads, key_heads, value_heads, states) = self.batch, self.time, self.heads
        q, k = draw(batch, time, query_heads, self.key), draw(batch, time, key_heads, self.key)
        v = draw(batch, time, value_heads, self.value)
        if self.strided and self.key == self.value:
            wide = torch.cat((q, k, v), dim=2)
            q, k, v = wide.split((query_heads, key_heads, value_heads), dim=2)
        if not self.normalize:
            q, k = q * self.key**-0.5, k * self.key**-0.5  # a longer key makes the state explode
        log_decay, beta = draw(batch, time, states), draw(batch, time, states)
        if not self.raw:
            log_decay, beta = -3 * log_decay.abs(), 2 * beta.sigmoid()
        state = torch.randn(batch + SPARE, states, self.key, self.value, dtype=torch.float64)
        given: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "log_decay": log_decay,
            "beta": beta,
            "state": state.to(self.state_dtype).to(self.device),
            "normalize_qk": self.normalize,
        }
        if self.raw:
            given |= {"decay_rate": draw(states) - 2, "decay_bias": draw(states), "beta_ceiling": 2.0}
        if self.scale:
            given |= {"scale": 0.7, "output_scale": draw(states, self.value)}
        if self.norm:
            given["norm_epsilon"] = 1e-6
        if self.gate:
            given["gate"] = draw(batch, time, states, self.value)
        if self.slots is not None:
            slots = torch.randperm(batch + SPARE)[:batch]
            slots[torch.rand(batch) < 0.3] = -1
            given["slots"] = slots.to(self.slots).to(self.device)
        if self.padding:
            real = (torch.rand(batch, time) < 0.7).to(self.device)
            given["real"] = real
            for name in ("q", "k", "v", "log_decay", "beta"):
                given[name] = poisoned(given[name], ~real)
        return given


def poisoned(x: Tensor, where: Tensor) -> Tensor:
    """x `[B, T, ...]`, NaN in those tokens, with its strides."""
    x[where] = float("nan")
    return x


def exactly(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in fp64."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in copied(given).items()
    }


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with a state of their own."""
    return {**given, "state": given["state"].clone()}


def check(steps: Steps, form: Implementation, step: Step | None = None) -> None:
    """Output and states of one call against the reference; states that no row has stay as they are, bit for bit."""
    given = steps.arguments()
    before, exact = given["state"].clone(), exactly(given)
    with use_implementation("reference"):
        expected = gated_delta_rule_step(**exact)
    if step is None:
        with use_implementation(form):
            out = gated_delta_rule_step(**given)
    else:
        out = step(**given)
    assert out.dtype == steps.dtype, steps
    state, slots = given["state"], given.get("slots")
    assert_close(f"output of {steps}", out, expected, OUTPUT[steps.dtype])
    # Rows of heads of very different sizes would hide each other's errors in one comparison.
    tolerance = max(OUTPUT[steps.state_dtype], OUTPUT[torch.float32 if steps.dtype != torch.float64 else steps.dtype])
    assert_close(f"state of {steps}", state, exact["state"], tolerance)
    used = set(range(steps.batch)) if slots is None else set(slots.tolist())
    for slot in set(range(len(state))) - used:
        assert torch.equal(state[slot], before[slot]), f"slot {slot} of {steps}"
    if "real" in given:
        assert not out[~given["real"]].any(), steps
