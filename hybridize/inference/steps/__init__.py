"""A decoding step of one layer in as few launches as there are: one file a mixer, and any other mixer as it is."""

from __future__ import annotations

from typing import Any

from hybridize.families.base import FamilyAdapter
from hybridize.inference.steps.base import AttentionStep, MixerAsItIs
from hybridize.inference.steps.full_attention import FullAttentionStep
from hybridize.inference.steps.gated_delta_net import GatedDeltaNetStep
from hybridize.inference.steps.native_sparse_attention import NativeSparseAttentionStep
from hybridize.inference.steps.sliding_window import SlidingWindowStep
from hybridize.inference.steps.token_eviction import TokenEvictionStep
from hybridize.mixers.base import Mixer, MixerState

__all__ = ["attention_step"]

_STEPS: dict[str, type[AttentionStep]] = {
    "sliding_window": SlidingWindowStep,
    "token_eviction": TokenEvictionStep,
    "gated_delta_net": GatedDeltaNetStep,
    "native_sparse_attention": NativeSparseAttentionStep,
}


def attention_step(attention: Any, adapter: FamilyAdapter, state: MixerState) -> AttentionStep | MixerAsItIs:
    """The step of an attention module or mixer over its state."""
    if not isinstance(attention, Mixer):
        return FullAttentionStep(attention, adapter.qk_norm, state)
    step = _STEPS.get(attention.config.name)
    if step is None or not step.takes(attention):
        return MixerAsItIs(attention, state)
    return step(attention, attention.q_norm is not None, state)
