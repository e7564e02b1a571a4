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
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.progress import Task
from hybridize.recipe.probes import BaselinesProbe, PolicyName


def policy_rows(
    teacher: Any,
    layers: Mapping[int, TokenEvictionConfig],
    policies: Sequence[PolicyName],
    measure: Measurement,
    *,
    seed: int,
) -> list[Row]:
    """Measures the teacher under every policy; no student is needed.

    Args:
        layers: by index, the eviction whose window, sinks and budget a policy gets in that layer.
    """
    rows = []
    for policy in policies:
        configs = {
            index: PolicyConfig(policy, own.window_tokens, own.sink_tokens, own.budget_tokens, seed=seed)
            for index, own in layers.items()
        }
        with policy_in_place(teacher, configs):
            rows.append(measure(teacher, policy, _common_budget(layers)))
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
    in the probe each layer has its own; "budget" is then None if they differ.

    Returns:
        "rows", see `Measurement`; "window_tokens", "sink_tokens" (of the first such layer), "layers",
        "perplexity_from" (position). None if the student does not evict.

    Raises:
        RecipeError: a layer of the student cannot have one of the budgets, or the window.
    """
    own = {layer.index: layer.attention.config for layer in layers_with(student, "token_eviction")}
    if not own:
        return None
    # All of them before anything is measured, which takes minutes: what cannot be is refused.
    plans = [
        {index: with_budget(config, budget, probe.window_tokens) for index, config in own.items()}
        for budget in probe.budgets or (None,)
    ]
    start = probe.context_tokens // 2
    measure = Measurement(tokenizer, items, windows, start, probe.context_tokens, batch_tokens, task)
    rows = [measure(teacher, "full", None)]
    for budget, layers in zip(probe.budgets or (None,), plans, strict=True):
        rows += policy_rows(teacher, layers, probe.policies, measure, seed=seed)
        with budget_in_place(student, budget, probe.window_tokens):
            rows.append(measure(student, "learned", _common_budget(layers)))
    first = next(iter(plans[0].values()))
    return {
        "window_tokens": first.window_tokens,
        "sink_tokens": first.sink_tokens,
        "layers": list(own),
        "perplexity_from": start,
        "rows": rows,
    }


def _common_budget(layers: Mapping[int, TokenEvictionConfig]) -> int | None:
    """The budget of all layers; None if each has its own."""
    budgets = {config.budget_tokens for config in layers.values()}
    return budgets.pop() if len(budgets) == 1 else None
