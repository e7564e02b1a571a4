"""Student and teacher on the same windows, once: what perplexity and agreement are both made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hybridize.errors import NumbersError
from hybridize.evaluation.windows import Window
from hybridize.progress import Task

CHUNK_ELEMENTS = 2**24
"""Logits held at a time for each model, in elements (64 MiB in fp32), whatever the vocabulary and the window."""


@dataclass(frozen=True)
class WindowScores:
    """Scores of one window; every tensor is [T - 1], entry i belongs to the token at position i + 1.

    Attributes:
        student, teacher: negative log-likelihood of the token, in nats, float64; teacher None without a teacher.
        kl: KL(teacher || student) of the distributions before the token, in nats, float64.
        same_top: whether both find the same next token likeliest, 0 or 1, float64.
    """

    window: Window
    student: Tensor
    teacher: Tensor | None
    kl: Tensor | None
    same_top: Tensor | None


def score_windows(
    student: Any, teacher: Any | None, windows: Sequence[Window], *, batch_tokens: int, task: Task
) -> list[WindowScores]:
    """Scores every window, in the order given. One forward pass a model and batch; windows of equal length share one.

    Raises:
        NumbersError: a model's logits are not finite.
    """
    scores: list[WindowScores] = []
    with torch.inference_mode():
        for batch in window_batches(windows, batch_tokens):
            scores += _score_batch(student, teacher, batch)
            task.advance(len(batch))
    return scores


def window_batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Neighbouring windows of equal length, at most `batch_tokens` together; one window at least."""
    for length, run in groupby(windows, key=lambda window: len(window.tokens)):
        group = list(run)
        size = max(1, batch_tokens // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _score_batch(student: Any, teacher: Any | None, batch: list[Window]) -> list[WindowScores]:
    tokens = torch.tensor([window.tokens for window in batch], device=student.device)  # [B, T]
    hidden_s = _hidden(student, tokens)
    hidden_t = None if teacher is None else _hidden(teacher, tokens)
    chunk = max(1, CHUNK_ELEMENTS // (student.config.vocab_size * len(batch)))
    parts = []
    for start in range(0, tokens.shape[1] - 1, chunk):
        span = slice(start, min(start + chunk, tokens.shape[1] - 1))
        log_p = _log_probabilities(student, hidden_s[:, span], batch)
        labels = tokens[:, span.start + 1 : span.stop + 1]
        rows = [-_pick(log_p, labels)]
        if teacher is not None and hidden_t is not None:
            log_q = _log_probabilities(teacher, hidden_t[:, span], batch)
            rows += [
                -_pick(log_q, labels),
                torch.sum(log_q.exp() * (log_q - log_p), dim=-1),
                (log_q.argmax(-1) == log_p.argmax(-1)).float(),
            ]
        parts.append(torch.stack(rows).cpu().double())  # [1 or 4, B, span]
    joined = torch.cat(parts, dim=-1)
    if teacher is None:
        return [WindowScores(window, joined[0, i], None, None, None) for i, window in enumerate(batch)]
    return [WindowScores(window, *joined[:, i].unbind(0)) for i, window in enumerate(batch)]


def _hidden(model: Any, tokens: Tensor) -> Tensor:
    """[B, T, hidden_size], the input of the head."""
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def _log_probabilities(model: Any, hidden: Tensor, batch: list[Window]) -> Tensor:
    log_p = torch.log_softmax(model.lm_head(hidden).float(), dim=-1)
    if not torch.isfinite(log_p).all():
        names = ", ".join(sorted({window.document for window in batch}))
        raise NumbersError(
            "The logits are not finite.",
            where=f"{type(model).__name__} on {names}",
            hint="Run `hybridize verify` on the model; if its weights are finite, try evaluate.precision: float32.",
        )
    return log_p


def _pick(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
