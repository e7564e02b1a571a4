"""Gated DeltaNet: see `hybridize.mixers.gated_delta_net`. Decay, beta and output gate are part of the projection."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hybridize.inference.steps.base import AttentionStep, Moment, heads_of
from hybridize_kernels import gated_delta_rule_step, short_convolution_step


class GatedDeltaNetStep(AttentionStep):
    """See the module."""

    def own_projections(self) -> Sequence[nn.Linear]:
        new = self.attention.new
        return [new.decay, new.beta, *([] if new.output_gate is None else [new.output_gate])]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor], moment: Moment) -> Tensor:
        new, config, state = self.attention.new, self.attention.config, self.state
        decay, beta, *gate = own
        if config.short_convolution:
            taps = new.q_taps, new.k_taps, new.v_taps
            q, k, v = short_convolution_step((q, k, v), taps, state["tail"], moment.real)
        return gated_delta_rule_step(
            q,
            k,
            v,
            decay,
            beta,
            state["recurrent"],
            scale=1.0,
            normalize_qk=True,
            decay_rate=new.decay_rate,
            decay_bias=new.decay_bias,
            beta_ceiling=new.beta_ceiling,
            real=moment.real,
            norm_epsilon=new.norm_epsilon,
            output_scale=new.output_scale,
            gate=heads_of(gate[0], self.head_size) if gate else None,
            rotary=moment.rotary if config.rope else None,
        )
