"""What a report is made of; `markdown.py` and `page/` each write all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.report.tables import Table


@dataclass(frozen=True)
class Paragraphs:
    """Sentences, each paragraph under a word that says what it is about ("" for none)."""

    parts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Figure:
    """A chart.

    Attributes:
        name: of its file beside report.md, without the ending.
        svg: an <svg> element without its style (`charts.style`).
    """

    name: str
    title: str
    svg: str


@dataclass(frozen=True)
class Heat:
    """One cell of a heat map: the text in it, how strongly it is coloured (0 to 1), and the full number."""

    text: str
    level: float
    full: str


@dataclass(frozen=True)
class HeatMap:
    """A table of coloured cells; rows are (label, cells), None for a cell without a number. On the page only."""

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Heat | None]]]
    note: str = ""


@dataclass(frozen=True)
class Quotes:
    """Texts as models wrote them: (label, text)."""

    parts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tokens:
    """A text of which each token is shaded by the share of heads that hold it: the probe's row `inside.shown`. On the
    page only."""

    shown: Mapping[str, Any]


Block = Paragraphs | Table | Figure | HeatMap | Quotes | Tokens


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]
