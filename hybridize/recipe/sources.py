"""Where text comes from, as a recipe says it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hybridize.errors import RecipeError


@dataclass(frozen=True)
class TextSource:
    """Documents to read.

    Attributes:
        path: files below the recipe's folder (glob allowed), an absolute path, `package:NAME/FILES` for files of an
            installed Python package, or the name of a Hub data set.
        format: "text" (one document a file, or NUL-separated), "jsonl", "parquet" or "hub"; None: by the file ending.
        column: the field that holds the text (jsonl, parquet, hub).
        config, split, revision: of a Hub data set.
        weight: share in the mixture relative to the other sources.
        name: label in reports; default: made from the path.
    """

    path: str
    format: Literal["text", "jsonl", "parquet", "hub"] | None = None
    column: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise RecipeError(f"must be positive, is {self.weight}.", where="weight")
