"""The gates of the gated delta rule on real text: how long each head remembers, and how strongly it writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.evaluation.inside.layers import Layer, layers_with, listening
from hybridize.evaluation.parts import Row
from hybridize.evaluation.scores import window_batches
from hybridize.evaluation.windows import Window
from hybridize.mixers.base import Rope

LONGEST_HALF_LIFE_TOKENS = 1e6
"""What a head that hardly forgets is said to have: decays this near to 1 differ by rounding alone."""
MOST_TOKENS = 1024
"""Looked at in each text, evenly spread: the median wants them all at once."""


class _Heard:
    """Gates of one layer, gathered over forward passes."""

    def __init__(self, layer: Layer) -> None:
        self._parameters = layer.attention.new
        self.index = layer.index
        self.log_decay: list[Tensor] = []  # [n, HQ] each
        self.beta: list[Tensor] = []
        self.output_gate: list[Tensor] = []

    def __call__(self, hidden_states: Tensor, rope: Rope) -> None:
        some = hidden_states[:, :: -(-hidden_states.shape[1] // MOST_TOKENS)]
        log_decay, beta = self._parameters.gates(some, None)
        self.log_decay.append(log_decay.flatten(0, 1).float().cpu())
        self.beta.append(beta.flatten(0, 1).float().cpu())
        gate = self._parameters.gate_of(some)
        if gate is not None:
            self.output_gate.append(torch.sigmoid(gate.float()).mean(-1).flatten(0, 1).cpu())

    def heads(self) -> list[Row]:
        """Of each query head."""
        log_decay, beta = torch.cat(self.log_decay), torch.cat(self.beta)
        least = math.log(2) / LONGEST_HALF_LIFE_TOKENS
        half_life = math.log(2) / (-log_decay).clamp(min=least)
        columns = {
            "half_life_tokens": half_life.median(0).values.tolist(),
            "decay": log_decay.exp().mean(0).tolist(),
            "beta": beta.mean(0).tolist(),
            "output_gate": torch.cat(self.output_gate).mean(0).tolist() if self.output_gate else [None] * beta.shape[1],
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def gates(student: Any, windows: Sequence[Window], *, batch_tokens: int) -> Row | None:
    """Decay, beta and output gate over the tokens of the texts, by layer and query head; None without such layers.

    Returns:
        "layers": index and "heads": "half_life_tokens", the median over tokens of ln 2 / −log a, at most
        `LONGEST_HALF_LIFE_TOKENS`; "decay" and "beta", means of a and b (arXiv 2412.06464, eq. 10); "output_gate", mean
        of the sigmoid over tokens and channels (1/2 lets the output through as it is), None where there is none.
        "tokens": how many were looked at.
    """
    heard = [_Heard(layer) for layer in layers_with(student, "gated_delta_net")]
    if not heard:
        return None
    with torch.inference_mode(), listening(student, {layer.index: layer for layer in heard}):
        for batch in window_batches(windows, batch_tokens):
            tokens = torch.tensor([window.tokens for window in batch], device=student.device)
            student.model(input_ids=tokens, use_cache=False)
    return {
        "layers": [{"index": layer.index, "heads": layer.heads()} for layer in heard],
        "tokens": sum(len(part) for part in heard[0].log_decay),
    }
