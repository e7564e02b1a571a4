"""The table of policies: perplexity and recall of the teacher under each, beside the student's learned eviction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.evaluation.baselines.config import PolicyConfig
from hybridize.evaluation.baselines.in_place import budget_in_place, policy_in_place, with_budget
from hybridize.evaluation.baselines.measurement import Measurement, Row
from hybridize.evaluation.inside.layers import layers_with
from hybridize.evaluation.items import Item
from hybridize.evaluation.windows import Window
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.progress import Task
from hybridize.recipe.probes import BaselinesProbe, PolicyName


def policy_rows(
    teacher: Any,
    layers: Mapping[int, SlidingWindowConfig],
    policies: Sequence[PolicyName],
    budgets: Sequence[int],
    measure: Measurement,
    *,
    seed: int,
) -> list[Row]:
    """Measures the teacher with every policy at every budget; no student is needed.

    Args:
        layers: window and sinks of each layer, by index, whose attention a policy replaces.
        budgets: retained tokens, sinks included.

    Raises:
        RecipeError: a budget is smaller than a layer's sinks.
    """
    plans = [
        (
            policy,
            budget,
            {
                index: PolicyConfig(policy, window.window_tokens, window.sink_tokens, budget, seed=seed)
                for index, window in layers.items()
            },
        )
        for budget in budgets
        for policy in policies
    ]
    rows = []
    for policy, budget, configs in plans:
        with policy_in_place(teacher, configs):
            rows.append(measure(teacher, policy, budget))
    return rows


def baselines(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    probe: BaselinesProbe,
    items: Sequence[Item],
    windows: Sequence[Window],
    *,
    seed: int,
    batch_tokens: int,
    task: Task,
) -> Row | None:
    """Measures the teacher as it is ("full"), with every policy at every budget in the layers where the student evicts,
    and the student at every budget ("learned").

    Perplexity is over the second half of each window, where the budget binds; windows hold no padding. Without budgets
    in the probe, each that a layer of the student has is given to all of them.

    Returns:
        "rows", see `Measurement`; "window_tokens", "sink_tokens" (of the first such layer), "layers",
        "perplexity_from" (position). None if the student does not evict.

    Raises:
        RecipeError: a layer of the student cannot have one of the budgets, or the window.
    """
    own = {layer.index: layer.attention.config for layer in layers_with(student, "token_eviction")}
    if not own:
        return None
    budgets = probe.budgets or sorted({config.budget_tokens for config in own.values()})
    # Before anything is measured, which takes minutes: what cannot be is refused.
    for budget in budgets:
        for config in own.values():
            with_budget(config, budget, probe.window_tokens)
    layers = {
        index: SlidingWindowConfig(
            window_tokens=probe.window_tokens or config.window_tokens, sink_tokens=config.sink_tokens
        )
        for index, config in own.items()
    }
    start = probe.context_tokens // 2
    measure = Measurement(tokenizer, items, windows, start, probe.context_tokens, batch_tokens, task)
    rows = [measure(teacher, "full", None)]
    for budget in budgets:
        rows += policy_rows(teacher, layers, probe.policies, [budget], measure, seed=seed)
        with budget_in_place(student, budget, probe.window_tokens):
            rows.append(measure(student, "learned", budget))
    first = next(iter(layers.values()))
    return {
        "window_tokens": first.window_tokens,
        "sink_tokens": first.sink_tokens,
        "layers": list(own),
        "perplexity_from": start,
        "rows": rows,
    }
