"""What a recipe says of the evaluation, as frozen dataclasses: the field names are the keys of the YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class PerplexityProbe:
    """Perplexity by position over held-out documents."""

    context_tokens: int = 1024
    max_windows: int = 8
    """Windows of context_tokens a source."""
    position_edges: tuple[int, ...] = (0, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class RecallProbe:
    """Single-needle recall in the manner of RULER (arXiv 2404.06654), S-NIAH 1 to 3."""

    kinds: tuple[Literal["niah_single_1", "niah_single_2", "niah_single_3"], ...] = (
        "niah_single_1",
        "niah_single_2",
        "niah_single_3",
    )
    lengths: tuple[int, ...] = (1024, 4096)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples: int = 2
    """Needles for each kind, length and depth."""


@dataclass(frozen=True)
class AgreementProbe:
    """KL divergence and top-1 agreement with the teacher, by source of text."""

    context_tokens: int = 1024
    max_windows: int = 8


@dataclass(frozen=True)
class SamplesProbe:
    """Greedy continuations by student and teacher, side by side."""

    prompts: tuple[str, ...] = ("The history of the printing press begins with",)
    new_tokens: int = 48


@dataclass(frozen=True)
class Evaluate:
    """What is measured after the export. A probe set to null is left out."""

    context_tokens: int = 8192
    """Context length for the state bytes."""
    batch_sequences: int = 1
    precision: Precision = "auto"
    perplexity: PerplexityProbe | None = field(default_factory=PerplexityProbe)
    recall: RecallProbe | None = field(default_factory=RecallProbe)
    agreement: AgreementProbe | None = field(default_factory=AgreementProbe)
    samples: SamplesProbe | None = field(default_factory=SamplesProbe)
