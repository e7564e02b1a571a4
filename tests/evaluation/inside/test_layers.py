"""Views of layers, and what is heard of them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.evaluation.inside.layers import layers_of, layers_with, listening, queries_and_keys
from hybridize.families import family
from hybridize.mixers.base import Rope
from tests.evaluation.inside.hybrids import DELTA, EVICTION, FULL, SPARSE, WINDOW, make_texts, tiny_hybrid
from tests.tiny import FAMILY_NAMES


def test_layers_have_the_names_of_the_recipe() -> None:
    hybrid = tiny_hybrid(FULL, EVICTION, DELTA, SPARSE, WINDOW)
    names = ["full_attention", "token_eviction", "gated_delta_net", "native_sparse_attention", "sliding_window"]
    assert [(layer.index, layer.mixer) for layer in layers_of(hybrid)] == list(enumerate(names))
    assert [layer.index for layer in layers_with(hybrid, "gated_delta_net")] == [2]
    assert layers_with(hybrid, "gated_delta_net")[0].view.q_proj is hybrid.model.layers[2].self_attn.q_proj


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
@pytest.mark.parametrize("mixer", [FULL, {**WINDOW, "window_tokens": 99}], ids=["attention", "mixer"])
@torch.no_grad()
def test_queries_and_keys_are_those_that_the_layer_attends_with(model_type: str, mixer: dict[str, Any]) -> None:
    hybrid = tiny_hybrid(FULL, mixer, family=model_type)
    layer = layers_of(hybrid)[1]
    view, inputs, outputs = layer.view, [], []
    attention = family(model_type).attention(hybrid.model.layers[1])
    handle = attention.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    with listening(hybrid, {1: lambda x, rope: inputs.append((x, rope))}):
        hybrid(torch.tensor([window.tokens for window in make_texts(20, 20)]))
    handle.remove()
    ((x, rope),) = inputs
    q, k = queries_and_keys(view, x, rope)
    group = view.geometry.group_size
    v = view.v_proj(x).unflatten(-1, (-1, view.geometry.head_size)).repeat_interleave(group, dim=2)
    logits = view.scale * torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, dim=2))
    weights = (logits + torch.full((20, 20), -torch.inf).triu(1)).softmax(-1)
    expected = view.o_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    torch.testing.assert_close(outputs[0], expected, atol=2e-5, rtol=1e-4)


def test_listening_ends() -> None:
    hybrid, heard = tiny_hybrid(FULL, DELTA), []

    def hear(hidden_states: Tensor, rope: Rope) -> None:
        heard.append(hidden_states.shape)

    tokens = torch.tensor([make_texts(12)[0].tokens])
    with suppress(KeyError), listening(hybrid, {0: hear, 1: hear}):
        hybrid(tokens)
        raise KeyError
    hybrid(tokens)
    assert heard == [(1, 12, 24), (1, 12, 24)]
