"""Softmax attention over all past tokens: the teacher's own layer, kept."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.configs.base import MixerConfig


@dataclass(frozen=True)
class FullAttentionConfig(MixerConfig):
    name = "full_attention"
    summary = "softmax attention over all past tokens: the layer stays as it is"

    def state_bytes(self, geometry: AttentionGeometry, context: int, element_bytes: int) -> int:
        return context * geometry.num_key_heads * geometry.head_size * 2 * element_bytes

    def new_parameters(self, geometry: AttentionGeometry) -> int:
        return 0
