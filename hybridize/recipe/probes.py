"""What a recipe says of the evaluation, as frozen dataclasses: the field names are the keys of the YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from hybridize.errors import RecipeError
from hybridize.recipe.sources import TextSource

Precision = Literal["auto", "float32", "bfloat16"]

RecallTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "associative_recall",
]
"""RULER's tasks (arXiv 2404.06654), and multi-query associative recall (arXiv 2312.04927)."""

NEEDLE_TASKS: tuple[RecallTask, ...] = ("niah_single_1", "niah_single_2", "niah_single_3")

PolicyName = Literal["recency", "random", "key_norm", "accumulated_attention", "recent_attention", "last_attention"]


class Probe:
    """Base of the probes: counts are at least 1, depths are shares, and a list of what is asked is not empty."""

    may_be_zero: ClassVar[tuple[str, ...]] = ()
    may_be_empty: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            name, value = entry.name, getattr(self, entry.name)
            if value == () and name not in self.may_be_empty:
                raise RecipeError("is empty; set the probe to null to leave it out.", where=name)
            for number in value if isinstance(value, tuple) else (value,):
                least = 0 if name in self.may_be_zero else 1
                if type(number) is int and number < least:
                    raise RecipeError(f"must be at least {least}, is {number}.", where=name)
                if type(number) is float and not 0 <= number <= 1:
                    raise RecipeError(f"must be in 0..1, is {number}.", where=name)


@dataclass(frozen=True)
class PerplexityProbe(Probe):
    """Perplexity by position over held-out documents."""

    may_be_zero = ("position_edges",)

    context_tokens: int = 1024
    max_windows: int = 8
    """Windows of context_tokens a source."""
    position_edges: tuple[int, ...] = (0, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class RecallProbe(Probe):
    """What a model finds again in a long prompt, in the manner of RULER (arXiv 2404.06654)."""

    may_be_empty = ("haystack",)

    tasks: tuple[RecallTask, ...] = NEEDLE_TASKS
    lengths: tuple[int, ...] = (1024, 4096)
    """Tokens of the whole prompt, exactly."""
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Where the needle stands, 0 (beginning) to 1 (end); tasks without one place ask as many questions."""
    samples: int = 2
    """Questions for each task, length and depth."""
    haystack: tuple[TextSource, ...] = ()
    """Prose to hide needles in; none: the held-out documents."""


@dataclass(frozen=True)
class AgreementProbe(Probe):
    """KL divergence and top-1 agreement with the teacher, by source of text."""

    context_tokens: int = 1024
    max_windows: int = 8


@dataclass(frozen=True)
class ContinuationProbe(Probe):
    """How many greedy tokens student and teacher have in common after the same prompt."""

    prompt_tokens: int = 256
    prompts: int = 32
    """Of held-out text, spread over its sources."""
    new_tokens: int = 64


@dataclass(frozen=True)
class ReadingProbe(Probe):
    """Values asked of documents that are in the prompt, as completion (arXiv 2407.05483)."""

    may_be_empty = ("sources",)

    sources: tuple[TextSource, ...] = ()
    """JSON lines or SQuAD files; none: the metadata of the installed Python packages."""
    max_tokens: int = 2048
    """Longest prompt; longer documents are cut around the answer."""
    max_questions: int = 100
    """Of each source."""


@dataclass(frozen=True)
class ChoicesProbe(Probe):
    """Multiple choice: the answer that a model finds likeliest."""

    may_be_empty = ("sources",)

    sources: tuple[TextSource, ...] = ()
    """JSON lines, or BIG-bench: a task.json, or ARCHIVE.tar.gz:task."""
    max_questions: int = 200
    """Of each source."""


@dataclass(frozen=True)
class HarnessProbe(Probe):
    """Tasks of EleutherAI's lm-evaluation-harness, which the extra `harness` installs."""

    may_be_empty = ("tasks",)
    may_be_zero = ("num_fewshot",)

    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None


@dataclass(frozen=True)
class AblationProbe(Probe):
    """What is lost when each mixer in turn is replaced by a window."""

    context_tokens: int = 1024
    max_windows: int = 2
    """Windows of context_tokens a source."""
    window_tokens: int = 256
    """Of the window that stands in for mixers that have none of their own."""
    layers: bool = True
    """Each layer by itself; else all layers of each mixer together, alone."""


@dataclass(frozen=True)
class InsideProbe(Probe):
    """What the mixers do: tokens retained, gates and decays, blocks selected."""

    context_tokens: int = 1024
    max_windows: int = 2
    """Windows of context_tokens a source."""
    shown_tokens: int = 1024
    """Length of the text that the report shows token by token."""


@dataclass(frozen=True)
class BaselinesProbe(Probe):
    """Training-free choices of what stays, on the teacher, in the layers where the student evicts."""

    may_be_empty = ("budgets",)

    policies: tuple[PolicyName, ...] = (
        "recency",
        "random",
        "key_norm",
        "accumulated_attention",
        "recent_attention",
        "last_attention",
    )
    window_tokens: int | None = None
    """None: the student's."""
    budgets: tuple[int, ...] = ()
    """Retained tokens, sinks included; none: the student's own."""
    tasks: tuple[RecallTask, ...] = ("niah_single_1", "niah_single_2")
    lengths: tuple[int, ...] = (2048,)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples: int = 2
    context_tokens: int = 2048
    max_windows: int = 2
    """Windows of context_tokens a source, for the perplexity."""


@dataclass(frozen=True)
class SpeedProbe(Probe):
    """How fast prompts are read and tokens written on this machine, and what state decoding needs.

    Attributes:
        lengths, batch_sequences: tokens a sequence, and sequences; every pair is measured.
        new_tokens: written at each length; the last sees so many.
        repeats: the median of so many counts.
        prefill_limit_tokens: prompts of more, over all sequences, are not read: their state is made up.
    """

    lengths: tuple[int, ...] = (1024,)
    batch_sequences: tuple[int, ...] = (1,)
    new_tokens: int = 16
    repeats: int = 3
    prefill_limit_tokens: int = 2**17


@dataclass(frozen=True)
class SamplesProbe(Probe):
    """Greedy continuations by student and teacher, side by side."""

    prompts: tuple[str, ...] = ("The history of the printing press begins with",)
    new_tokens: int = 48


@dataclass(frozen=True)
class Evaluate:
    """What is measured after the export. A probe set to null is left out."""

    context_tokens: int = 8192
    """Context length for the state bytes."""
    batch_tokens: int | None = None
    """Tokens that go through a model at once; None: 256k on a GPU, 4k on a CPU."""
    precision: Precision = "auto"
    perplexity: PerplexityProbe | None = field(default_factory=PerplexityProbe)
    recall: RecallProbe | None = field(default_factory=RecallProbe)
    agreement: AgreementProbe | None = field(default_factory=AgreementProbe)
    continuation: ContinuationProbe | None = None
    reading: ReadingProbe | None = None
    choices: ChoicesProbe | None = None
    harness: HarnessProbe | None = None
    ablation: AblationProbe | None = None
    inside: InsideProbe | None = None
    baselines: BaselinesProbe | None = None
    speed: SpeedProbe | None = None
    samples: SamplesProbe | None = field(default_factory=SamplesProbe)
