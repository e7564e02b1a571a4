"""Whether native sparse attention selects the blocks that the teacher attends to, and how its branches are weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.evaluation.inside.blocks import attention_mass, compressed_importance, selected
from hybridize.evaluation.inside.layers import Layer, layers_of, layers_with, listening, queries_and_keys
from hybridize.evaluation.parts import Row
from hybridize.evaluation.scores import window_batches
from hybridize.evaluation.windows import Window
from hybridize.mixers.base import Rope
from hybridize.mixers.native_sparse_attention import BRANCHES

SHARES = ("mass", "best", "always")
MOST_QUERIES = 64
"""Looked at in each text, evenly spread over those whose window does not reach the beginning."""


class _Heard:
    """One layer of the student, and the same layer of the teacher, gathered over forward passes."""

    def __init__(self, student: Layer, teacher: Layer | None) -> None:
        self.student, self.teacher = student, teacher
        self.config = student.attention.config
        heads = student.view.geometry.num_key_heads
        self.sums = {name: torch.zeros(heads, dtype=torch.float64) for name in (*SHARES, "total")}
        self.branch_gates = torch.zeros(heads, len(BRANCHES), dtype=torch.float64)
        self.tokens = 0
        self._masses: list[Tensor] = []  # [H, n, blocks] of each row of the batch at hand

    def hear_teacher(self, hidden_states: Tensor, rope: Rope) -> None:
        """Notes what the teacher attends to outside the student's window."""
        assert self.teacher is not None
        view = self.teacher.view
        positions = self._positions(hidden_states)
        q, k = queries_and_keys(view, hidden_states, rope)
        self._masses = [
            attention_mass(
                queries[positions],
                keys,
                positions,
                scale=view.scale,
                block_tokens=self.config.block_tokens,
                window=self.config.window_tokens,
                own_window=view.geometry.windows[self.teacher.index],
            )
            for queries, keys in zip(q, k, strict=True)
        ]

    def hear_student(self, hidden_states: Tensor, rope: Rope) -> None:
        """Holds what the student selects against it, and adds up its gates."""
        mixer, view = self.student.attention, self.student.view
        gates = mixer.new(hidden_states).flatten(0, 1).double().sum(0)  # [HQ, 3]
        self.branch_gates += gates.unflatten(0, (view.geometry.num_key_heads, -1)).mean(1).cpu()
        self.tokens += hidden_states.shape[:2].numel()
        if not self._masses:
            return
        positions = self._positions(hidden_states)
        q, k = queries_and_keys(view, hidden_states, rope)
        for queries, keys, mass in zip(q, k, self._masses, strict=True):
            by_student = compressed_importance(
                queries[positions],
                keys,
                positions,
                scale=view.scale,
                block_tokens=self.config.block_tokens,
                pooling=mixer.new.key_pooling,
            )
            count = self.config.selected_blocks
            self.sums["mass"] += self._inside(by_student, mass, positions, count)
            self.sums["best"] += self._inside(mass, mass, positions, count)
            self.sums["always"] += self._inside(mass, mass, positions, 0)
            self.sums["total"] += mass.double().sum((1, 2)).cpu()
        self._masses = []

    def row(self) -> Row:
        """Of each key head; shares are None without a teacher, and where no text is longer than the window."""
        heads = []
        for head, total in enumerate(self.sums["total"].tolist()):
            shares = {name: float(self.sums[name][head]) / total if total > 0 else None for name in SHARES}
            means = (self.branch_gates[head] / self.tokens).tolist()
            heads.append({**shares, "gates": dict(zip(BRANCHES, means, strict=True))})
        return {"index": self.student.index, "heads": heads}

    def _inside(self, goes_by: Tensor, mass: Tensor, positions: Tensor, count: int) -> Tensor:
        """[H], the mass in the blocks that are selected by these numbers [H, n, blocks]."""
        chosen = selected(goes_by, positions, block_tokens=self.config.block_tokens, count=count)
        return mass.double().masked_fill(~chosen, 0.0).sum((1, 2)).cpu()

    def _positions(self, hidden_states: Tensor) -> Tensor:
        first = max(self.config.window_tokens, self.config.dense_below)
        return spread(first, hidden_states.shape[1], MOST_QUERIES).to(hidden_states.device)


def selection(student: Any, teacher: Any | None, windows: Sequence[Window], *, batch_tokens: int) -> Row | None:
    """The teacher's attention in the blocks that the student selects, by layer and key head; None without such layers.

    Teacher and student read the same texts, each with its own queries and keys. Of the teacher's attention only what
    lies outside the student's window counts, the query heads of a key head together.

    Returns:
        "layers": index and "heads": "mass", the share of it that lies in the selected blocks; "best", in the blocks
        that the same rule selects if it goes by this attention itself; "always", in the first, previous and current
        block, which are selected whatever the student goes by; "gates", means of the three branches over tokens and
        query heads. "texts" and "tokens", what was read in all.
    """
    layers = layers_with(student, "native_sparse_attention")
    if not layers:
        return None
    theirs: list[Layer] | None = None if teacher is None else layers_of(teacher)
    heard = [_Heard(layer, None if theirs is None else theirs[layer.index]) for layer in layers]
    with torch.inference_mode():
        for batch in window_batches(windows, batch_tokens):
            tokens = torch.tensor([window.tokens for window in batch], device=student.device)
            if teacher is not None:
                with listening(teacher, {layer.student.index: layer.hear_teacher for layer in heard}):
                    teacher.model(input_ids=tokens, use_cache=False)
            with listening(student, {layer.student.index: layer.hear_student for layer in heard}):
                student.model(input_ids=tokens, use_cache=False)
    return {
        "layers": [layer.row() for layer in heard],
        "texts": len(windows),
        "tokens": sum(len(window.tokens) for window in windows),
    }


def spread(first: int, end: int, count: int) -> Tensor:
    """At most `count` whole numbers from first to end - 1, evenly spread, both ends included; int64."""
    if first >= end:
        return torch.zeros(0, dtype=torch.int64)
    return torch.linspace(first, end - 1, min(count, end - first), dtype=torch.float64).round().long()
