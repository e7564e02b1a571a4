"""The table of policies: perplexity and recall of the teacher under each, beside the student's learned eviction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hybridize.evaluation.asking import ask
from hybridize.evaluation.baselines.attention import PolicyAttention
from hybridize.evaluation.baselines.config import PolicyConfig
from hybridize.evaluation.cells import share_cell
from hybridize.evaluation.inside.layers import layers_of, layers_with
from hybridize.evaluation.inside.substitutes import replaced
from hybridize.evaluation.items import Item
from hybridize.evaluation.parts import between, mean_of
from hybridize.evaluation.perplexity import exponential
from hybridize.evaluation.scores import score_windows
from hybridize.evaluation.windows import Window
from hybridize.progress import SILENT, Task
from hybridize.recipe.probes import BaselinesProbe

Row = dict[str, Any]


@contextmanager
def policy_in_place(model: Any, configs: Mapping[int, PolicyConfig]) -> Iterator[None]:
    """While it lasts, the attention of these layers is a policy's; then it is what it was, bit for bit."""
    layers = {layer.index: layer for layer in layers_of(model)}
    substitutes = {
        index: PolicyAttention.from_attention(layers[index].view, config).eval() for index, config in configs.items()
    }
    with replaced(model, substitutes):
        yield


@contextmanager
def budget_in_place(student: Any, budget_tokens: int, window_tokens: int | None = None) -> Iterator[None]:
    """While it lasts, the student's token-eviction layers have this budget, and this window if one is given."""
    mixers = [layer.attention for layer in layers_with(student, "token_eviction")]
    configs = [mixer.config for mixer in mixers]
    try:
        for mixer, config in zip(mixers, configs, strict=True):
            mixer.config = dataclasses.replace(
                config, budget_tokens=budget_tokens, window_tokens=window_tokens or config.window_tokens
            )
        yield
    finally:
        for mixer, config in zip(mixers, configs, strict=True):
            mixer.config = config


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

    Perplexity is over the second half of each window, where the budget binds; prompts and windows hold no padding.

    Returns:
        "rows": {"policy", "budget", "perplexity" with `_se`, "tokens", "recall": {task: {length: cell}}};
        "window_tokens", "sink_tokens" (of the first such layer), "layers", "perplexity_from" (position). None if the
        student does not evict.
    """
    evicting = layers_with(student, "token_eviction")
    if not evicting:
        return None
    own = {layer.index: layer.attention.config for layer in evicting}
    first = evicting[0].attention.config
    start = probe.context_tokens // 2

    def measured(model: Any, policy: str, budget: int | None) -> Row:
        with SILENT.task("", None) as nobody:
            scores = score_windows(model, None, windows, batch_tokens=batch_tokens, task=nobody)
            found = ask(model, tokenizer, items, batch_tokens=batch_tokens, task=nobody)
        late = [part for score in scores if (part := between(score, start, probe.context_tokens)) is not None]
        numbers: Row = {"perplexity": None, "perplexity_se": None}
        if late:
            numbers = exponential("perplexity", mean_of([part.student for part in late]))
        task.advance()
        counted = sum(part.student.numel() for part in late)
        return {"policy": policy, "budget": budget, **numbers, "tokens": counted, "recall": _recall(items, found)}

    rows = [measured(teacher, "full", None)]
    for budget in probe.budgets or sorted({config.budget_tokens for config in own.values()}):
        for policy in probe.policies:
            configs = {
                index: PolicyConfig(
                    policy, probe.window_tokens or config.window_tokens, config.sink_tokens, budget, seed=seed
                )
                for index, config in own.items()
            }
            with policy_in_place(teacher, configs):
                rows.append(measured(teacher, policy, budget))
        with budget_in_place(student, budget, probe.window_tokens):
            rows.append(measured(student, "learned", budget))
    return {
        "window_tokens": probe.window_tokens or first.window_tokens,
        "sink_tokens": first.sink_tokens,
        "layers": list(own),
        "perplexity_from": start,
        "rows": rows,
    }


def _recall(items: Sequence[Item], scores: Sequence[float]) -> Row:
    cells: Row = {}
    for name, length in dict.fromkeys((item.task, item.group) for item in items):
        own = [s for item, s in zip(items, scores, strict=True) if (item.task, item.group) == (name, length)]
        cells.setdefault(name, {})[str(length)] = share_cell(own)
    return cells
