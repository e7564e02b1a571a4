"""The files of a source: paths below the recipe's folder, and files that an installed Python package carries."""

from __future__ import annotations

import glob
import importlib.util
import re
from pathlib import Path, PurePosixPath

from hybridize.errors import CheckpointError, RecipeError
from hybridize.recipe.sources import TextSource

GLOB_CHARACTERS = frozenset("*?[")
PACKAGE = "package:"
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def place(source: TextSource, base: Path) -> Path:
    """The path or pattern of a source, from the recipe's folder or from that of the package it names.

    Raises:
        RecipeError: the package is not installed, or the path leads out of it.
    """
    if not source.path.startswith(PACKAGE):
        return base / source.path
    name, _, inside = source.path.removeprefix(PACKAGE).partition("/")
    if ".." in PurePosixPath(inside).parts:
        raise RecipeError("The path leads out of the package.", where=source.path, hint="Write package:NAME/FILES.")
    return _package_folder(name, source.path) / inside


def find_files(source: TextSource, base: Path, default_pattern: str) -> list[Path]:
    """Matching files, sorted by name so that the order does not depend on the file system.

    Args:
        default_pattern: which files of a folder are meant.

    Raises:
        RecipeError: there are none.
    """
    path = place(source, base)
    if path.is_dir():
        path = path / default_pattern
    pattern = str(path)
    if not Path(pattern).is_file():  # a plain name may hold glob characters
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    else:
        matches = [Path(pattern)]
    files = [match for match in matches if match.is_file()]
    if not files:
        where = "data: " + source.path
        hint = "A recipe's paths start from its folder, an option's from the current one; ** matches folders."
        raise RecipeError(f"No file matches {pattern}.", where=where, hint=hint)
    return files


def identity(path: Path, source: TextSource, base: Path) -> str:
    """The name of a file in results: the same on every machine where it lies below the recipe or in a package."""
    if source.path.startswith(PACKAGE):
        name = source.path.removeprefix(PACKAGE).partition("/")[0]
        return f"{PACKAGE}{name}/{path.relative_to(_package_folder(name, source.path)).as_posix()}"
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def label(source: TextSource, path: Path) -> str:
    """The source's name in reports: as said, else `<label>--<title>.<ending>`, else the last plain part of its path."""
    if source.name is not None:
        return source.name
    head, separator, _ = path.stem.partition("--")
    if separator and head:
        return head
    pattern = Path(source.path.removeprefix(PACKAGE))
    named = [part for part in (pattern.stem, *(p.name for p in pattern.parents)) if part]
    return next((part for part in named if not GLOB_CHARACTERS & set(part)), path.stem)


def read_bytes(path: Path) -> bytes:
    """What a file holds.

    Raises:
        CheckpointError: it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = "Check the file and its permissions."
        raise CheckpointError(f"The file cannot be read ({error.strerror}).", where=str(path), hint=hint) from None
    if not content:
        raise CheckpointError("The file is empty.", where=str(path), hint="Remove it or fill it.")
    return content


def decode(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes.

    Raises:
        CheckpointError: they are not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "Convert the file, for example with `iconv -t UTF-8`."
        raise CheckpointError(f"The text is not UTF-8 (byte {error.start}).", where=where, hint=hint) from None


def _package_folder(name: str, path: str) -> Path:
    module = name.replace("-", "_")
    if not _MODULE.fullmatch(module):
        raise RecipeError(f"{name!r} is not a package name.", where=path, hint="Write package:NAME/FILES.")
    # Of a top-level name, find_spec only looks; it would import the parents of a dotted one.
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        hint = f"Install it: pip install --no-deps {name.replace('_', '-')}"
        raise RecipeError(f"The package {name} is not installed.", where=path, hint=hint)
    return Path(next(iter(found.submodule_search_locations)))
