"""All layers of a model over its states: a chunk of tokens for some rows, or one token for every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridize.families.base import FamilyAdapter
from hybridize.inference.full_attention import CachedAttention
from hybridize.inference.states import RowStates, States
from hybridize.inference.steps import attention_step
from hybridize.inference.steps.base import FusedLinear, Moment
from hybridize.inference.steps.token_eviction import scorings
from hybridize.mixers.base import Mixer
from hybridize.model.training_form import layer_body
from hybridize_kernels import norm_linear, swiglu


class DecoderStep:
    """A decoder layer's decoding step: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, layer: Any, attention: Any, adapter: FamilyAdapter, states: States, index: int) -> None:
        self.norm, self.mlp_norm, self.mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        self.attention = attention_step(attention, adapter, states.layers[index])
        self.gate_up = FusedLinear([self.mlp.gate_proj, self.mlp.up_proj])
        self.down = FusedLinear([self.mlp.down_proj])
        self.is_swiglu = self.mlp.config.hidden_act in ("silu", "swish")

    def __call__(self, x: Tensor, moment: Moment) -> Tensor:
        """x [B, width]."""
        x = self.attention(x, self.norm, moment)
        norm = {"norm_weight": self.mlp_norm.weight, "epsilon": self.mlp_norm.variance_epsilon}
        if self.is_swiglu and not self.gate_up.padding:
            return self.down(self.gate_up(x, activation="swiglu", **norm), residual=x, overwrites_residual=True)
        gate, up = (part[:, 0] for part in self.gate_up.split(self.gate_up(x, **norm)))
        inner = swiglu(gate, up) if self.is_swiglu else self.mlp.act_fn(gate) * up
        return self.down(inner, residual=x, overwrites_residual=True)


class Decoder:
    """A model's layers, its norms and rotary positions fused, its projections joined.

    Args:
        model: a causal language model, plain or hybrid, in its training form (`enter`); its weights become views of
            joined ones.
        adapter: of its family.
        states: one a layer.
    """

    def __init__(self, model: Any, adapter: FamilyAdapter, states: States) -> None:
        self.model, self.adapter = model, adapter
        layers = list(adapter.layers(model.model))
        attentions = [adapter.attention(layer) for layer in layers]
        self._layers = layers
        self._attentions = [
            attention if isinstance(attention, Mixer) else CachedAttention(attention, adapter)
            for attention in attentions
        ]
        self._steps = [
            DecoderStep(layer, attention, adapter, states, index)
            for index, (layer, attention) in enumerate(zip(layers, attentions, strict=True))
        ]
        self._scorings = scorings([step.attention for step in self._steps], states)

    def read(self, tokens: Tensor, positions: Tensor | None, cache: RowStates) -> Tensor:
        """Takes tokens [B, T] into these rows' states.

        Args:
            positions: [B, T], −1 for padding; None: from the rows' seen tokens on, in every row.
            cache: the rows' states.

        Returns:
            [B, T, width], before the last norm.
        """
        x: Tensor = self.model.model.embed_tokens(tokens)
        place = positions
        if place is None:
            first = cache.get_seq_length()
            place = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        rotary = self.model.model.rotary_emb(x, place.clamp(min=0))
        for layer, attention in zip(self._layers, self._attentions, strict=True):
            x = layer_body(layer, attention, x, position_embeddings=rotary, cache=cache, token_positions=positions)
        return x

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """One token for each row: tokens [B], positions [B], −1 where the row stays as it is.

        Returns:
            [B, vocabulary].
        """
        x = self.model.model.embed_tokens(tokens)
        place = positions[:, None]
        rotary = self.model.model.rotary_emb(x[:, None], place.clamp(min=0))
        moment = Moment(place, place >= 0, rotary)
        for step in self._steps:
            x = step(x, moment)
        for score in self._scorings:
            score(moment)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """x [B, width], before the last norm -> [B, vocabulary]."""
        norm, head = self.model.model.norm, self.model.lm_head
        logits: Tensor = norm_linear(
            x, head.weight, bias=head.bias, norm_weight=norm.weight, epsilon=norm.variance_epsilon
        )
        return logits
