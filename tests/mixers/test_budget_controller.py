"""The controller of the L1 weight: its edges, its schedule, its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.budget_controller import BudgetController

BUDGET, SEQUENCE = 512, 4096  # the paper's; its band is 486.4 .. 512 tokens


def controller(heads: int = 1, **changes: Any) -> BudgetController:
    """With l1_every_steps = 1 the mean K is the last step's number."""
    papers = {"l1_target_low": 0.95, "l1_target_high": 1.0, "l1_init": 1e-9, "l1_max": 1.0}
    options = {"budget_control": "l1", "l1_every_steps": 1, **papers, **changes}
    made = BudgetController(TokenEvictionConfig(**options), heads)
    made.initialise()
    return made


def step(made: BudgetController, *kept: float) -> list[float]:
    made.observe(torch.tensor(kept) / SEQUENCE, SEQUENCE)
    made.after_step(BUDGET)
    return made.l1_weight.tolist()


@pytest.mark.parametrize(
    ("kept", "factor"),
    [
        (4096, 1.5),
        (1024, 1.5),
        (512 * 2**0.5, 1.5**0.5),
        (512, 1.0),
        (487, 1.0),
        (486.4 / 2**0.5, 0.5**0.5),
        (486.4 / 2, 0.5),
        (0, 0.5),
    ],
)
def test_lambda_moves_as_far_as_too_much_or_too_little_is_kept(kept: float, factor: float) -> None:
    made = controller()
    step(made, kept)
    made.l1_weight.fill_(1e-3)
    assert step(made, kept) == pytest.approx([1e-3 * factor], rel=1e-5)


@pytest.mark.parametrize(("kept", "first"), [(4096, 1e-6), (487, 1e-6), (486, 0.0)])
def test_first_change_starts_only_when_too_much_is_kept(kept: float, first: float) -> None:
    assert step(controller(l1_init=1e-6), kept) == pytest.approx([first], abs=1e-12)


@pytest.mark.parametrize(("kept", "before", "after"), [(4096, 0.9, 1.0), (0, 1.5e-9, 0.0), (4096, 0.0, 1e-9)])
def test_limits_of_lambda(kept: float, before: float, after: float) -> None:
    made = controller()
    step(made, kept)
    made.l1_weight.fill_(before)
    assert step(made, kept) == pytest.approx([after], abs=1e-12)


def test_heads_move_alone_or_as_a_layer() -> None:
    alone = controller(heads=2)
    for _ in range(2):
        weights = step(alone, 4000, 100)
    assert weights == pytest.approx([1.5e-9, 0.0], abs=1e-12)
    together = controller(heads=2, l1_sharing="layer")
    for _ in range(2):
        weights = step(together, 4000, 100)  # 2050 on average
    assert weights == pytest.approx([1.5e-9], abs=1e-12)


def test_a_change_spreads_over_its_steps() -> None:
    made = controller(l1_every_steps=4, l1_initial_steps=6)
    seen = [step(made, 4096)[0] for _ in range(16)]
    assert seen == pytest.approx([0.0] * 7 + [1e-9 * 1.5 ** (n / 4) for n in range(9)], abs=1e-14)  # from step 8 on


def test_kept_tokens_are_a_mean_over_steps_and_micro_batches() -> None:
    made = controller(l1_every_steps=32)
    made.observe(torch.tensor([0.25]), SEQUENCE)
    made.observe(torch.tensor([0.75]), SEQUENCE)
    made.after_step(BUDGET)
    # It starts from the whole sequence and follows at 2 / 17.
    assert float(made.num_kept) == pytest.approx(SEQUENCE * (1 - 2 / 17 * 0.5))
    made.after_step(BUDGET)
    assert int(made.steps) == 1, "a step without an observation changes nothing"


def test_it_reaches_the_cap_in_as_many_changes_as_the_paper_needs() -> None:
    made = controller()
    changes = next(n for n in range(1, 100) if step(made, 4096) == [1.0])
    assert changes == 53  # 1e-9 · 1.5^52 > 1 > 1e-9 · 1.5^51, and the first change is the start


def test_saved_buffers_are_the_whole_state() -> None:
    torch.manual_seed(0)
    made = controller(heads=3, l1_every_steps=2)
    for _ in range(5):
        step(made, *(torch.rand(3) * SEQUENCE).tolist())
    again = controller(heads=3, l1_every_steps=2)
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for _ in range(5):
        kept = (torch.rand(3) * SEQUENCE).tolist()
        assert step(made, *kept) == step(again, *kept)
        assert torch.equal(made.num_kept, again.num_kept)


def test_a_change_of_type_leaves_the_small_numbers_alone() -> None:
    made = controller()
    made.num_kept.fill_(487.3)
    made.l1_weight.fill_(1.2345e-9)
    made.to(torch.float16)
    assert made.l1_weight.dtype == torch.float32
    assert float(made.l1_weight) == pytest.approx(1.2345e-9)
    assert float(made.num_kept) == pytest.approx(487.3)


def test_metrics() -> None:
    made = controller(heads=2)
    step(made, 400, 600)
    found = made.metrics()
    assert all(value.shape == () for value in found.values())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"kept_tokens_mean": 500, "kept_tokens_min": 400, "kept_tokens_max": 600, "l1_weight": 0.5e-9}
    )


def test_a_cap_alone_counts_and_weighs_nothing() -> None:
    made = controller(budget_control="cap")
    for _ in range(40):
        made.observe(torch.tensor([0.5]), SEQUENCE)
        made.after_step(BUDGET)
    assert made.metrics()["kept_tokens_mean"] == SEQUENCE / 2
    assert made.l1_weight.item() == 0
