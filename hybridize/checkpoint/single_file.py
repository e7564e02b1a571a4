"""A safetensors file by itself that is no model: whole or not there, and checked bit by bit when it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hybridize.checkpoint.resources import require_free_disk, resource_errors
from hybridize.checkpoint.safetensors_header import read_safetensors_header
from hybridize.checkpoint.safetensors_writer import write_safetensors
from hybridize.errors import CheckpointError, ResourceError
from hybridize.files import sync_file

if TYPE_CHECKING:
    import torch

DIGEST = "sha256"
"""Key of the metadata: of names, types, shapes and bytes of all tensors."""


def save_file(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes beside `path`, makes it durable, and gives it its name in one step, over a file that was there.

    Args:
        tensors: by name, any shapes and devices.
        metadata: texts of the header.

    Raises:
        ResourceError: no such folder, too little free disk, or it fills up; a file that was there is still there.
    """
    path = Path(path)
    require_place(path)
    require_free_disk(path.parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_safetensors(partial, on_host, {**metadata, DIGEST: _digest(on_host)})
        with resource_errors(path):
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_file(path.parent)


def require_place(path: str | Path) -> None:
    """Raises ResourceError unless a file may be written there, as far as can be told beforehand."""
    path = Path(path)
    if path.is_dir():
        raise ResourceError("this is a folder, not a file.", where=str(path))
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ResourceError("there is no such folder, or it may not be written.", where=str(path.parent))


def load_file(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What `save_file` wrote: the tensors, on the CPU, and the metadata.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is of another kind.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError("There is no such file.", where=str(path))
    headers = read_safetensors_header(path.parent, path.name)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in headers}
    if metadata.get(DIGEST) != _digest(tensors):
        hint = "The file was changed or not copied whole; save it again."
        raise CheckpointError("Its contents are not those that were saved.", where=str(path), hint=hint)
    return tensors, metadata


def load_one(path: str | Path, name: str) -> tuple[torch.Tensor, dict[str, str]]:
    """One tensor of such a file and the metadata, unchecked but for the header; the rest is not read.

    Raises:
        CheckpointError: there is no such file or tensor, or the header is damaged.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError("There is no such file.", where=str(path))
    if name not in read_safetensors_header(path.parent, path.name):
        raise CheckpointError(f"There is no tensor {name!r}.", where=str(path))
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name), dict(file.metadata() or {})


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
