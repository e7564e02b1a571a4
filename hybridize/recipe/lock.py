"""recipe.lock.json: what exactly a run folder was made from, so that going on with anything else is refused."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybridize.errors import RecipeError
from hybridize.files import write_whole
from hybridize.recipe.reader import recipe_from_dict, recipe_to_dict
from hybridize.recipe.schema import Recipe

FILE = "recipe.lock.json"
FORMAT = "hybridize-lock"
VERSION = 1
_PACKAGES = (
    "hybridize",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "triton",
)


@dataclass(frozen=True)
class Lock:
    """What a run was made from.

    Attributes:
        recipe: `recipe_to_dict` of the resolved recipe.
        recipe_sha256: of its canonical JSON.
        teacher_fingerprint: of the checkpoint, as in the plan.
        overrides: the `--set` texts; they are already part of `recipe`.
        versions: packages and Python. They may change between two starts; they are recorded, not compared.
    """

    recipe: Mapping[str, Any]
    recipe_sha256: str
    teacher_fingerprint: str
    overrides: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def load(self, where: str = FILE) -> Recipe:
        """The recipe."""
        return recipe_from_dict(self.recipe, where=where)


def canonical_json(value: Any) -> str:
    """JSON that is the same text for the same data."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def recipe_sha256(recipe: Recipe) -> str:
    """Hexadecimal SHA-256 of a recipe's contents: layout, comments and file name do not count."""
    return hashlib.sha256(canonical_json(recipe_to_dict(recipe)).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a run; nothing is imported."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def make_lock(recipe: Recipe, teacher_fingerprint: str) -> Lock:
    """The lock of a recipe about to be run."""
    overrides = recipe.origin.overrides if recipe.origin else ()
    values = json.loads(canonical_json(recipe_to_dict(recipe)))
    return Lock(values, recipe_sha256(recipe), teacher_fingerprint, overrides, package_versions())


def write_lock(run: Path, lock: Lock) -> Path:
    """Writes RUN/recipe.lock.json whole or not at all."""
    path = run / FILE
    run.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "version": VERSION, **asdict(lock)}
    return write_whole(path, json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_lock(run: Path) -> Lock | None:
    """The lock of a run folder; None if there is none.

    Raises:
        RecipeError: the file is damaged.
    """
    path = run / FILE
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"format {document['format']!r:.40}, version {document['version']!r:.20}")
        return Lock(
            recipe=dict(document["recipe"]),
            recipe_sha256=str(document["recipe_sha256"]),
            teacher_fingerprint=str(document["teacher_fingerprint"]),
            overrides=tuple(str(text) for text in document["overrides"]),
            versions=dict(document["versions"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"cannot be read ({error!r}).", where=str(path), hint="Start the run in a new folder, or use --overwrite."
        ) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """ "key: old → new" for every key whose value differs, in the order of the keys."""
    before, after = _flat(old, ""), _flat(new, "")
    keys = [*before, *(key for key in after if key not in before)]
    absent = "(absent)"
    return [
        f"{key}: {_shown(before, key, absent)} → {_shown(after, key, absent)}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent)
    ]


def require_same(run: Path, recipe: Recipe, teacher_fingerprint: str) -> Lock:
    """The lock of `run`, written now if there is none.

    Raises:
        RecipeError: the folder was started from another recipe or teacher; `problems` lists what differs.
    """
    new = make_lock(recipe, teacher_fingerprint)
    old = read_lock(run)
    if old is None:
        write_lock(run, new)
        return new
    changes = differences(old.recipe, new.recipe)
    if old.teacher_fingerprint != new.teacher_fingerprint:
        changes.append(f"teacher: {old.teacher_fingerprint[:12]} → {new.teacher_fingerprint[:12]} (its files changed)")
    if changes:
        listed = "".join(f"\n  {change}" for change in changes)
        raise RecipeError(
            f"this run was started from another recipe:{listed}\n",
            where=str(run / FILE),
            hint="Restore the recipe to go on, choose another --out, or start anew with --overwrite.",
            problems=tuple(changes),
        )
    return old


def _flat(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple) and value and any(isinstance(item, Mapping) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {key: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat.update(_flat(item, f"{key}.{name}" if key else name))
    return flat


def _shown(values: Mapping[str, Any], key: str, absent: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else absent
