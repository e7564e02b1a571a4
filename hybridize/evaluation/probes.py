"""Runs the probes one after another; one that runs out of memory is marked and the others still run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hybridize.evaluation.agreement import agreement
from hybridize.evaluation.batches import default_batch_tokens
from hybridize.evaluation.continuation import continuation
from hybridize.evaluation.items import Item
from hybridize.evaluation.perplexity import perplexity
from hybridize.evaluation.recall import recall
from hybridize.evaluation.samples import samples
from hybridize.evaluation.scores import WindowScores, score_windows
from hybridize.evaluation.speed import speed
from hybridize.evaluation.state_bytes import state_bytes
from hybridize.evaluation.tasks import PROSE_TASKS, make_items
from hybridize.evaluation.windows import Window, make_windows
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.documents import Document, read_documents
from hybridize.recipe.probes import BaselinesProbe, Evaluate, PerplexityProbe, RecallProbe

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
        base: folder that relative paths in the settings start from.
        offline: Hub data sets are taken from the cache only.
        seed: of everything that is drawn.
    """

    student: Any
    teacher: Any | None
    tokenizer: Any
    settings: Evaluate
    documents: Sequence[Document]
    base: Path = Path()
    offline: bool = False
    seed: int = 0
    reporter: Reporter = SILENT
    _scores: dict[int, list[WindowScores]] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Any]:
        """By name, student first."""
        models = {"student": self.student, "teacher": self.teacher}
        return {name: model for name, model in models.items() if model is not None}

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens that go through a model at once."""
        return self.settings.batch_tokens or default_batch_tokens([*self.models.values()], self.student.device)

    def run(self) -> dict[str, Row]:
        """Every probe that the settings ask for, by name, with "status": "ok", "skipped" or "failed", and seconds."""
        probes: dict[str, Callable[[Any], Row]] = {
            "perplexity": self._perplexity,
            "agreement": self._agreement,
            "recall": self._recall,
            "reading": self._reading,
            "choices": self._choices,
            "continuation": self._continuation,
            "ablation": self._ablation,
            "inside": self._inside,
            "baselines": self._baselines,
            "harness": self._harness,
            "samples": self._samples,
            "speed": self._speed,  # the last: it joins the models' projections
        }
        rows = {"state_bytes": self._guarded("state_bytes", self._state_bytes, None)}
        for name, probe in probes.items():
            settings = getattr(self.settings, name)
            if settings is not None:
                rows[name] = self._guarded(name, probe, settings)
        return rows

    def _guarded(self, name: str, probe: Callable[[Any], Row], settings: Any) -> Row:
        started = time.monotonic()
        try:
            row = {"status": "ok", **probe(settings)}
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

    # What models say of text.

    def _perplexity(self, settings: Any) -> Row:
        return perplexity(self._scored(settings.context_tokens, settings.max_windows), settings.position_edges)

    def _agreement(self, settings: Any) -> Row:
        self._require_teacher()
        edges = (self.settings.perplexity or PerplexityProbe()).position_edges
        return agreement(self._scored(settings.context_tokens, settings.max_windows), edges)

    def _scored(self, context_tokens: int, max_windows: int) -> list[WindowScores]:
        """Scores of the first `max_windows` windows a source; perplexity and agreement share the forward passes."""
        if context_tokens not in self._scores:
            asked = [probe for probe in (self.settings.perplexity, self.settings.agreement) if probe is not None]
            most = max(probe.max_windows for probe in asked if probe.context_tokens == context_tokens)
            windows = self._windows(context_tokens, most)
            with self.reporter.task(f"held-out text, windows of {context_tokens} tokens", len(windows)) as task:
                self._scores[context_tokens] = score_windows(
                    self.student, self.teacher, windows, batch_tokens=self.batch_tokens, task=task
                )
        return _first_of_each_source(self._scores[context_tokens], max_windows)

    def _windows(self, context_tokens: int, max_windows: int) -> list[Window]:
        self._require_documents()
        return make_windows(self.documents, self.tokenizer, context_tokens=context_tokens, max_windows=max_windows)

    def _continuation(self, settings: Any) -> Row:
        self._require_teacher()
        sources = len({document.source_name for document in self.documents})
        windows = self._windows(settings.prompt_tokens, -(-settings.prompts // max(sources, 1)))
        prompts = [window.tokens for window in windows][: settings.prompts]
        with self.reporter.task("continuations", len(prompts) * len(self.models)) as task:
            return continuation(
                self.models,
                self.tokenizer,
                prompts,
                new_tokens=settings.new_tokens,
                batch_tokens=self.batch_tokens,
                task=task,
            )

    def _samples(self, settings: Any) -> Row:
        with self.reporter.task("samples", len(settings.prompts) * len(self.models)) as task:
            return samples(self.models, self.tokenizer, settings, task=task)

    # What models find again.

    def _recall(self, settings: RecallProbe) -> Row:
        prose = self._haystack(settings)
        asked = tuple(name for name in settings.tasks if prose or name not in PROSE_TASKS)
        if not asked:
            raise _Skipped("no held-out documents were given to hide needles in")
        items = make_items(replace(settings, tasks=asked), self.tokenizer, prose, seed=self.seed)
        with self.reporter.task("recall", len(items) * len(self.models)) as task:
            row = recall(self.models, self.tokenizer, items, batch_tokens=self.batch_tokens, task=task)
        return {**row, "left_out": [name for name in settings.tasks if name not in asked]}

    def _haystack(self, settings: RecallProbe | None) -> list[str]:
        sources = settings.haystack if settings is not None else ()
        if not sources:
            return [document.text for document in self.documents]
        return [
            document.text for source in sources for document in read_documents(source, self.base, offline=self.offline)
        ]

    def _reading(self, settings: Any) -> Row:
        from hybridize.evaluation.reading import make_reading_items, reading

        items, questions = make_reading_items(settings, self.tokenizer, self.base, seed=self.seed, offline=self.offline)
        with self.reporter.task("reading", len(items) * len(self.models)) as task:
            return reading(self.models, self.tokenizer, items, questions, batch_tokens=self.batch_tokens, task=task)

    def _choices(self, settings: Any) -> Row:
        from hybridize.evaluation.choices import choices, read_questions

        if not settings.sources:
            raise _Skipped("no questions were given (evaluate.choices.sources)")
        questions = read_questions(settings, self.base, seed=self.seed, offline=self.offline)
        with self.reporter.task("multiple choice", len(questions) * len(self.models)) as task:
            return choices(self.models, self.tokenizer, questions, batch_tokens=self.batch_tokens, task=task)

    def _harness(self, settings: Any) -> Row:
        from hybridize.evaluation.harness import harness

        if not settings.tasks:
            raise _Skipped("no tasks were named (evaluate.harness.tasks)")
        with self.reporter.task("lm-eval", len(self.models)) as task:
            return harness(self.models, self.tokenizer, settings, task=task)

    # What the mixers do, and what they cost.

    def _state_bytes(self, settings: None) -> Row:
        with self.reporter.task("state bytes", 1) as task:
            row = state_bytes(self.models, context_tokens=self.settings.context_tokens, seed=self.seed)
            task.advance()
        return row

    def _speed(self, settings: Any) -> Row:
        passes = len(self.models) * len(settings.lengths) * len(settings.batch_sequences)
        with self.reporter.task("speed", passes) as task:
            return speed(self.models, settings, seed=self.seed, task=task)

    def _ablation(self, settings: Any) -> Row:
        from hybridize.evaluation.inside.ablation import ablation

        self._require_hybrid()
        windows = self._windows(settings.context_tokens, settings.max_windows)
        with self.reporter.task("ablation", None) as task:
            return ablation(self.student, self.teacher, windows, settings, batch_tokens=self.batch_tokens, task=task)

    def _inside(self, settings: Any) -> Row:
        from hybridize.evaluation.inside.inside import inside

        self._require_hybrid()
        windows = self._windows(settings.context_tokens, settings.max_windows)
        needles = RecallProbe(tasks=("niah_single_1",), lengths=(settings.context_tokens,), samples=1)
        items = make_items(needles, self.tokenizer, [], seed=self.seed)
        with self.reporter.task("inside the mixers", None) as task:
            return inside(
                self.student,
                self.teacher,
                self.tokenizer,
                windows,
                items,
                settings,
                batch_tokens=self.batch_tokens,
                task=task,
            )

    def _baselines(self, settings: BaselinesProbe) -> Row:
        from hybridize.evaluation.baselines.rows import baselines

        self._require_teacher()
        windows = self._windows(settings.context_tokens, settings.max_windows)
        items: list[Item] = make_items(settings, self.tokenizer, self._haystack(self.settings.recall), seed=self.seed)
        with self.reporter.task("training-free baselines", None) as task:
            row = baselines(
                self.student,
                self.teacher,
                self.tokenizer,
                settings,
                items,
                windows,
                seed=self.seed,
                batch_tokens=self.batch_tokens,
                task=task,
            )
        if row is None:
            raise _Skipped("no layer of the student evicts tokens")
        return row

    def _require_teacher(self) -> None:
        if self.teacher is None:
            raise _Skipped("no teacher was given")

    def _require_documents(self) -> None:
        if not self.documents:
            raise _Skipped("no held-out documents were given")

    def _require_hybrid(self) -> None:
        if not getattr(self.student, "mixers", None):
            raise _Skipped("the model has no mixers: it is no hybrid")


_OUT_OF_MEMORY_HINT = (
    "lower evaluate.batch_tokens, evaluate.{name}'s lengths or windows, or set evaluate.precision: bfloat16."
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
