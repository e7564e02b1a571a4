"""One mixer of a tiny teacher, run alone: the ground of the tests of a single mixer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridize.families import family_of_config
from hybridize.families.base import AttentionView
from hybridize.mixers.base import Mixer
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.registry import mixer_class
from tests.tiny import tiny_teacher

LAYER = 1


class OneLayer:
    """A teacher's layer and the mixer made of it; both read hidden states [B, T, hidden_size]."""

    def __init__(
        self, config: MixerConfig, model_type: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
    ):
        self.model = tiny_teacher(model_type, **changes).to(dtype)
        adapter, geometry = family_of_config(self.model.config.to_dict())
        self.attention: Any = adapter.attention(adapter.layers(self.model.model)[LAYER])
        self.view: AttentionView = adapter.view(self.attention, LAYER, geometry)
        self.geometry = geometry
        self.dtype = dtype
        chosen = mixer_class(config.name)
        assert chosen is not None
        self.mixer: Mixer = chosen.from_attention(self.view, config)

    def hidden_states(self, batch: int, tokens: int) -> Tensor:
        return torch.randn(batch, tokens, self.geometry.hidden_size).to(self.dtype)

    def rope(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.model.rotary_emb(x, positions.clamp(min=0))
        return cos, sin

    def teacher(self, x: Tensor) -> Tensor:
        """The teacher's attention over `x`, nothing padded."""
        tokens = x.shape[1]
        mask = torch.full((tokens, tokens), float("-inf"), dtype=x.dtype).triu(1)[None, None]
        out, _ = self.attention(x, self.rope(x, torch.arange(tokens)[None]), mask)
        return out

    def __call__(self, x: Tensor, cache: Any = None, positions: Tensor | None = None) -> Tensor:
        """The mixer over `x`; without `positions` [B, T], it goes on after the tokens that `cache` has seen."""
        if positions is None:
            first = 0 if cache is None or len(cache.layers) <= LAYER else cache.layers[LAYER].seen_tokens
            positions = torch.arange(first, first + x.shape[1]).expand(x.shape[0], -1)
        out, _ = self.mixer(x, self.rope(x, positions), None, cache, positions)
        return out

    def pieces(self, x: Tensor, cache: Any, lengths: list[int]) -> Tensor:
        """The same as one call, in pieces of these lengths."""
        return torch.cat([self(piece, cache) for piece in x.split(lengths, dim=1)], dim=1)

    def disturb(self) -> None:
        """Moves every new parameter off its start, so that a test does not rest on zeros and ones."""
        with torch.no_grad():
            for parameter in self.mixer.new.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
