"""Writing safetensors: one file, or shards with an index. The same tensors give the same bytes in any order.

Bodies are written here rather than by the safetensors library so that a full disk is an OSError that can be explained,
the user's umask holds, and a crash can be tested in the middle of a shard.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize.checkpoint.faults import fault_point as _fault_point
from hybridize.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from hybridize.checkpoint.resources import require_free_disk, resource_errors
from hybridize.files import sync_file

if TYPE_CHECKING:
    import torch

DEFAULT_SHARD_BYTES = 5_000_000_000
_WORDS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def save_tensors(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    skip: Collection[str] = (),
    stem: str = "model",
) -> list[str]:
    """Write tensors to ``model.safetensors``, or to shards and an index if they exceed `max_shard_bytes`.

    Args:
        folder: must exist; usually what `AtomicFolder` gives.
        tensors: by name, any shapes and devices.
        metadata: texts of the header; {"format": "pt"} if None, which transformers requires.
        max_shard_bytes: of bodies, a file. A larger tensor gets a shard of its own.
        skip: names to leave out, such as an ``lm_head.weight`` tied to the embedding.
        stem: of the file names.

    Returns:
        the names of the files written.

    Raises:
        ResourceError: too little free disk (before anything is written), or the disk fills up.
    """
    folder = Path(folder)
    chosen = {name: tensor for name, tensor in sorted(dict(tensors).items()) if name not in skip}
    total = sum(_num_bytes(tensor) for tensor in chosen.values())
    require_free_disk(folder, total)
    header = dict(metadata) if metadata is not None else {"format": "pt"}
    shards = split_shards({name: _num_bytes(tensor) for name, tensor in chosen.items()}, max_shard_bytes)
    if len(shards) == 1:
        name = f"{stem}.safetensors" if stem != "model" else SINGLE_FILE
        write_safetensors(folder / name, chosen, header)
        return [name]
    files: list[str] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        if number > 1:
            _fault_point("between-shards")
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: chosen[name] for name in names}, header)
        files.append(file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    index_file = INDEX_FILE if stem == "model" else f"{stem}.safetensors.index.json"
    with resource_errors(folder / index_file):
        (folder / index_file).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sync_file(folder / index_file)
    return [*files, index_file]


def split_shards(sizes: Mapping[str, int], max_shard_bytes: float) -> list[list[str]]:
    """Cut names, in order, into groups whose sizes sum to at most `max_shard_bytes`; at least one group."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, written to its name as it comes; for what is whole or not there, see `save_file`."""
    # Wide elements first, so that every body is aligned to its element size; then by name.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        tensor, size = tensors[name], _num_bytes(tensors[name])
        dtype = _WORDS[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    with resource_errors(path):
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for number, name in enumerate(names):
                if number == (len(names) + 1) // 2 or len(names) == 1:
                    _fault_point("shard")
                file.write(_body(tensors[name]))
        sync_file(path)


def _body(tensor: torch.Tensor) -> Any:
    """The tensor's bytes in row order as a numpy array, little-endian as on every machine torch runs on."""
    import torch

    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
