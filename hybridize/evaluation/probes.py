"""Runs the probes one after another; one that runs out of memory is marked and the others still run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hybridize.evaluation.agreement import agreement
from hybridize.evaluation.needles import KINDS
from hybridize.evaluation.perplexity import perplexity
from hybridize.evaluation.recall import make_questions, recall
from hybridize.evaluation.samples import samples
from hybridize.evaluation.scores import WindowScores, score_windows
from hybridize.evaluation.state_bytes import state_bytes
from hybridize.evaluation.windows import Window, make_windows
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import Evaluate, PerplexityProbe, RecallProbe

Row = dict[str, Any]


class _Skipped(Exception):
    """A probe that has nothing to measure; the message says why."""


@dataclass
class Probes:
    """Student and teacher, and what they are measured on.

    Attributes:
        student, teacher: causal language models in eval mode on one device; teacher None: the student alone.
        tokenizer: of both.
        settings: which probes, and how.
        documents: held-out texts.
        seed: of the needles and of the random prefill.
    """

    student: Any
    teacher: Any | None
    tokenizer: Any
    settings: Evaluate
    documents: Sequence[Document]
    seed: int = 0
    reporter: Reporter = SILENT
    _scores: dict[int, list[WindowScores]] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Any]:
        """By name, student first."""
        models = {"student": self.student, "teacher": self.teacher}
        return {name: model for name, model in models.items() if model is not None}

    def run(self) -> dict[str, Row]:
        """Every probe that the settings ask for, by name, with "status": "ok", "skipped" or "failed", and seconds."""
        settings = self.settings
        chosen: dict[str, Callable[[], Row]] = {"state_bytes": self._state_bytes}
        if settings.perplexity is not None:
            chosen["perplexity"] = self._perplexity
        if settings.agreement is not None:
            chosen["agreement"] = self._agreement
        if settings.recall is not None:
            chosen["recall"] = self._recall
        if settings.samples is not None:
            chosen["samples"] = self._samples
        return {name: self._guarded(name, probe) for name, probe in chosen.items()}

    def _guarded(self, name: str, probe: Callable[[], Row]) -> Row:
        started = time.monotonic()
        try:
            row = {"status": "ok", **probe()}
        except _Skipped as reason:
            row = {"status": "skipped", "error": str(reason)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            row = {"status": "failed", "error": "out of memory", "hint": _OUT_OF_MEMORY_HINT.format(name=name)}
            self.reporter.note(f"The {name} probe ran out of memory and is left out; {row['hint']}")
            del error
        if row["status"] == "failed":
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return {**row, "seconds": round(time.monotonic() - started, 3)}

    def _state_bytes(self) -> Row:
        with self.reporter.task("state bytes", 1) as task:
            row = state_bytes(self.models, context_tokens=self.settings.context_tokens, seed=self.seed)
            task.advance()
        return row

    def _perplexity(self) -> Row:
        probe = self.settings.perplexity
        assert probe is not None
        return perplexity(self._scored(probe.context_tokens, probe.max_windows), probe.position_edges)

    def _agreement(self) -> Row:
        probe = self.settings.agreement
        assert probe is not None
        if self.teacher is None:
            raise _Skipped("no teacher was given")
        edges = (self.settings.perplexity or PerplexityProbe()).position_edges
        return agreement(self._scored(probe.context_tokens, probe.max_windows), edges)

    def _scored(self, context_tokens: int, max_windows: int) -> list[WindowScores]:
        """Scores of the first `max_windows` windows a source; perplexity and agreement share the forward passes."""
        if not self.documents:
            raise _Skipped("no held-out documents were given")
        if context_tokens not in self._scores:
            asked = [probe for probe in (self.settings.perplexity, self.settings.agreement) if probe is not None]
            most = max(probe.max_windows for probe in asked if probe.context_tokens == context_tokens)
            windows = make_windows(self.documents, self.tokenizer, context_tokens=context_tokens, max_windows=most)
            with self.reporter.task(f"held-out text, windows of {context_tokens} tokens", len(windows)) as task:
                self._scores[context_tokens] = score_windows(
                    self.student, self.teacher, windows, batch_sequences=self.settings.batch_sequences, task=task
                )
        return _first_of_each_source(self._scores[context_tokens], max_windows)

    def _recall(self) -> Row:
        probe = self.settings.recall
        assert probe is not None
        asked = [kind for kind in probe.kinds if self.documents or not KINDS[kind].prose]
        if not asked:
            raise _Skipped("no held-out documents were given to hide needles in")
        probe = replace(probe, kinds=tuple(asked))
        prose = [document.text for document in self.documents]
        num_questions = len(probe.kinds) * len(probe.lengths) * len(probe.depths) * probe.samples
        with self.reporter.task("recall", num_questions * len(self.models)) as task:
            questions = make_questions(probe, self.tokenizer, prose, seed=self.seed)
            row = recall(
                self.models, self.tokenizer, questions, batch_sequences=self.settings.batch_sequences, task=task
            )
        left_out = [kind for kind in (self.settings.recall or RecallProbe()).kinds if kind not in asked]
        return {**row, "left_out": left_out}

    def _samples(self) -> Row:
        probe = self.settings.samples
        assert probe is not None
        with self.reporter.task("samples", len(probe.prompts) * len(self.models)) as task:
            return samples(self.models, self.tokenizer, probe, task=task)


_OUT_OF_MEMORY_HINT = (
    "lower evaluate.batch_sequences, evaluate.{name}'s lengths or windows, or set evaluate.precision: bfloat16."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _first_of_each_source(scores: Sequence[WindowScores], limit: int) -> list[WindowScores]:
    taken: dict[str, int] = {}
    chosen = []
    for score in scores:
        window: Window = score.window
        taken[window.source] = taken.get(window.source, 0) + 1
        if taken[window.source] <= limit:
            chosen.append(score)
    return chosen
