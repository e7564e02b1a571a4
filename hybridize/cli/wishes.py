"""What `hybridize eval` is to measure, from its options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.recipe.probes import (
    AblationProbe,
    AgreementProbe,
    BaselinesProbe,
    ChoicesProbe,
    ContinuationProbe,
    Evaluate,
    HarnessProbe,
    InsideProbe,
    PerplexityProbe,
    ReadingProbe,
    RecallProbe,
    SamplesProbe,
    SpeedProbe,
)
from hybridize.recipe.schema import Recipe
from hybridize.recipe.suites import suite_names

DEFAULTS: dict[str, Any] = {
    "perplexity": PerplexityProbe,
    "recall": RecallProbe,
    "reading": ReadingProbe,
    "choices": ChoicesProbe,
    "agreement": AgreementProbe,
    "continuation": ContinuationProbe,
    "harness": HarnessProbe,
    "ablation": AblationProbe,
    "inside": InsideProbe,
    "baselines": BaselinesProbe,
    "speed": SpeedProbe,
    "samples": SamplesProbe,
}
"""What a probe is when it is asked for by name and nothing else says how."""

PROBES = tuple(DEFAULTS)
SUITES = tuple(suite_names())
DEFAULT_SUITE = "quick"


@dataclass(frozen=True)
class Wishes:
    """The options that say what is measured.

    Attributes:
        suite: replaces what the recipe says; None: the recipe, or `DEFAULT_SUITE` where there is none.
        changes: KEY=VALUE texts, over the suite or the recipe.
        probes: these alone, if any are named.
        reading, choices: files of questions. harness: names of tasks, separated by commas.
    """

    suite: str | None = None
    changes: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    reading: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    harness: str | None = None

    def settings(self, recipe: Recipe | None) -> Evaluate:
        """The settings of every probe.

        Raises:
            RecipeError: a change is wrong.
        """
        from hybridize.recipe.reader import load_evaluate

        if recipe is None or self.suite is not None:
            own = tuple(text for text in self.changes if recipe is None or text.lstrip().startswith("evaluate."))
            wishes = load_evaluate(self.suite or DEFAULT_SUITE, overrides=own)
        else:
            wishes = recipe.evaluate
        given = self._given(wishes)
        if self.probes:
            asked: dict[str, Any] = dict.fromkeys(PROBES)
            asked |= {name: getattr(wishes, name) or DEFAULTS[name]() for name in self.probes}
            wishes = dataclasses.replace(wishes, **asked)
        return dataclasses.replace(wishes, **given)

    def _given(self, wishes: Evaluate) -> dict[str, Any]:
        """The probes that have options of their own, which ask for them."""
        found: dict[str, Any] = {}
        for name in ("reading", "choices"):
            if paths := getattr(self, name):
                probe = getattr(wishes, name) or DEFAULTS[name]()
                found[name] = dataclasses.replace(probe, sources=tuple(_source(path) for path in paths))
        if self.harness:
            tasks = tuple(task.strip() for task in self.harness.split(",") if task.strip())
            found["harness"] = dataclasses.replace(wishes.harness or HarnessProbe(), tasks=tasks)
        return found


def _source(path: str) -> Any:
    """A file named on the command line: relative to where that was written, whatever folder the recipe lies in."""
    from hybridize.recipe.sources import TextSource

    return TextSource(path if path.startswith("package:") else str(Path(path).absolute()))
