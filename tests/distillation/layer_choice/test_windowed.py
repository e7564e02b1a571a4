"""Divergences by branches of one walk, against whole models made for every set of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridize.distillation.layer_choice.greedy import search, uniform
from hybridize.distillation.layer_choice.windowed import windowed
from hybridize.errors import NumbersError
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.model.swap import swap, undo
from tests.tiny import FAMILY_NAMES, tiny_teacher, tiny_tokens

WINDOW = SlidingWindowConfig(window_tokens=6, sink_tokens=2)
LAYERS = range(4)
OWN_WINDOWS = {
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}
TEACHERS = [(name, {}) for name in FAMILY_NAMES] + list(OWN_WINDOWS.items())
each_teacher = pytest.mark.parametrize(("name", "changes"), TEACHERS, ids=lambda value: str(value))


def teacher(name: str, changes: dict[str, Any]) -> Any:
    return tiny_teacher(name, **changes)


@torch.no_grad()
def by_whole_models(model: Any, tokens: torch.Tensor, full: set[int], stays: tuple[int, ...] = ()) -> float:
    """KL from the logits of two forward passes, token by token."""
    expected = model(tokens).logits
    swap(model, [FullAttentionConfig() if index in full or index in stays else WINDOW for index in LAYERS])
    found = model(tokens).logits
    undo(model)
    total = 0.0
    for p, q in zip(expected.flatten(0, 1).double(), found.flatten(0, 1).double(), strict=True):
        total += float((p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum())
    return total / tokens.numel()


@each_teacher
def test_the_search_is_that_of_whole_models(name: str, changes: dict[str, Any]) -> None:
    model, tokens = teacher(name, changes), tiny_tokens(3, 20)
    # Layers that see no more than the window by themselves have nothing to be given back.
    stays = (1, 2, 3) if name == "qwen3" and changes else ()
    layers = [index for index in LAYERS if index not in stays]
    full: set[int] = set()
    steps = []
    while len(steps) < min(3, len(layers)):
        tried = {index: by_whole_models(model, tokens, full | {index}, stays) for index in layers if index not in full}
        best = min(tried, key=lambda index: tried[index])
        full.add(best)
        steps.append((best, tried[best]))
    alone = {index: by_whole_models(model, tokens, set(LAYERS) - {index}) for index in layers}
    with windowed(model, tokens, WINDOW, batch_sequences=2) as measured:
        assert measured.layers == tuple(layers)
        found = search(measured, len(steps), {"two": layers[:2]})
    assert [layer for layer, _ in found.steps] == [layer for layer, _ in steps]
    assert [value for _, value in found.steps] == pytest.approx([value for _, value in steps], rel=1e-4, abs=1e-6)
    assert found.windowed_alone == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert found.all_windowed == pytest.approx(by_whole_models(model, tokens, set(), stays), rel=1e-4)
    two = by_whole_models(model, tokens, set(layers[:2]), stays)
    assert found.compared[0].divergence == pytest.approx(two, rel=1e-4, abs=1e-6)
    assert found.all_windowed > 1e-3


@each_teacher
def test_nothing_diverges_with_full_attention_everywhere(name: str, changes: dict[str, Any]) -> None:
    with windowed(teacher(name, changes), tiny_tokens(2, 20), WINDOW, batch_sequences=1) as measured:
        assert measured.divergence(LAYERS) == 0.0
        assert measured.divergence(()) > 0.0


@pytest.mark.parametrize("batch_sequences", [1, 2, 5, 9])
def test_batches_change_nothing(batch_sequences: int) -> None:
    model, tokens = tiny_teacher(), tiny_tokens(5, 20)
    heard = []
    with windowed(model, tokens, WINDOW, batch_sequences) as measured:
        measured.told = heard.append
        found = measured.divergence_of_flips({1}, {0, 1, 3})
    assert sum(heard) == pytest.approx(3)
    with windowed(model, tokens, WINDOW, 5) as measured:
        for index, full in ((0, {0, 1}), (1, set()), (3, {1, 3})):
            assert found[index] == pytest.approx(measured.divergence(full), rel=1e-5)


@each_teacher
def test_the_model_is_as_it_was(name: str, changes: dict[str, Any]) -> None:
    model, tokens = teacher(name, changes), tiny_tokens(2, 20)
    modules, before = list(model.modules()), {key: value.clone() for key, value in model.state_dict().items()}
    config, cls = model.config.to_dict(), type(model)
    expected = model(tokens).logits

    def stop(share: float) -> None:
        raise KeyError  # in the middle of the work

    def measure() -> None:
        with windowed(model, tokens, WINDOW, 1) as measured:
            measured.told = stop
            measured.divergence_of_flips((), LAYERS)

    with pytest.raises(KeyError):
        measure()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert (type(model), model.config.to_dict(), model.training) == (cls, config, False)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("planted", [(0, 2), (2, 1), (3, 0)])
def test_planted_layers_are_found(planted: tuple[int, int]) -> None:
    """The attention of all but two layers has no effect, and that of the second a small one."""
    first, second = planted
    model = tiny_teacher()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight *= {first: 1.0, second: 0.01}.get(index, 0.0)
    with windowed(model, tiny_tokens(3, 24), WINDOW, 3) as measured:
        found = search(measured, 2, dict(uniform(measured.layers, 2)))
    assert found.chosen.layers == planted
    assert found.steps[0][1] < 0.5 * found.all_windowed
    assert found.steps[1][1] == 0.0
    assert all(found.windowed_alone[index] == 0.0 for index in set(LAYERS) - set(planted))
    assert all(choice.divergence > 0 for choice in found.compared if set(choice.layers) != set(planted))


def test_the_order_is_the_same_each_time() -> None:
    orders = []
    for _ in range(2):
        with windowed(tiny_teacher(), tiny_tokens(2, 20), WINDOW, 1) as measured:
            orders.append(search(measured, 4, {}).steps)
    assert orders[0] == orders[1]


def test_what_is_not_finite_is_told() -> None:
    model = tiny_teacher()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with windowed(model, tiny_tokens(1, 20), WINDOW, 1) as measured, pytest.raises(NumbersError, match="divergence"):
        measured.divergence({1})
