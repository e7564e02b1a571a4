"""The layers of a student or a teacher, and what goes into their attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hybridize.families import family
from hybridize.families.base import AttentionView
from hybridize.mixers.base import Mixer, Rope

Hear = Callable[[Tensor, Rope], None]
"""Is told the input of an attention layer, [B, T, hidden_size], and its rotary embedding."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        index: position in the stack.
        mixer: name of what moves information in it; `full_attention` where the teacher's layer stayed.
        attention: the mixer, or the teacher's attention.
        view: its projections, norms and sizes.
    """

    index: int
    mixer: str
    attention: Any
    view: AttentionView


def layers_of(model: Any) -> list[Layer]:
    """Every layer of a causal language model, plain or hybrid."""
    adapter = family(model.config.model_type)
    geometry = adapter.geometry(model.config.to_dict())
    found = []
    for index, decoder_layer in enumerate(adapter.layers(model.model)):
        attention: Any = adapter.attention(decoder_layer)
        if isinstance(attention, Mixer):
            found.append(Layer(index, attention.config.name, attention, _view_of_mixer(attention)))
        else:
            found.append(Layer(index, "full_attention", attention, adapter.view(attention, index, geometry)))
    return found


def layers_with(model: Any, mixer: str) -> list[Layer]:
    """The layers whose mixer has this name."""
    return [layer for layer in layers_of(model) if layer.mixer == mixer]


@contextmanager
def listening(model: Any, hear: Mapping[int, Hear]) -> Iterator[None]:
    """While it lasts, `hear[index]` is told what goes into the attention of that layer in every forward pass."""
    adapter = family(model.config.model_type)
    decoder_layers = adapter.layers(model.model)
    handles = []
    for index, told in hear.items():

        def hook(module: Any, args: Any, kwargs: Any, told: Hear = told) -> None:
            hidden_states, embeddings = adapter.attention_inputs(args, kwargs)
            told(hidden_states, Rope(*embeddings))

        attention = adapter.attention(decoder_layers[index])
        handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def queries_and_keys(view: AttentionView, hidden_states: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """[B, T, hidden_size] -> q [B, T, HQ, D] and k [B, T, H, D], after norms and rotary embedding."""
    q, k = (
        project(hidden_states).unflatten(-1, (-1, view.geometry.head_size)) for project in (view.q_proj, view.k_proj)
    )
    if view.q_norm is not None and view.k_norm is not None:
        q, k = view.q_norm(q), view.k_norm(k)
    return rope(q, k)


def _view_of_mixer(mixer: Mixer) -> AttentionView:
    return AttentionView(
        q_proj=mixer.q_proj,
        k_proj=mixer.k_proj,
        v_proj=mixer.v_proj,
        o_proj=mixer.o_proj,
        q_norm=mixer.q_norm,
        k_norm=mixer.k_norm,
        scale=mixer.scale,
        layer_index=mixer.layer_idx,
        geometry=mixer.geometry,
    )
