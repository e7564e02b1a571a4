"""Which gradient a score of the mixer gets, and that nothing else depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import hybridize.mixers.token_eviction as module
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from tests.mixers.one_layer import OneLayer

OUTSIDE = ("outside", "logit", "counterfactual")


def layer_of(name: Any) -> OneLayer:
    torch.manual_seed(0)
    config = TokenEvictionConfig(
        window_tokens=8,
        budget_tokens=6,
        sink_tokens=2,
        scorer_dropout=0.0,
        detach_scorer_input=True,
        score_gradient=name,
        score_relaxation="gate",
        future_attention=0.0,
    )
    layer = OneLayer(config)
    layer.disturb()
    layer.mixer.train()
    return layer


def trained(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a training step, and the gradients by a fixed loss."""
    layer = layer_of(name)
    output = layer(layer.hidden_states(2, 40))
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return output, {key: x.grad for key, x in layer.mixer.named_parameters() if x.grad is not None}


def test_only_the_scorer_learns_otherwise() -> None:
    output, straight = trained("straight_through")
    assert any(".scorer." in key for key in straight)
    for name in OUTSIDE:
        other, gradients = trained(name)
        assert torch.equal(other, output)
        assert gradients.keys() == straight.keys()
        for key, gradient in gradients.items():
            assert gradient.isfinite().all()
            assert torch.equal(gradient, straight[key]) == (".scorer." not in key), key


@pytest.mark.parametrize("name", ["straight_through", *OUTSIDE, "none"])
@pytest.mark.parametrize("training", [True, False])
def test_attention_is_told_in_training_on_whole_texts(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    attention = module.retained_attention

    def watched(*args: Any, **options: Any) -> Tensor:
        told.append(options["score_gradient"])
        return attention(*args, **options)

    monkeypatch.setattr(module, "retained_attention", watched)
    layer = layer_of(name)
    layer.mixer.train(training)
    x = layer.hidden_states(1, 40)
    layer(x)
    assert told == [name if training and name in OUTSIDE else "straight_through"]
    layer.pieces(x, DynamicCache(), [23, 17])
    assert told[-1] == "straight_through"
