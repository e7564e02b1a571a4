"""What the cases break: a recipe as text, and ways to change one thing in a project."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECIPE = """\
model: teacher
layers: F T G F
mixers:
  T: {mixer: token_eviction, window_tokens: 14, sink_tokens: 2, budget_tokens: 8}
data:
  train: [text/*.txt]
  held_out: [held/*.txt]
  sequence_tokens: 32
distill:
  lora: {rank: 2}
  precision: float32
  stages:
    - {name: align, kind: align, steps: 1, learning_rate: 1e-2}
    - {name: distill, kind: distill, steps: 1, learning_rate: 1e-2}
export: {dtype: float32}
evaluate:
  precision: float32
  context_tokens: 64
  perplexity: {context_tokens: 32, max_windows: 1, position_edges: [0, 16]}
  agreement: null
  recall: null
  samples: null
"""

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NORM = "model.norm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"

Break = Callable[[Path], object]
"""Breaks one thing in a copy of the project."""


def no_break(project: Path) -> None:
    """For commands that are wrong by themselves."""


def both(*breaks: Break) -> Break:
    """All of them, in order."""

    def apply(project: Path) -> None:
        for each in breaks:
            each(project)

    return apply


def write(name: str, content: bytes | str) -> Break:
    """Replaces a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda project: (project / name).write_bytes(data)


def change(name: str, edit: Callable[[bytes], bytes]) -> Break:
    """Edits the bytes of a file."""
    return lambda project: (project / name).write_bytes(edit((project / name).read_bytes()))


def remove(name: str) -> Break:
    """Deletes a file."""
    return lambda project: (project / name).unlink()


def recipe(old: str, new: str) -> Break:
    """Replaces a text that is once in the recipe."""

    def edit(project: Path) -> None:
        text = (project / "recipe.yaml").read_text()
        assert text.count(old) == 1
        (project / "recipe.yaml").write_text(text.replace(old, new))

    return edit


def patch_json(name: str, changes: Mapping[str, Any]) -> Break:
    """Sets top-level keys of a JSON file."""

    def edit(project: Path) -> None:
        path = project / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | dict(changes)))

    return edit


def patch_index(edit: Callable[[dict[str, Any]], object]) -> Break:
    """Edits the weight map of `sharded`."""

    def apply(project: Path) -> None:
        path = project / "sharded" / INDEX
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return apply


def index_names(name: object) -> Break:
    """One more tensor in the index, in a shard of this name."""
    return patch_index(lambda weight_map: weight_map.update({"stolen": name}))


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and bodies of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def pack(header: Mapping[str, Any] | bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file; `length` replaces the true length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def header(edit: Callable[[dict[str, Any]], object]) -> Break:
    """Edits the header of `teacher/model.safetensors`; the bodies stay."""

    def apply(data: bytes) -> bytes:
        entries, body = split(data)
        edit(entries)
        return pack(entries, body)

    return change(f"teacher/{FILE}", apply)


def tensors(edit: Callable[[dict[str, Any]], object], name: str = f"teacher/{FILE}") -> Break:
    """Edits the tensors of a safetensors file by name."""

    def apply(project: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(project / name)
        edit(found)
        save_file(found, project / name, metadata={"format": "pt"})

    return apply


def fill(name: str, value: float) -> Break:
    """Sets one element of a tensor of the teacher."""
    return tensors(lambda found: found[name].view(-1)[-1:].fill_(value))


def link(name: str, target: str) -> Break:
    """Replaces a file by a symbolic link."""

    def apply(project: Path) -> None:
        (project / name).unlink()
        (project / name).symlink_to(target)

    return apply


def pipe(name: str) -> Break:
    """Replaces a file by a named pipe that nobody writes to."""
    import os

    return both(lambda project: (project / name).unlink(missing_ok=True), lambda project: os.mkfifo(project / name))
