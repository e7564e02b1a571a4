"""What decides the outcome of a run, as JSON; a run only goes on with what it began with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridize.checkpoint import resource_errors, sha256_bytes
from hybridize.checkpoint.files import read_json_object
from hybridize.errors import RecipeError
from hybridize.plan import ConversionPlan
from hybridize.recipe.documents import local_files, pin_revisions
from hybridize.recipe.schema import Data, Distill

_HARMLESS = ("save_every_steps", "keep_checkpoints", "log_every_steps", "gradient_checkpointing", "share_weights")
"""Settings of `distill` that do not change what is learnt."""
_SAMPLE_BYTES = 1 << 20
SETTINGS_FILE = "settings.json"


def pinned_data(folder: Path, data: Data, base: Path, *, offline: bool = False) -> Data:
    """The data with the revision of every Hub data set fixed: that of the run in `folder`, or the present one."""
    recorded = _recorded(folder).get("revisions", [])
    if len(recorded) == len(data.train):
        train = tuple(replace(source, revision=commit) for source, commit in zip(data.train, recorded, strict=True))
    else:
        train = pin_revisions(data.train, base, offline=offline)
    return replace(data, train=train)


def recorded_processes(folder: Path) -> int | None:
    """The number of processes that the run in `folder` began with; None where there is nothing to go on with yet."""
    recorded = _recorded(folder)
    return int(recorded.get("processes", 1)) if recorded else None


def run_settings(
    distill: Distill, data: Data, pinned: Data, plan: ConversionPlan, base: Path, *, processes: int = 1
) -> dict[str, Any]:
    """Everything that the trained weights depend on.

    Args:
        distill, data: of the recipe. pinned: the data with fixed revisions.
        base: folder that text paths start from; sizes and beginnings of the files are recorded.
        processes: that a step's sequences are counted by; those that the run began with.
    """
    training = dataclasses.asdict(distill)
    for key in _HARMLESS:
        del training[key]
    if training["teacher_cache"] is not None:
        del training["teacher_cache"]["folder"]
    settings = {
        "model": {"name": plan.model, "fingerprint": plan.fingerprint},
        "layers": [config.to_dict() for config in plan.layers],
        "dtype": plan.dtype,
        "seed": plan.seed,
        "data": dataclasses.asdict(data),
        "data_files": _data_files(data, base),
        "revisions": [source.revision for source in pinned.train],
        "distill": training,
    }
    if processes > 1:
        settings["processes"] = processes
    return json.loads(json.dumps(settings))  # type: ignore[no-any-return]


def _data_files(data: Data, base: Path) -> dict[str, str]:
    found = {}
    for source in (*data.train, *data.held_out):
        for identity, path in local_files(source, base):
            with path.open("rb") as file:
                beginning = sha256_bytes(file.read(_SAMPLE_BYTES))
            found[identity] = f"{path.stat().st_size} bytes, {beginning[:16]}"
    return found


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Lines `key.path: old → new` for every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{path}.{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for index, (old, new) in pairs for line in differences(old, new, f"{path}.{index}")]
    return [] if before == now else [f"{path.lstrip('.')}: {json.dumps(before)} → {json.dumps(now)}"]


def _recorded(folder: Path) -> dict[str, Any]:
    """What the run in `folder` began with; empty where there is nothing to lose yet."""
    has_results = (folder / "adapter").exists() or any(folder.glob("checkpoints/step-*"))
    path = folder / SETTINGS_FILE
    if not (path.is_file() and has_results):
        return {}
    return read_json_object(folder, SETTINGS_FILE)


def begin_or_compare(folder: Path, settings: dict[str, Any]) -> str:
    """Records what a run begins with, or compares with what it began with once it has something to lose.

    Returns:
        the SHA-256 of the settings.

    Raises:
        RecipeError: lists every difference.
    """
    path = folder / SETTINGS_FILE
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    recorded = _recorded(folder)
    if recorded:
        changed = differences(recorded, settings)
        if changed:
            what = f"The run began with other settings: {'; '.join(changed[:8])}."
            hint = "Take the change back, or choose another --out for the changed recipe."
            raise RecipeError(what, where=str(folder), hint=hint, problems=tuple(changed))
    else:
        partial = path.with_name(path.name + ".partial")
        with resource_errors(path):
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    return sha256_bytes(text.encode())
