"""Gated DeltaNet: a recurrent state per query head in place of the keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.configs.base import MixerConfig

_STATE_ELEMENT_BYTES = 4
"""The recurrent state is kept in fp32 whatever the model's dtype: it sums over the whole context."""
_LONGEST_CONVOLUTION = 16


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Keys of `gated_delta_net`.

    The defaults gave the lowest held-out error of the layer output in a short alignment of SmolLM2-135M's layers 2, 10,
    18 and 26 (60 steps of 1024 tokens in sequences of 512; relative squared error, mean of the four layers; one seed):
    0.32, and 0.33 with beta in (0, 1) only. With the latter, 0.37 without the gate, 0.36 with the norm, 0.33 with RoPE.
    Where the first half-lives are longer (16 to 1024 tokens), 0.36; without the convolution then 0.41.

    Attributes:
        rope: queries and keys are rotated as in the teacher before they are normalised.
        short_convolution: taps, in tokens, of a causal convolution over q, k and v each; 0 leaves it out. It starts as
            the identity.
        output_gate: the output of each head is multiplied by 2·sigmoid(W x), which starts at 1.
        output_norm: the output of each head passes an RMSNorm before its learned scale.
        negative_eigenvalues: beta in (0, 2) instead of (0, 1), so that the state can be reflected, not only shrunk.
        own_keys: query heads that share keys and values in the teacher get copies of their own, which are trained
            apart; the state is as large as without, the tail of a convolution is not.
    """

    name = "gated_delta_net"
    summary = "linear attention by the gated delta rule: a recurrent state of constant size"
    keeps_projections = False

    rope: bool = False
    short_convolution: int = 4
    output_gate: bool = True
    output_norm: bool = False
    negative_eigenvalues: bool = True
    own_keys: bool = False

    def __post_init__(self) -> None:
        self.require(
            self.short_convolution == 0 or 2 <= self.short_convolution <= _LONGEST_CONVOLUTION,
            "short_convolution",
            f"{self.short_convolution} taps: choose 0 (none) or 2 to {_LONGEST_CONVOLUTION}.",
        )

    def state_bytes(self, geometry: AttentionGeometry, context: int, element_bytes: int) -> int:
        recurrent = geometry.num_query_heads * geometry.head_size**2 * _STATE_ELEMENT_BYTES
        tail_tokens = max(self.short_convolution - 1, 0)
        return recurrent + tail_tokens * self._convolved_width(geometry) * element_bytes

    def new_parameters(self, geometry: AttentionGeometry) -> int:
        heads, head_size = geometry.num_query_heads, geometry.head_size
        decay = geometry.hidden_size * heads + 2 * heads
        beta = geometry.hidden_size * heads + heads
        gate = geometry.hidden_size * heads * head_size if self.output_gate else 0
        rest = heads * head_size + gate + self.short_convolution * self._convolved_width(geometry)
        _, k_bias, v_bias, _ = geometry.projection_bias
        key_rows = (self._key_heads(geometry) - geometry.num_key_heads) * head_size
        return decay + beta + rest + key_rows * (2 * geometry.hidden_size + k_bias + v_bias)

    def _key_heads(self, geometry: AttentionGeometry) -> int:
        return geometry.num_query_heads if self.own_keys else geometry.num_key_heads

    def _convolved_width(self, geometry: AttentionGeometry) -> int:
        return (geometry.num_query_heads + 2 * self._key_heads(geometry)) * geometry.head_size
