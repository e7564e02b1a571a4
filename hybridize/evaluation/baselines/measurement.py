"""What every row of the table says: perplexity of late tokens, and recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.evaluation.asking import ask
from hybridize.evaluation.cells import share_cell
from hybridize.evaluation.items import Item
from hybridize.evaluation.parts import between, mean_of
from hybridize.evaluation.perplexity import exponential
from hybridize.evaluation.scores import score_windows
from hybridize.evaluation.windows import Window
from hybridize.progress import SILENT, Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """The same questions and texts for every model.

    Attributes:
        tokenizer: of all models.
        items, windows: questions for the recall, whose `group` is the length of their prompt, since a policy takes no
            padding; texts for the perplexity.
        first, end: positions between which tokens count for the perplexity, half-open.
        batch_tokens: tokens that go through a model at once.
        task: progress, advanced by one a row.
    """

    tokenizer: Any
    items: Sequence[Item]
    windows: Sequence[Window]
    first: int
    end: int
    batch_tokens: int
    task: Task

    def __call__(self, model: Any, policy: str, budget: int | None) -> Row:
        """{"policy", "budget", "perplexity" with `_se`, "tokens", "recall": {task: {length: cell}}} of a model in eval
        mode; the perplexity is None where no text is that long."""
        with SILENT.task("", None) as nobody:
            scores = score_windows(model, None, self.windows, batch_tokens=self.batch_tokens, task=nobody)
            found = ask(model, self.tokenizer, self.items, batch_tokens=self.batch_tokens, task=nobody)
        late = [part for score in scores if (part := between(score, self.first, self.end)) is not None]
        numbers: Row = {"perplexity": None, "perplexity_se": None}
        if late:
            numbers = exponential("perplexity", mean_of([part.student for part in late]))
        self.task.advance()
        counted = sum(part.student.numel() for part in late)
        return {"policy": policy, "budget": budget, **numbers, "tokens": counted, "recall": self._recall(found)}

    def _recall(self, scores: Sequence[float]) -> Row:
        gathered: dict[str, dict[str, list[float]]] = {}
        for item, score in zip(self.items, scores, strict=True):
            gathered.setdefault(item.task, {}).setdefault(str(item.group), []).append(score)
        return {
            task: {length: share_cell(own) for length, own in lengths.items()} for task, lengths in gathered.items()
        }
