"""Tasks of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on both models."""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import math
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from hybridize.errors import UsageError
from hybridize.progress import Task
from hybridize.recipe.probes import HarnessProbe

Row = dict[str, Any]

BATCH_SEQUENCES = 8


def harness(
    models: dict[str, Any], tokenizer: Any, probe: HarnessProbe, *, task: Task, batch_size: int = BATCH_SEQUENCES
) -> Row:
    """Runs the tasks on each model in turn; everything but model and tokenizer is as lm-eval has it.

    Args:
        models: "student" and, where there is one, "teacher", in eval mode on the device they run on.
        batch_size: sequences that go through a model at once.
        task: advances by one for each model.

    Returns:
        tasks: task -> metric -> {"student", "student_se", "teacher", "teacher_se"}; a metric of a filter is called
        "metric,filter". version: of lm-eval. limit: questions of a task that were asked, None for all.

    Raises:
        UsageError: lm-eval is not installed, has no task of that name, or cannot load its data.
    """
    manager = _manager(probe)
    with _quiet():
        for name in probe.tasks:
            _try(manager, name)
    tasks: dict[str, dict[str, Row]] = {}
    for model_name, model in models.items():
        for name, metrics in _results(model, tokenizer, probe, manager, batch_size).items():
            for key, value in metrics.items():
                empty = dict.fromkeys(("student", "student_se", "teacher", "teacher_se"))
                cell = tasks.setdefault(name, {}).setdefault(key, empty)
                cell[model_name], cell[f"{model_name}_se"] = value
        task.advance()
    return {"tasks": tasks, "version": metadata.version("lm_eval"), "limit": probe.limit}


def _manager(probe: HarnessProbe) -> Any:
    """The index of lm-eval's tasks, with every name that is asked for in it."""
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found, import-untyped]
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        hint = 'Install it: pip install "hybridize[harness]"'
        raise UsageError("lm-eval is not installed.", where="evaluate.harness", hint=hint) from None
    with _quiet():
        manager = TaskManager(include_path=probe.include_path)
    for name in probe.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"Nearest: {', '.join(near)}." if near else "`lm-eval ls tasks` lists them."
            raise UsageError(f"lm-eval has no task {name!r}.", where="evaluate.harness.tasks", hint=hint)
    return manager


def _try(manager: Any, name: str) -> None:
    """Loads a task with its data once, so that what fails here is the task's and not a model's."""
    try:
        manager.load([name])
    except Exception as error:  # the tasks' own code and the readers of data sets raise errors of any class
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"The task {name!r} cannot be loaded ({type(error).__name__}: {first_line[:200]}).",
            where="evaluate.harness.tasks",
            hint="Its data must be on this machine when offline: run the task once with the network on.",
        ) from error


def _results(
    model: Any, tokenizer: Any, probe: HarnessProbe, manager: Any, batch_size: int
) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """Task -> metric -> (value, standard error) of one model."""
    import lm_eval  # type: ignore[import-not-found, import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, import-untyped]

    with _quiet():
        # HFLM gives a tokenizer without a padding token one; ours stays as it is.
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(probe.tasks),
            num_fewshot=probe.num_fewshot,
            limit=probe.limit,
            task_manager=manager,
            log_samples=False,
        )
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """lm-eval's "acc,none" and "acc_stderr,none" as acc -> (value, standard error)."""
    found = {}
    for key, value in values.items():
        metric, separator, part = key.partition(",")
        if not separator or metric.endswith("_stderr") or _number(value) is None:
            continue
        name = metric if part == "none" else key
        found[name] = (_number(value), _number(values.get(f"{metric}_stderr,{part}")))
    return found


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's own bars and notices: one progress style on the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
