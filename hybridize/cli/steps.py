"""The steps of a run folder. Each is skipped when its result is complete, so that the same command goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hybridize.checkpoint import FolderLock, read_manifest
from hybridize.cli.app import Settings
from hybridize.cli.endings import show_loss
from hybridize.cli.environment import num_processes, process_number
from hybridize.errors import CheckpointError, HybridizeError, UsageError
from hybridize.files import write_whole
from hybridize.plan import ConversionPlan
from hybridize.progress import Reporter
from hybridize.recipe.documents import local_files
from hybridize.recipe.lock import FILE as LOCK_FILE
from hybridize.recipe.lock import Lock, require_same
from hybridize.recipe.schema import Recipe

CONVERTED = "converted"
EXPORT = "export"
RESULTS = "results.json"
REPORT = "report"
_OURS = (CONVERTED, "distill", EXPORT, REPORT, RESULTS, "plan.json", "recipe.yaml", LOCK_FILE)


def open_run(run: Path, recipe: Recipe, plan: ConversionPlan, *, overwrite: bool) -> Lock:
    """Makes or opens a run folder; recipe.yaml, plan.json and the lock are in it afterwards.

    Raises:
        UsageError: the folder holds something else.
        RecipeError: it was started from another recipe or teacher, or a text file is missing.
    """
    if run.is_symlink() or (run.exists() and not run.is_dir()):
        raise UsageError("The output is not a folder.", where=str(run), hint="Choose another --out.")
    occupied = run.is_dir() and any(run.iterdir())
    if occupied and not (run / LOCK_FILE).is_file():
        raise UsageError(
            "The output folder is not empty and holds no run.", where=str(run), hint="Choose another --out."
        )
    if recipe.data is not None and not occupied:
        for source in (*recipe.data.train, *recipe.data.held_out):
            local_files(source, recipe.origin.base if recipe.origin else Path())
    if occupied and overwrite:
        _clear(run)
    lock = require_same(run, recipe, plan.fingerprint)
    if recipe.origin is not None and recipe.origin.path.is_file():
        _write(run / "recipe.yaml", recipe.origin.path.read_bytes())
    text = json.dumps(plan.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
    _write(run / "plan.json", text.encode() + b"\n")
    return lock


def first_only(work: Callable[[], None], settings: Settings) -> None:
    """Of several processes that a launcher started, lets the first do it while the others wait; or this one alone.

    If from now on another process is lost while this one is blocked in a message to it, that is told as every ending.

    Raises:
        what `work` raised; SystemExit: that was in another process. ProcessLostError: one was lost.
    """
    if num_processes() == 1:
        work()
        return
    from hybridize.distillation.processes import start_processes

    start_processes(partial(show_loss, settings=settings)).first_only(work)


def first_goes_on() -> bool:
    """Leaves the other processes once the distillation is complete: all but the first have nothing left to do.

    Returns:
        whether this is the first.
    """
    if num_processes() > 1:
        from hybridize.distillation.processes import start_processes

        start_processes().end()
    return process_number() == 0


@contextmanager
def new_run_or_none(run: Path) -> Iterator[None]:
    """If the block makes a run folder and then fails before the conversion is complete, the folder goes again."""
    existed = run.exists()
    is_new = not (run / LOCK_FILE).exists()
    try:
        yield
    except BaseException:
        if is_new and (run / LOCK_FILE).exists() and not is_complete(run / CONVERTED, "converted"):
            with suppress(HybridizeError, OSError):  # why it failed matters more
                _clear(run)
                if not existed:
                    run.rmdir()
        raise


def is_complete(folder: Path, kind: str) -> bool:
    """Whether `folder` was written to its end as a `kind`."""
    try:
        return folder.is_dir() and read_manifest(folder).kind == kind
    except CheckpointError:
        return False


def convert_step(plan: ConversionPlan, run: Path, *, offline: bool, reporter: Reporter) -> Path:
    """RUN/converted."""
    folder = run / CONVERTED
    if is_complete(folder, "converted"):
        reporter.note(f"{folder}: converted already")
        return folder
    from hybridize.model.convert import convert

    # What stands there without a manifest was never whole.
    return convert(plan, folder, overwrite=folder.exists(), offline=offline, reporter=reporter)


def distill_step(recipe: Recipe, run: Path, *, plan: ConversionPlan, offline: bool, reporter: Reporter) -> Path:
    """RUN/distill; goes on where it stopped by itself."""
    from hybridize.distillation.run import distill

    base = recipe.origin.base if recipe.origin else None
    return distill(recipe, run, plan=plan, base=base, offline=offline, reporter=reporter)


def export_step(recipe: Recipe, run: Path, *, reporter: Reporter) -> Path:
    """RUN/export."""
    folder = run / EXPORT
    if is_complete(folder, "export"):
        reporter.note(f"{folder}: exported already")
        return folder
    from hybridize.model.export import export

    return export(run, folder, settings=recipe.export, overwrite=folder.exists(), reporter=reporter)


def finished_results(path: Path, model: Path) -> dict[str, Any] | None:
    """The results in `path` if they are whole, no probe failed, and they are of `model` as it stands there now."""
    from hybridize.evaluation.results import contents_sha256, failed_probes
    from hybridize.report.results import read_results

    try:
        found = dict(read_results(path))
        of_this_model = found["model"]["contents_sha256"] == contents_sha256(model)
        return found if of_this_model and not failed_probes(found) else None
    except (UsageError, LookupError, TypeError, AttributeError):  # none, damaged, or of another version
        return None


def evaluate_step(
    recipe: Recipe, run: Path, lock: Lock, *, model: Path, teacher: str, offline: bool, reporter: Reporter
) -> dict[str, Any]:
    """RUN/results.json."""
    path = run / RESULTS
    found = finished_results(path, model)
    if found is not None:
        reporter.note(f"{path}: evaluated already")
        return found
    from hybridize.evaluation.runner import evaluate

    return evaluate(
        model,
        teacher=teacher,
        recipe_evaluate=recipe.evaluate,
        held_out=recipe.data or (),
        base=recipe.origin.base if recipe.origin else Path(),
        out=path,
        reporter=reporter,
        seed=recipe.seed,
        offline=offline,
        recipe_sha256=lock.recipe_sha256,
        command="hybridize run",
    )


def report_step(run: Path) -> list[Path]:
    """RUN/report, made anew: it costs nothing. The results also go into the card of the export."""
    from hybridize.model.card import update_card
    from hybridize.report.render import render
    from hybridize.report.tables import markdown, summary

    metrics = run / "distill" / "metrics.jsonl"
    written: list[Path] = render(run / RESULTS, run / REPORT, metrics if metrics.is_file() else None)
    if is_complete(run / EXPORT, "export"):
        update_card(run / EXPORT, markdown(summary(json.loads((run / RESULTS).read_text(encoding="utf-8")))))
    return written


def _clear(run: Path) -> None:
    """Removes what is ours; refuses while a living process writes any of it."""
    with ExitStack() as locks:
        for name in (CONVERTED, "distill", EXPORT):
            locks.enter_context(FolderLock(run / name))
        _remove_ours(run)


def _remove_ours(run: Path) -> None:
    for name in _OURS:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and only if it changes something."""
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)
