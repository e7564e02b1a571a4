"""Native sparse attention: compressed, selected and window branches over all past tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.configs.base import MixerConfig

_LARGEST_HEAD_OF_128 = 128
"""Numbers of a head up to which a block may have 128 tokens in the kernels."""
_ALWAYS_SELECTED = 3
"""The first, the previous and the current block."""
_LENGTH_BYTES = 4
_STEPS_A_DOUBLING = 8
"""How often a growing state is copied while it doubles; it is at most an eighth larger than what it holds."""


@dataclass(frozen=True)
class NativeSparseAttentionConfig(MixerConfig):
    """Keys of `native_sparse_attention`.

    The three gates are given as the values they start from. While the whole context lies in the window and in the
    selected blocks, the selected and the window branch both equal the teacher's attention; gates of these two that
    sum to 1, with the compressed one near 0, therefore start at the teacher. Beyond that the selected branch sees more
    of the text and carries the most: untrained SmolLM2-135M, all layers replaced (blocks of 32, 8 selected, window
    128), is 0.12 nats from its teacher at positions 512 to 1023 with 0.95 and 0.05, and 0.27 nats with 0.7 and 0.3.

    Attributes:
        block_tokens: tokens of a block.
        selected_blocks: blocks that a query attends to token by token, the first, previous and current one included.
        window_tokens: width of the window branch, the query itself included.
        dense_below: queries at positions below this use plain causal attention, in tokens; 0: none does.
        compressed_gate, selected_gate, window_gate: gate values at the start, inside (0, 1).
        compression: "learned": the compressed key of a block is a weighted sum of its keys, with a trained weight for
            each place in the block, key head and channel; values likewise. The weights start as the mean. Or "mean".
        block_attention: weight of the loss, in training, by which the compressed probabilities of blocks are fitted to
            the student's own full attention to their tokens: what the choice of blocks learns from. 0, or a mean, finds
            less (README, "What conversions keep"); at 1 it bends the model itself.
    """

    name = "native_sparse_attention"
    summary = "attention over pooled blocks, the best blocks and a window: the cache grows, the work does not"

    block_tokens: int = 64
    selected_blocks: int = 16
    window_tokens: int = 512
    dense_below: int = 0
    compressed_gate: float = 0.02
    selected_gate: float = 0.95
    window_gate: float = 0.05
    compression: Literal["mean", "learned"] = "learned"
    block_attention: float = 0.1

    def __post_init__(self) -> None:
        self.require(self.block_tokens >= 1, "block_tokens", f"{self.block_tokens} is below 1.")
        self.require(
            self.selected_blocks >= _ALWAYS_SELECTED,
            "selected_blocks",
            f"{self.selected_blocks} is below {_ALWAYS_SELECTED}: the first, previous and current block are always in.",
        )
        self.require(self.window_tokens >= 1, "window_tokens", f"{self.window_tokens} is below 1.")
        self.require(self.dense_below >= 0, "dense_below", f"{self.dense_below} is negative.")
        for key in ("compressed_gate", "selected_gate", "window_gate"):
            value = getattr(self, key)
            self.require(0.0 < value < 1.0, key, f"{value} is not strictly between 0 and 1.")
        choices = ("mean", "learned")
        problem = f"must be one of {', '.join(choices)}, is {self.compression!r}."
        self.require(self.compression in choices, "compression", problem)
        weight = self.block_attention
        self.require(0 <= weight < math.inf, "block_attention", f"must be zero or positive, is {weight}.")

    def warnings(self, geometry: AttentionGeometry, context: int) -> list[str]:
        found = []
        covered = self.selected_blocks * self.block_tokens
        if context <= covered:
            found.append(
                f"{self.name}: {context} tokens fit into the {covered} tokens of the selected blocks, so nothing is "
                "left out and nothing is saved at this length."
            )
        largest = 64 if geometry.head_size > _LARGEST_HEAD_OF_128 else 128
        if self.block_tokens not in (16, 32, 64, 128) or self.block_tokens > largest:
            found.append(
                f"{self.name}: the kernels take block_tokens of 16, 32, 64 or 128 (64 at most for heads above "
                f"{_LARGEST_HEAD_OF_128}); with {self.block_tokens}, training and prefill cost as much as full "
                "attention or more."
            )
        return found

    def capacity(self, tokens: int) -> int:
        """Slots for tokens in a state that holds so many: whole blocks, in steps that grow with the text, so that a
        token is copied a fixed number of times however long it gets."""
        blocks = -(-tokens // self.block_tokens)
        power_of_two = 1 << max(blocks.bit_length() - 1, 0)
        step = max(1, power_of_two // _STEPS_A_DOUBLING)
        return -(-blocks // step) * step * self.block_tokens

    def state_bytes(self, geometry: AttentionGeometry, context: int, element_bytes: int) -> int:
        slots = self.capacity(context)
        pooled = slots // self.block_tokens
        key_and_value_bytes = 2 * geometry.num_key_heads * geometry.head_size * element_bytes
        return (slots + pooled) * key_and_value_bytes + _LENGTH_BYTES

    def new_parameters(self, geometry: AttentionGeometry) -> int:
        gates = 3 * geometry.num_query_heads
        pooling = 2 * self.block_tokens * geometry.num_key_heads * geometry.head_size
        return geometry.hidden_size * gates + gates + (pooling if self.compression == "learned" else 0)
