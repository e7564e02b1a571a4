"""What the steps of all layers share: where the rows are, and projections that are one product."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridize.errors import UsageError
from hybridize.inference.states import RowStates
from hybridize.mixers.base import MixerState
from hybridize_kernels import norm_linear, rms_norm


class Moment(NamedTuple):
    """Where the rows are in one step.

    Attributes:
        positions: [B, 1] int64, of the token that each row reads; −1: the row stays as it is.
        real: [B, 1] bool, positions >= 0.
        rotary: cos and sin [B, 1, R].
    """

    positions: Tensor
    real: Tensor
    rotary: tuple[Tensor, Tensor]


_JOINED = "_hybridize_joined"
"""Of the first of several linear layers: the tensor that all their weights are rows of."""
ALIGNED = 16
"""Outputs of a joined product are a multiple of this: a library's product of others is several times slower."""


class FusedLinear:
    """Linear layers that read one input, as one product. Their weights become views of its own: nothing is held twice.

    Args:
        modules: of one input size and dtype, at least one.

    Raises:
        UsageError: one is no plain linear layer: an adapter that is not merged, or quantised.
    """

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        for module in modules:
            if type(module) is not nn.Linear:
                raise UsageError(
                    f"a projection is a {type(module).__name__}, which decoding cannot join with others.",
                    hint="Merge the adapters first: hybridize export, or peft's merge_and_unload.",
                )
        self.sizes = [module.out_features for module in modules]
        self.padding = 0 if len(modules) == 1 else -sum(self.sizes) % ALIGNED
        self.weight = _joined(modules, self.padding)
        self.bias: Tensor | None = None
        if any(module.bias is not None for module in modules):
            self.bias = self.weight.new_zeros(len(self.weight))
            for module, part in zip(modules, torch.split(self.bias[: sum(self.sizes)], self.sizes), strict=True):
                if module.bias is not None:
                    part.copy_(module.bias.detach())

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """x [B, in] -> [B, sum of sizes, and padding]; options as of `norm_linear`."""
        return norm_linear(x, self.weight, bias=self.bias, **options)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """What the call gave -> [B, 1, size] each."""
        return torch.split(y[:, None, : sum(self.sizes)], self.sizes, dim=-1)


class AttentionStep(ABC):
    """From a layer's projections to its heads' outputs.

    Attributes:
        projections: what reads the layer's normed input; queries, keys and values first.
        output: the projection of the heads' outputs.
    """

    def __init__(self, attention: Any, qk_norm: bool, state: MixerState) -> None:
        self.attention, self.qk_norm, self.state = attention, qk_norm, state
        self.head_size = int(getattr(attention, "head_dim", 0) or attention.geometry.head_size)
        self.scale = float(getattr(attention, "scaling", 0.0) or attention.scale)
        own = self.own_projections()
        self.projections = FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj, *own])
        self.output = FusedLinear([attention.o_proj])

    @classmethod
    def takes(cls, attention: Any) -> bool:
        """Whether this step covers the mixer's configuration."""
        return True

    def own_projections(self) -> Sequence[nn.Linear]:
        """What else reads the layer's input."""
        return ()

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor], moment: Moment) -> Tensor:
        """Takes the token into the state and attends from it.

        Args:
            q: [B, 1, HQ, D]. k, v: [B, 1, H, D]; before RoPE, perhaps slices of one projection.
            own: [B, 1, size], of `own_projections`.

        Returns:
            [B, 1, HQ, D].
        """

    def __call__(self, x: Tensor, norm: Any, moment: Moment) -> Tensor:
        """x [B, width], the residual stream -> the same with what attention adds to it; x is lost."""
        projected = self.projections(x, norm_weight=norm.weight, epsilon=norm.variance_epsilon)
        q, k, v, *own = self.projections.split(projected)
        q, k, v = (heads_of(part, self.head_size) for part in (q, k, v))
        if self.qk_norm:
            q, k = (
                rms_norm(part, norm_of.weight, epsilon=norm_of.variance_epsilon)
                for part, norm_of in ((q, self.attention.q_norm), (k, self.attention.k_norm))
            )
        out = self.attend(q, k, v, own, moment)
        return self.output(out.flatten(1), residual=x, overwrites_residual=True)


class MixerAsItIs:
    """A mixer that has no step of its own: its `forward` with one token."""

    def __init__(self, mixer: Any, state: MixerState) -> None:
        self.mixer, self.state = mixer, state

    def __call__(self, x: Tensor, norm: Any, moment: Moment) -> Tensor:
        # Some row has a past, and none is taken for a whole text; how long it is, its tensors say.
        state = copy.copy(self.state)
        state.seen_tokens = 1
        layers = [state] * (self.mixer.layer_idx + 1)
        out, _ = self.mixer(
            hidden_states=norm(x)[:, None],
            position_embeddings=moment.rotary,
            cache=RowStates(layers),
            token_positions=moment.positions,
        )
        summed: Tensor = x + out[:, 0]
        return summed


def heads_of(x: Tensor, size: int) -> Tensor:
    """x [B, 1, heads · size] -> [B, 1, heads, size], a view."""
    return x.view(*x.shape[:2], x.shape[2] // size, size)


def _joined(modules: Sequence[nn.Linear], padding: int) -> Tensor:
    weights = [module.weight for module in modules]
    if len(weights) == 1:
        return weights[0].detach()
    known: Tensor | None = getattr(modules[0], _JOINED, None)
    if known is not None and _lie_in(known, weights):
        return known  # another engine has joined them
    parts = [weight.detach().to(weights[0].dtype) for weight in weights]
    whole = torch.cat([*parts, *([parts[0].new_zeros(padding, parts[0].shape[1])] if padding else [])])
    start = 0
    for weight in weights:
        if weight.dtype == whole.dtype:
            weight.data = whole[start : start + len(weight)]
        start += len(weight)
    setattr(modules[0], _JOINED, whole)
    return whole


def _lie_in(whole: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the weights are the rows of it, in order."""
    start = whole.data_ptr()
    for weight in weights:
        if weight.data_ptr() != start or weight.dtype != whole.dtype or weight.device != whole.device:
            return False
        start += weight.numel() * weight.element_size()
    return True
