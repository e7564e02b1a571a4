"""Policies in a whole model, and what is left when they are taken out."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from hybridize.errors import UsageError
from hybridize.evaluation.baselines.config import PolicyConfig
from hybridize.evaluation.baselines.in_place import policy_in_place
from hybridize.evaluation.generation import Decoder
from hybridize.recipe.probes import PolicyName
from tests.tiny import FAMILY_NAMES, tiny_teacher, tiny_tokens

POLICIES = get_args(PolicyName)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_teacher()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_for_the_whole_text_is_the_teacher(teacher: Any, policy: Any) -> None:
    tokens = tiny_tokens(2, 50)
    configs = {index: PolicyConfig(policy, 6, 2, 60, block_tokens=5) for index in range(4)}
    with torch.no_grad():
        whole = teacher(tokens, use_cache=False).logits
        with policy_in_place(teacher, configs):
            torch.testing.assert_close(teacher(tokens, use_cache=False).logits, whole, rtol=1e-3, atol=1e-4)
        assert torch.equal(teacher(tokens, use_cache=False).logits, whole)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_teacher_with_a_policy_writes_from_its_cache_as_without_one(teacher: Any, policy: Any) -> None:
    tokens = tiny_tokens(2, 44)
    configs = {index: PolicyConfig(policy, 6, 2, 5, block_tokens=4) for index in (0, 2, 3)}
    with torch.inference_mode(), policy_in_place(teacher, configs):
        whole = teacher(tokens, use_cache=False).logits
        decoder = Decoder(teacher)
        logits = [decoder.read(tokens[:, :21].tolist())]
        logits += [decoder.step(tokens[:, i]) for i in range(21, 44)]
    torch.testing.assert_close(torch.stack(logits, dim=1), whole[:, 20:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_family_and_implementation_of_the_other_layers(family: str, implementation: str) -> None:
    """Some implementations get a causal mask in every layer: it is no padding."""
    teacher = tiny_teacher(family)
    teacher.set_attn_implementation(implementation)
    tokens = tiny_tokens(2, 33)
    inner = type(teacher.model)
    configs = {index: PolicyConfig("last_attention", 6, 2, 60, block_tokens=4) for index in (1, 3)}
    with torch.inference_mode():
        plain = teacher(tokens, use_cache=False).logits
        with policy_in_place(teacher, configs):
            torch.testing.assert_close(teacher(tokens, use_cache=False).logits, plain, rtol=1e-3, atol=1e-4)
        assert torch.equal(teacher(tokens, use_cache=False).logits, plain)
    assert type(teacher.model) is inner


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_many_tokens_are_appended_to_a_cache(policy: Any, implementation: str) -> None:
    teacher = tiny_teacher()
    teacher.set_attn_implementation(implementation)
    tokens = tiny_tokens(2, 40)
    configs = {index: PolicyConfig(policy, 6, 2, 5, block_tokens=4) for index in (0, 2)}
    with torch.inference_mode(), policy_in_place(teacher, configs):
        whole = teacher(tokens, use_cache=False).logits
        outputs = teacher.model(tokens[:, :21], use_cache=True)
        cache = outputs["cache"] if "cache" in outputs else outputs["past_key_values"]
        hidden = teacher.model(tokens[:, 21:], use_cache=True, cache=cache).last_hidden_state
        torch.testing.assert_close(teacher.lm_head(hidden), whole[:, 21:], rtol=1e-3, atol=1e-3)


def test_padding_and_packing_are_refused_and_a_mask_without_padding_is_not(teacher: Any) -> None:
    tokens = tiny_tokens(2, 12)
    mask = torch.ones_like(tokens)
    with torch.inference_mode(), policy_in_place(teacher, {1: PolicyConfig("key_norm", 6, 2, 5)}):
        plain = teacher(tokens, use_cache=False).logits
        masked = teacher(tokens, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-5)
        mask[0, :3] = 0
        with pytest.raises(UsageError, match="without padding"):
            teacher(tokens, attention_mask=mask, use_cache=False)
        with pytest.raises(UsageError, match="one text a row"):
            teacher.model(tokens[:1], cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))


def test_a_failure_inside_leaves_the_model_as_it_was(teacher: Any) -> None:
    before = (type(teacher.model), [layer.self_attn for layer in teacher.model.layers])

    def fail_inside() -> None:
        with policy_in_place(teacher, {0: PolicyConfig("recency", 6, 2, 5)}):
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert (type(teacher.model), [layer.self_attn for layer in teacher.model.layers]) == before
