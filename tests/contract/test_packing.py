"""Packed documents: each gives what it gives alone, in logits and in gradients, whatever stands beside it."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from transformers import DynamicCache

from hybridize.errors import UsageError
from hybridize.mixers.parts.token_scorer import TokenScorer
from hybridize.model.packed_attention import packed_attention, use_packed_attention
from tests import tiny
from tests.contract.settings import CASES, DEVICES, tiny_hybrid, tiny_teacher, tiny_tokens
from tests.tiny import FAMILY_NAMES

LENGTHS = (1, 2, 17, 34, 5)  # 34 is longer than window + budget of every tiny setting
BOUNDS = (0, *accumulate(LENGTHS))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

matrix = pytest.mark.parametrize(("mixer", "family"), CASES, ids=[f"{m}-{f}" for m, f in CASES])
families = pytest.mark.parametrize("family", FAMILY_NAMES)


def packed():
    """Arguments for a model: the documents in one row."""
    return {
        "input_ids": tiny_tokens(1, BOUNDS[-1]),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None].to(DEVICES["device"]),
        "cu_seqlens": torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICES["device"]),
    }


def together(model):
    return model(**packed(), use_cache=False).logits


def one_by_one(model):
    tokens = tiny_tokens(1, BOUNDS[-1])
    return torch.cat([model(tokens[:, a:b], use_cache=False).logits for a, b in pairwise(BOUNDS)], dim=1)


def gradients(model, logits):
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits.device)
    model.zero_grad()
    (logits * direction).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, TokenScorer):
            module.dropout = 0.0
    return model.train()


@matrix
def test_packed_documents_give_what_they_give_alone(mixer, family):
    model = tiny_hybrid(mixer, family)
    with torch.no_grad():
        alone = one_by_one(model)
        use_packed_attention(model)
        torch.testing.assert_close(together(model), alone, **TOLERANCE)


@matrix
def test_packed_documents_teach_what_they_teach_alone(mixer, family):
    model = without_dropout(tiny_hybrid(mixer, family))
    alone = one_by_one(model)
    expected = gradients(model, alone)
    use_packed_attention(model)
    logits = together(model)
    torch.testing.assert_close(logits, alone, **TOLERANCE)
    found = gradients(model, logits)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=max(1e-4 * size, 1e-6), msg=name)


@families
def test_a_teacher_keeps_packed_documents_apart(family):
    model = tiny_teacher(family)
    with torch.no_grad():
        alone = one_by_one(model)
        use_packed_attention(model)
        masks = []
        model.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        torch.testing.assert_close(together(model), alone, **TOLERANCE)
        assert masks == [None]


@families
def test_without_documents_packed_attention_is_the_teachers_own(family):
    model, tokens = tiny_teacher(family), tiny_tokens(2, 20)

    def in_pieces():
        cache = DynamicCache(config=model.config)
        pieces = [model(x, past_key_values=cache, use_cache=True).logits for x in tokens.split([7, 1, 9, 3], dim=1)]
        return torch.cat(pieces, dim=1)

    with torch.no_grad():
        whole, pieces = model(tokens, use_cache=False).logits, in_pieces()
        use_packed_attention(model)
        assert torch.equal(model(tokens, use_cache=False).logits, whole)
        torch.testing.assert_close(in_pieces(), pieces, **TOLERANCE)


def test_a_teachers_own_window_is_kept():
    model = tiny.tiny_teacher("mistral", sliding_window=6).to(DEVICES["device"])
    tokens = tiny_tokens(2, 20)
    with torch.no_grad():
        whole, alone = model(tokens, use_cache=False).logits, one_by_one(model)
        use_packed_attention(model)
        torch.testing.assert_close(model(tokens, use_cache=False).logits, whole, **TOLERANCE)
        torch.testing.assert_close(together(model), alone, **TOLERANCE)


def test_another_implementation_makes_the_mask_itself():
    model = tiny_hybrid("sliding_window", "llama")
    with torch.no_grad():
        alone = one_by_one(model)
        arguments = packed()
        torch.testing.assert_close(model(**arguments, use_cache=False).logits, alone, **TOLERANCE)
        del arguments["position_ids"]  # they follow from the bounds
        torch.testing.assert_close(model(**arguments).logits, alone, **TOLERANCE)


def test_checkpointed_gradients_are_the_same():
    found = []
    for checkpointing in (False, True):
        model = without_dropout(tiny_hybrid("token_eviction", "llama"))
        use_packed_attention(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(gradients(model, together(model)))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixer", ["full_attention", "gated_delta_net"])
def test_what_does_not_go_with_packing_is_refused(mixer):
    model, arguments = tiny_hybrid(mixer, "llama"), packed()
    ones = torch.ones_like(arguments["input_ids"])
    with pytest.raises(UsageError, match="cache"):
        model(**arguments, use_cache=True)
    with pytest.raises(UsageError, match="cache"):
        model(**arguments, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(UsageError, match="mask"):
        model(**arguments, attention_mask=ones)
    two_rows = {name: x.expand(2, -1) for name, x in arguments.items() if name != "cu_seqlens"}
    with pytest.raises(UsageError, match="one row"):
        model(**two_rows, cu_seqlens=arguments["cu_seqlens"])
    use_packed_attention(model)
    with pytest.raises(UsageError, match="padding mask"):
        model(arguments["input_ids"], attention_mask=ones)
    model.set_attn_implementation("sdpa")
    model(arguments["input_ids"], attention_mask=ones)


def test_packed_attention_refuses_a_mask_and_a_window_refuses_dropout():
    q = k = torch.zeros(1, 2, 5, 4)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(UsageError, match="no attention mask"):
        packed_attention(torch.nn.Identity(), q, k, k, torch.ones(1, 1, 5, 5), cu_seqlens=bounds)
    with pytest.raises(UsageError, match=r"dropout \(0.5\)"):
        packed_attention(torch.nn.Identity(), q, k, k, None, dropout=0.5, sliding_window=3, cu_seqlens=bounds)


@pytest.mark.parametrize("mixer", ["sliding_window", "token_eviction", "gated_delta_net", "native_sparse_attention"])
def test_a_mixer_alone_takes_documents(mixer):
    """As the align stage calls it: without the model around it."""
    model = tiny_hybrid(mixer, "llama")
    layer = model.mixers[1]
    x = torch.randn(1, BOUNDS[-1], model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    x = x.to(DEVICES["device"])
    arguments = packed()
    embeddings = model.model.rotary_emb(x, position_ids=arguments["position_ids"])
    with torch.no_grad():
        whole, _ = layer(x, position_embeddings=embeddings, cu_seqlens=arguments["cu_seqlens"])
        for a, b in pairwise(BOUNDS):
            cos_sin = model.model.rotary_emb(x, position_ids=torch.arange(b - a, device=x.device)[None])
            alone, _ = layer(x[:, a:b], position_embeddings=cos_sin)
            torch.testing.assert_close(whole[:, a:b], alone, **TOLERANCE)
        with pytest.raises(UsageError, match="cache"):
            layer(x, position_embeddings=embeddings, cache=DynamicCache(), cu_seqlens=arguments["cu_seqlens"])
