"""Whose a layer of a cache is: a mixer's, full attention's, or that of a teacher's own window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hybridize.evaluation.generation import cache_of
from hybridize.mixers.base import MixerState
from hybridize.mixers.parts.preallocated import PreallocatedLayer
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap, undo
from tests.tiny import tiny_teacher, tiny_tokens

WINDOW = {"mixer": "sliding_window", "window_tokens": 6, "sink_tokens": 1}
FULL = {"mixer": "full_attention"}
KINDS = [PreallocatedLayer, MixerState, MixerState, PreallocatedLayer]


def hybrid(model_type: str = "llama", **changes: Any) -> Any:
    return swap(tiny_teacher(model_type, **changes), [config_from_dict(x) for x in (FULL, WINDOW, WINDOW, FULL)])


def kinds(cache: Any) -> list[type]:
    return [type(layer) for layer in cache.layers]


@pytest.mark.parametrize("given", ["configured", "bare", "none"])
def test_every_layer_has_room_of_its_own(given: str) -> None:
    model = hybrid()
    cache = {"configured": DynamicCache(config=model.config), "bare": DynamicCache(), "none": None}[given]
    with torch.no_grad():
        held = cache_of(model(tiny_tokens(2, 9), past_key_values=cache, use_cache=True))
    assert kinds(held) == KINDS
    assert cache is None or held is cache


def test_generation_keeps_it() -> None:
    model, tokens = hybrid(), tiny_tokens(2, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(tokens)
    done = model.generate(tokens, return_dict_in_generate=True, **options)
    assert kinds(done.past_key_values) == KINDS
    assert done.sequences.tolist() == model.generate(tokens, use_cache=False, **options).tolist()


def test_a_window_of_the_teachers_own_keeps_its_layer() -> None:
    model = hybrid("mistral", sliding_window=7)
    with torch.no_grad():
        held = cache_of(model(tiny_tokens(2, 12), use_cache=True))
    assert kinds(held) == [DynamicSlidingWindowLayer, MixerState, MixerState, DynamicSlidingWindowLayer]


def test_a_layer_may_be_offloaded_by_the_cache_it_lies_in() -> None:
    """transformers fetches the layer that comes next; where that is a mixer's, full attention's comes by itself."""
    model, tokens = hybrid(), tiny_tokens(2, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        for first in range(12):
            step = model(tokens[:, first : first + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(step, whole[:, first : first + 1], rtol=1e-4, atol=1e-4)
            for index in (0, 3):
                cache.layers[index].offload()


def test_training_and_the_teacher_know_nothing_of_it() -> None:
    model, tokens = hybrid(), tiny_tokens(2, 9)
    assert cache_of_or_none(model.train()(tokens)) is None
    assert cache_of_or_none(model.eval()(tokens, use_cache=False)) is None
    model.config.use_cache = False
    assert cache_of_or_none(model(tokens)) is None
    model.config.use_cache = True
    teacher = undo(model)
    assert not hasattr(type(teacher.model), "hybrid_adapter")
    with torch.no_grad():
        assert kinds(cache_of(teacher(tokens, use_cache=True))) == [DynamicLayer] * 4


def cache_of_or_none(outputs: Any) -> Any:
    return getattr(outputs, "cache", None) or getattr(outputs, "past_key_values", None)
