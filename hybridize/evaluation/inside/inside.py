"""What the mixers of a hybrid do, gathered into one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hybridize.evaluation.inside.gated_delta_net import gates
from hybridize.evaluation.inside.retention import needles, retention
from hybridize.evaluation.inside.selection import selection
from hybridize.evaluation.inside.shown import shown
from hybridize.evaluation.items import Item
from hybridize.evaluation.parts import Row
from hybridize.evaluation.windows import Window
from hybridize.progress import Task
from hybridize.recipe.probes import InsideProbe

PARTS = ("retention", "needles", "gates", "selection", "shown")


def inside(
    student: Any,
    teacher: Any | None,
    tokenizer: Any,
    windows: Sequence[Window],
    items: Sequence[Item],
    probe: InsideProbe,
    *,
    batch_tokens: int,
    task: Task,
) -> Row:
    """Tokens retained, gates and decays, blocks selected; a part is None where the student has no such layers.

    Args:
        student: a hybrid, or a plain model (then there is nothing to tell), in eval mode.
        windows: held-out text, of at least one window.
        items: questions with `evidence`, of one length.
        batch_tokens: tokens that go through a model at once.
        task: advances by one for each of `PARTS`.
    """
    measures: dict[str, Callable[[], Row | None]] = {
        "retention": lambda: retention(student, windows, batch_tokens=batch_tokens),
        "needles": lambda: needles(student, items, batch_tokens=batch_tokens),
        "gates": lambda: gates(student, windows, batch_tokens=batch_tokens),
        "selection": lambda: selection(student, teacher, windows, batch_tokens=batch_tokens),
        "shown": lambda: shown(student, tokenizer, windows, shown_tokens=probe.shown_tokens),
    }
    row: Row = {}
    for name in PARTS:
        row[name] = measures[name]()
        task.advance()
    return row
