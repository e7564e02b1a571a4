"""The training form of a model computes what transformers and PEFT compute, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridize.distillation.lora import Student, wrap
from hybridize.mixers.registry import config_from_dict
from hybridize.model import training_form
from hybridize.model.packed_attention import use_packed_attention
from hybridize.model.swap import swap
from hybridize.recipe.schema import Lora
from tests.tiny import FAMILY_NAMES, tiny_teacher, tiny_tokens

LAYERS: tuple[dict[str, Any], ...] = (
    {"mixer": "full_attention"},
    {"mixer": "sliding_window", "window_tokens": 8, "sink_tokens": 1},
    {"mixer": "gated_delta_net", "short_convolution": 3},
    {"mixer": "token_eviction", "window_tokens": 9, "sink_tokens": 2, "budget_tokens": 5, "scorer_dropout": 0.0},
)


def student(family: str, lora: Lora | None = None, **changes: Any) -> Student:
    """A hybrid whose adapters are not zero."""
    configs = [config_from_dict(layer) for layer in LAYERS]
    wrapped = wrap(swap(tiny_teacher(family, **changes), configs), lora or Lora(3), frozen_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.trained().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    use_packed_attention(wrapped.model)
    return wrapped


def outputs(wrapped: Student, tokens: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Last hidden states in training, and the gradient of their squares by parameter."""
    wrapped.model.train()
    for parameter in wrapped.trained().values():
        parameter.grad = None
    hidden = wrapped.model.model(input_ids=tokens, use_cache=False, **inputs).last_hidden_state
    hidden.square().sum().backward()
    return hidden.detach(), {name: p.grad for name, p in wrapped.trained().items() if p.grad is not None}


Outputs = tuple[torch.Tensor, dict[str, torch.Tensor]]
TIMES_ROUNDING = 4.0


def rounding(
    wrapped: Student, tokens: torch.Tensor, expected: Outputs, seed: int = 3
) -> tuple[float, dict[str, float]]:
    """What the last bits of the embeddings change in the outputs. Tiny random models amplify it, and by how much
    depends on the processor's order of summation. Gradients relative to their largest number."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: torch.nn.Module, arguments: Any, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + 2.0**-22 * (torch.randint(0, 3, out.shape, generator=generator) - 1))

    handle = wrapped.model.get_input_embeddings().register_forward_hook(disturb)
    hidden, gradients = 0.0, dict.fromkeys(expected[1], 0.0)
    for _ in range(3):
        torch.manual_seed(seed)
        other = outputs(wrapped, tokens)
        hidden = max(hidden, float((other[0] - expected[0]).abs().max()))
        for name, gradient in expected[1].items():
            change = (other[1][name] - gradient).abs().max() / (gradient.abs().max() or 1.0)
            gradients[name] = max(gradients[name], float(change))
    handle.remove()
    return hidden, gradients


def assert_same(found: Outputs, expected: Outputs, lost: tuple[float, dict[str, float]] = (0.0, {})) -> None:
    """Equal but for rounding, or for TIMES_ROUNDING what `rounding` found."""
    (hidden, gradients), (expected_hidden, expected_gradients) = found, expected
    limit = max(1e-5, TIMES_ROUNDING * lost[0])
    torch.testing.assert_close(hidden, expected_hidden, rtol=1e-4, atol=limit)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max()) or 1.0
        limit = max(1e-4, TIMES_ROUNDING * lost[1].get(name, 0.0))
        torch.testing.assert_close(gradient / scale, expected_gradients[name] / scale, rtol=0, atol=limit, msg=name)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_hidden_states_and_gradients_are_those_of_transformers(family: str) -> None:
    wrapped, tokens = student(family), tiny_tokens(2, 30)
    plain = outputs(wrapped, tokens)
    lost = rounding(wrapped, tokens, plain)
    training_form.enter(wrapped.model)
    assert_same(outputs(wrapped, tokens), plain, lost)
    training_form.checkpointed(wrapped.model, (1, 3))
    assert_same(outputs(wrapped, tokens), plain, lost)


def test_packed_documents_pass_through() -> None:
    wrapped, tokens = student("llama"), tiny_tokens(1, 30)
    inputs = {
        "cu_seqlens": torch.tensor([0, 11, 12, 30], dtype=torch.int32),
        "position_ids": torch.cat([torch.arange(n) for n in (11, 1, 18)])[None],
    }
    plain = outputs(wrapped, tokens, **inputs)
    training_form.enter(wrapped.model)
    assert_same(outputs(wrapped, tokens, **inputs), plain)


def test_other_activations_and_dropout_keep_their_own_ways() -> None:
    tokens = tiny_tokens(2, 30)
    for wrapped in (student("llama", hidden_act="gelu"), student("llama", Lora(3, dropout=0.5))):
        torch.manual_seed(3)
        plain = outputs(wrapped, tokens)
        lost = rounding(wrapped, tokens, plain, seed=3)
        training_form.enter(wrapped.model)
        torch.manual_seed(3)
        assert_same(outputs(wrapped, tokens), plain, lost)


def test_it_is_taken_off_again() -> None:
    wrapped, tokens = student("qwen3"), tiny_tokens(2, 30)
    wrapped.model.eval()
    with torch.no_grad():
        before = wrapped.model(input_ids=tokens).logits
        training_form.enter(wrapped.model)
        training_form.leave(wrapped.model)
        assert torch.equal(wrapped.model(input_ids=tokens).logits, before)
    assert all("forward" not in vars(module) and "project" not in vars(module) for module in wrapped.peft.modules())


def test_a_cache_is_left_to_transformers() -> None:
    wrapped, tokens = student("llama"), tiny_tokens(1, 12)
    wrapped.model.eval()
    with torch.no_grad():
        whole = wrapped.model(input_ids=tokens, use_cache=False).logits
        training_form.enter(wrapped.model)
        first = wrapped.model(input_ids=tokens[:, :8], use_cache=True)
        second = wrapped.model(input_ids=tokens[:, 8:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    ],
)
def test_a_teachers_own_windows_stay(family: str, windows: dict[str, Any]) -> None:
    teacher, tokens = tiny_teacher(family, **windows), tiny_tokens(2, 30)
    with torch.no_grad():
        expected = teacher(input_ids=tokens).logits
        use_packed_attention(teacher)
        training_form.enter(teacher)
        found = teacher(input_ids=tokens).logits
        unwindowed = tiny_teacher(family)(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (unwindowed - expected).abs().max() > 0.1
