"""Softmax attention over the last tokens and the first few (sinks)."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.configs.base import MixerConfig

POSITION_BYTES = 4


@dataclass(frozen=True)
class SlidingWindowConfig(MixerConfig):
    """Keys of the mixer `sliding_window`.

    Attributes:
        window_tokens: W, tokens that a query sees, itself included.
        sink_tokens: first tokens of the text that every query sees beside its window.
    """

    name = "sliding_window"
    summary = "softmax attention over the last tokens and the first few (sinks); fixed-size state, nothing new to train"

    window_tokens: int = 256
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        self.require(self.window_tokens >= 1, "window_tokens", f"must be at least 1, is {self.window_tokens}.")
        self.require(self.sink_tokens >= 0, "sink_tokens", f"must be zero or positive, is {self.sink_tokens}.")

    def warnings(self, geometry: AttentionGeometry, context: int) -> list[str]:
        if context <= self.window_tokens:
            return [
                f"{self.name}: a window of {self.window_tokens} tokens covers the whole context of {context}; "
                "the layer stays full attention in effect."
            ]
        return []

    def state_bytes(self, geometry: AttentionGeometry, context: int, element_bytes: int) -> int:
        slots = self.sink_tokens + self.window_tokens
        key_value_bytes = 2 * geometry.num_key_heads * geometry.head_size * element_bytes
        last_position_bytes = POSITION_BYTES
        return slots * key_value_bytes + last_position_bytes

    def new_parameters(self, geometry: AttentionGeometry) -> int:
        return 0
