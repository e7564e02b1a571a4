"""Gated DeltaNet: attention replaced by a recurrent state that is decayed, corrected and read once a token.

For each query head, with unit q and k:

    S_t = a_t (I − b_t k_t k_tᵀ) S_{t−1} + b_t k_t v_tᵀ,    o_t = S_tᵀ q_t

Source: Yang et al., Gated Delta Networks, https://arxiv.org/abs/2412.06464, eq. 10. Unlike the paper, q and k pass the
teacher's norms, grouped keys and values are shared as in the teacher unless the heads get their own, the convolution
starts as the identity and no activation follows it, the gate starts at 1, and the half-lives of the heads start spread
out or, with `calibrate`, where text puts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from hybridize.families.base import AttentionGeometry, AttentionView
from hybridize.mixers.base import Mixer, MixerState, Rope
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.gated_delta_net import GatedDeltaNetConfig
from hybridize.mixers.parts.documents import document_positions
from hybridize.mixers.parts.gate_calibration import CANDIDATES, ChannelFit, GateFit, softmax_heads
from hybridize.mixers.parts.own_keys import with_own_keys
from hybridize.mixers.parts.slots import make_writable
from hybridize_kernels import (
    delta_gates,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_rms_norm,
    short_convolution,
    short_convolution_step,
    short_convolutions,
)

SHORTEST_HALF_LIFE_TOKENS = 1.0
LONGEST_HALF_LIFE_TOKENS = 256.0
_INITIAL_BETA = 0.5
_NORM_EPSILON = 1e-6
STEP_TOKENS = 16
"""Without a gradient, up to so many tokens are walked one by one, and the state is updated in place."""


class GatedDeltaNetParameters(nn.Module):
    """What the teacher does not have. No name here ends like a projection of the teacher, lest LoRA take it for one.

    Attributes:
        decay: hidden_size -> HQ; with `decay_bias` and `decay_rate` [HQ] it gives
            log a_t = −exp(decay_rate) · softplus(decay(x_t) + decay_bias).
        beta: hidden_size -> HQ, through a sigmoid.
        output_scale: [HQ, D].
        output_gate: hidden_size -> HQ·D, or None.
        q_taps, k_taps, v_taps: [channels, taps], the newest token last; or None.
    """

    def __init__(self, config: GatedDeltaNetConfig, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.config = config
        width, heads, head_size = geometry.hidden_size, geometry.num_query_heads, geometry.head_size
        self.decay = nn.Linear(width, heads, bias=False)
        self.decay_bias = nn.Parameter(torch.empty(heads))
        self.decay_rate = nn.Parameter(torch.empty(heads))
        self.beta = nn.Linear(width, heads)
        self.output_scale = nn.Parameter(torch.empty(heads, head_size))
        self.output_gate = nn.Linear(width, heads * head_size, bias=False) if config.output_gate else None
        taps = config.short_convolution
        channels = (heads * head_size, geometry.num_key_heads * head_size)
        self.q_taps = nn.Parameter(torch.empty(channels[0], taps)) if taps else None
        self.k_taps = nn.Parameter(torch.empty(channels[1], taps)) if taps else None
        self.v_taps = nn.Parameter(torch.empty(channels[1], taps)) if taps else None

    @torch.no_grad()
    def initialise(self) -> None:
        """Half-lives spread geometrically over the heads, beta at its start, gate at 1, convolutions the identity."""
        if self.output_gate is not None:
            nn.init.zeros_(self.output_gate.weight)
        longest, shortest = math.log(LONGEST_HALF_LIFE_TOKENS), math.log(SHORTEST_HALF_LIFE_TOKENS)
        half_lives = torch.linspace(shortest, longest, len(self.decay_rate)).exp()
        self.set_gates(half_lives, torch.full_like(half_lives, _INITIAL_BETA))
        nn.init.ones_(self.output_scale)
        for taps in (self.q_taps, self.k_taps, self.v_taps):
            if taps is not None:
                nn.init.zeros_(taps)
                taps[:, -1] = 1.0

    @torch.no_grad()
    def set_gates(self, half_lives: Tensor, betas: Tensor) -> None:
        """Half-lives in tokens and corrections, each [HQ], whatever the input."""
        for linear in (self.decay, self.beta):
            nn.init.zeros_(linear.weight)
        # softplus(0) = ln 2, so that a half-life h is simply decay_rate = −ln h.
        nn.init.zeros_(self.decay_bias)
        self.decay_rate.copy_(-half_lives.log())
        self.beta.bias.copy_(torch.logit(betas / self.beta_ceiling))

    @property
    def beta_ceiling(self) -> float:
        return 2.0 if self.config.negative_eigenvalues else 1.0

    @property
    def norm_epsilon(self) -> float | None:
        return _NORM_EPSILON if self.config.output_norm else None

    def gates(self, hidden_states: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """log a and b, each [B, T, HQ] fp32; both 0 where `real` [B, T] is False, which leaves the state untouched."""
        return delta_gates(
            hidden_states,
            self.decay.weight,
            self.decay_bias,
            self.decay_rate,
            self.beta.weight,
            self.beta.bias,
            beta_ceiling=self.beta_ceiling,
            real=real,
        )

    def gate_of(self, hidden_states: Tensor) -> Tensor | None:
        """The output gate before its sigmoid, [B, T, HQ, D], or None."""
        if self.output_gate is None:
            return None
        gate: Tensor = self.output_gate(hidden_states).view(*hidden_states.shape[:-1], *self.output_scale.shape)
        return gate

    def finish(self, out: Tensor, hidden_states: Tensor) -> Tensor:
        """Norm, scale and gate of the outputs [B, T, HQ, D], in their dtype even where the parameters are wider."""
        return gated_rms_norm(out, self.output_scale, self.gate_of(hidden_states), epsilon=self.norm_epsilon)


class GatedDeltaNet(Mixer):
    """See the module. State: [B, HQ, D, D] fp32, and the last tokens of q, k and v where there is a convolution."""

    config_class = GatedDeltaNetConfig

    @classmethod
    def from_attention(cls, view: AttentionView, config: MixerConfig) -> Self:
        own_keys = isinstance(config, GatedDeltaNetConfig) and config.own_keys
        return super().from_attention(with_own_keys(view) if own_keys else view, config)

    def build_new(self) -> nn.Module:
        return GatedDeltaNetParameters(self.config, self.geometry)

    def initialise_new(self) -> None:
        self.new.initialise()

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        rope: Rope,
        state: MixerState | None,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        real = positions >= 0 if self.padded else None
        if state is not None:
            make_writable(state.tensors)
            if q.shape[1] <= STEP_TOKENS and not torch.is_grad_enabled():
                return self._step(q, k, v, hidden_states, rope, state, real), {}
        if self.config.short_convolution:
            q, k, v = self._convolve(q, k, v, state, real, cu_seqlens)
        elif real is not None:  # padding may hold anything, and 0 · NaN is NaN; a convolution leaves zeros there
            q, k, v = (torch.where(real[..., None, None], x, 0.0) for x in (q, k, v))
        if self.config.rope:
            q, k = rope(q, k)
        log_decay, beta = self.new.gates(hidden_states, real)
        # Query head n reads key head n // G, as in the teacher: the op takes grouped heads as they are.
        out, recurrent = gated_delta_rule(
            q,
            k,
            v,
            log_decay,
            beta,
            scale=1.0,
            initial_state=None if state is None else state["recurrent"],
            output_final_state=state is not None,
            normalize_qk=True,
            cu_seqlens=cu_seqlens,
        )
        if state is not None and recurrent is not None:
            _put(state, "recurrent", recurrent)
        out = self.new.finish(out, hidden_states)
        return out if real is None else torch.where(real[..., None, None], out, 0.0), {}

    @torch.no_grad()
    def calibrate(self, calls: Sequence[Mapping[str, Any]]) -> None:
        """Sets the new parameters to what comes nearest to the teacher's heads, a head at a time.

        Half-life and beta are the best of a grid, the scale of the output is that of least squares, and the output gate
        tells by a regression on the input how much a head says: a query that looks at the first token says little.

        Args:
            calls: arguments of `forward`, a sequence each; the projections must be the teacher's still.
        """
        new = self.new
        heads = [self._heads(**call) for call in calls]
        new.initialise()

        def fit() -> ChannelFit:
            found = ChannelFit()
            for inputs, wanted in heads:
                found.add(self.mix(**inputs)[0], wanted)
            return found

        errors = []
        for half_life, beta in CANDIDATES:
            new.set_gates(*(torch.full_like(new.decay_rate, value) for value in (half_life, beta)))
            errors.append(fit().error())
        best = torch.tensor(CANDIDATES, device=new.decay_rate.device)[torch.stack(errors).argmin(dim=0)]
        new.set_gates(*best.T)
        new.output_scale.copy_(fit().scale())
        if new.output_gate is not None:
            gate = GateFit()
            for inputs, wanted in heads:
                gate.add(inputs["hidden_states"], self.mix(**inputs)[0], wanted)
            new.output_gate.weight.copy_(gate.weight().repeat_interleave(self.geometry.head_size, dim=0))

    def _heads(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], cu_seqlens: Tensor | None = None
    ) -> tuple[dict[str, Any], Tensor]:
        """The arguments of `mix` for a sequence, and what the teacher's heads make of it [B, T, HQ, D]."""
        batch, num_tokens, _ = hidden_states.shape
        projected = self.project(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.view(batch, num_tokens, -1, self.geometry.head_size) for x in projected)
        q, k = self.normed(q, k, v)
        rope = Rope(*position_embeddings)
        positions = torch.arange(num_tokens, device=q.device).expand(batch, -1)
        if cu_seqlens is not None:
            positions = document_positions(cu_seqlens, num_tokens)
        self.padded = False
        inputs = {"q": q, "k": k, "v": v, "hidden_states": hidden_states, "rope": rope, "state": None}
        wanted = softmax_heads(
            *rope(q, k), v, positions, scale=self.scale, window=self.geometry.windows[self.layer_idx]
        )
        return {**inputs, "positions": positions, "cu_seqlens": cu_seqlens}, wanted

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        rope: Rope,
        state: MixerState,
        real: Tensor | None,
    ) -> Tensor:
        """A few tokens, with gates, state, norm and output gate in one launch after the convolutions'."""
        new = self.new
        if self.config.short_convolution:
            q, k, v = short_convolution_step((q, k, v), (new.q_taps, new.k_taps, new.v_taps), state["tail"], real)
        if self.config.rope:
            q, k = rope(q, k)
        return gated_delta_rule_step(
            q,
            k,
            v,
            new.decay(hidden_states),
            new.beta(hidden_states),
            state["recurrent"],
            scale=1.0,
            normalize_qk=True,
            decay_rate=new.decay_rate,
            decay_bias=new.decay_bias,
            beta_ceiling=new.beta_ceiling,
            real=real,
            norm_epsilon=new.norm_epsilon,
            output_scale=new.output_scale,
            gate=new.gate_of(hidden_states),
        )

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        heads, head_size = self.geometry.num_query_heads, self.geometry.head_size
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {"recurrent": torch.zeros(batch, heads, head_size, head_size, device=device, dtype=wide)}
        if self.config.short_convolution:
            channels = (heads + 2 * self.geometry.num_key_heads) * head_size
            tail_tokens = self.config.short_convolution - 1
            tensors["tail"] = torch.zeros(batch, tail_tokens, channels, device=device, dtype=dtype)
        return MixerState(tensors)

    def _convolve(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MixerState | None,
        real: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Causal convolution over the real tokens of each row; padding between them is stepped over."""
        xs, taps = (q, k, v), (self.new.q_taps, self.new.k_taps, self.new.v_taps)
        if state is None:
            first, second, third = short_convolutions(xs, taps, real=real, cu_seqlens=cu_seqlens)
            return first, second, third
        tail = state["tail"]
        parts = tail.split([weight.shape[0] for weight in taps], dim=2)
        results = [
            short_convolution(x, weight, tail=part, real=real, output_tail=True)
            for x, weight, part in zip(xs, taps, parts, strict=True)
        ]
        _put(state, "tail", torch.cat([after for _, after in results if after is not None], dim=2).to(tail.dtype))
        first, second, third = (y for y, _ in results)
        return first, second, third


def _put(state: MixerState, name: str, value: Tensor) -> None:
    """In place, for whoever has captured the memory of the state; a gradient needs what was there before."""
    if torch.is_grad_enabled():
        state[name] = value
    else:
        state[name].copy_(value)
