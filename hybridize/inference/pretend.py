"""States as they are after a long text, without reading one: what a step costs does not depend on what was read."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridize.inference.states import States
from hybridize.mixers.base import MixerState


@torch.no_grad()
def pretend_read(states: States, tokens: int) -> None:
    """Fills every state with random numbers, with counts and positions as after `tokens` tokens a row."""
    for state in states.layers:
        for name, tensor in state.tensors.items():
            if name == "scores":
                tensor.uniform_(0.01, 0.49)
            elif name in ("last_position", "lengths"):
                tensor.fill_(tokens - (name == "last_position"))
            elif tensor.is_floating_point():
                tensor.normal_(std=0.1)
        if "num_retained" in state.tensors:
            _pretend_retained(state, tokens)


def _pretend_retained(state: MixerState, tokens: int) -> None:
    positions: Tensor = state["retained_positions"]  # [B, H, C]
    left = max(0, tokens - (state["scores"].shape[2] - positions.shape[2]))
    held = min(left, positions.shape[2])
    places = torch.arange(positions.shape[2], device=positions.device)
    # Evenly spread over what has left the window.
    positions.copy_(torch.where(places < held, places * left // max(held, 1), -1))
    state["num_retained"].fill_(held)
