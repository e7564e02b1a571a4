"""What decides the outcome of a run, as JSON; a run only goes on with what it began with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hybridize.checkpoint import resource_errors, sha256_bytes
from hybridize.errors import RecipeError
from hybridize.plan import ConversionPlan
from hybridize.recipe.documents import local_files
from hybridize.recipe.schema import Data, Distill

_HARMLESS = ("save_every_steps", "keep_checkpoints", "log_every_steps")
"""Settings of `distill` that do not change what is learnt."""
_SAMPLE_BYTES = 1 << 20
SETTINGS_FILE = "settings.json"


def run_settings(distill: Distill, data: Data, plan: ConversionPlan, base: Path) -> dict[str, Any]:
    """Everything that the trained weights depend on, with the sizes and beginnings of the data files."""
    training = dataclasses.asdict(distill)
    for key in _HARMLESS:
        del training[key]
    settings = {
        "model": {"name": plan.model, "fingerprint": plan.fingerprint},
        "layers": [config.to_dict() for config in plan.layers],
        "dtype": plan.dtype,
        "seed": plan.seed,
        "data": dataclasses.asdict(data),
        "data_files": _data_files(data, base),
        "distill": training,
    }
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


def begin_or_compare(folder: Path, settings: dict[str, Any]) -> str:
    """Records what a run begins with, or compares with what it began with once it has something to lose.

    Returns:
        the SHA-256 of the settings.

    Raises:
        RecipeError: lists every difference.
    """
    path = folder / SETTINGS_FILE
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    has_results = (folder / "adapter").exists() or any(folder.glob("checkpoints/step-*"))
    if path.is_file() and has_results:
        changed = differences(json.loads(path.read_text(encoding="utf-8")), settings)
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
