"""The header of a safetensors file, parsed strictly: 8 bytes of length, JSON, then the bodies without a gap.

The safetensors library finds most of these faults too; parsing here names the file, the tensor and the remedy,
and reads the header only, whatever the file's size. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.checkpoint.files import open_regular, parse_json_object
from hybridize.errors import CheckpointError

MAX_HEADER_BYTES = 32 * 2**20  # 10^5 tensors take about 12 MB; parsed JSON takes many times its size in memory

# Bits an element of each dtype of the format takes.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_DAMAGED = "The file is damaged or was not copied whole; download or save it again."
_DISGUISES = (
    (b"version https://git-lfs", "a git-LFS pointer, not the weights", "Run `git lfs pull` in the folder."),
    (b"PK\x03\x04", "a zip archive (torch.save writes these)", "Save the model as safetensors."),
    (b"\x80\x02", "a pickle", "Save the model as safetensors."),
    (b"\x80\x04", "a pickle", "Save the model as safetensors."),
    (b"GGUF", "a GGUF file", "Name it with the suffix .gguf and pass that file."),
)


@dataclass(frozen=True)
class TensorHeader:
    """What a checkpoint says of one tensor without reading it.

    Attributes:
        name: the tensor's name, in transformers' convention also for GGUF files.
        dtype: the file format's word for the element type ("F32", "BF16", GGUF: "Q4_1").
        shape: sizes, outermost first.
        file: name of the file in the folder.
        size_bytes: bytes the body takes in the file.
        offset_bytes: where the body starts, from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    size_bytes: int
    offset_bytes: int


def read_safetensors_header(folder: Path, file_name: str) -> dict[str, TensorHeader]:
    """Read and check the header of ``folder/file_name``; bodies are not read.

    Raises:
        CheckpointError: for every deviation from the format, naming the file and, where there is one, the tensor.
    """
    where = str(folder / file_name)
    file, size = open_regular(folder, file_name)
    with file:
        first = file.read(512)
        _refuse_disguise(first, size, where)
        length = int.from_bytes(first[:8], "little")
        if length > MAX_HEADER_BYTES:
            what = f"The header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed."
            raise CheckpointError(what, where=where, hint=_DAMAGED)
        if 8 + length > size:
            what = f"The header is truncated: it claims {length:,} bytes and the file has {size:,}."
            raise CheckpointError(what, where=where, hint=_DAMAGED)
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError("The header does not begin with '{'.", where=where, hint=_DAMAGED)
    return _parse_entries(parse_json_object(text, where=where), file_name, 8 + length, size, where)


def _refuse_disguise(first: bytes, size: int, where: str) -> None:
    if size == 0:
        raise CheckpointError("The file is empty.", where=where, hint=_DAMAGED)
    for magic, what, hint in _DISGUISES:
        if first.startswith(magic):
            raise CheckpointError(f"This is {what}.", where=where, hint=hint)
    if first.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        hint = "The download returned an error page; sign in or accept the licence, and download again."
        raise CheckpointError("This is an HTML page, not weights.", where=where, hint=hint)
    if size < 8:
        what = f"The file has {size} bytes; a safetensors file has at least 8."
        raise CheckpointError(what, where=where, hint=_DAMAGED)


def _parse_entries(entries: dict[str, Any], file: str, start: int, size: int, where: str) -> dict[str, TensorHeader]:
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("`__metadata__` is not a map of texts.", where=where, hint=_DAMAGED)
    headers = {name: _parse_entry(name, entry, file, start, where) for name, entry in entries.items()}
    end, previous = start, ""
    for header in sorted(headers.values(), key=lambda header: (header.offset_bytes, header.size_bytes)):
        if header.offset_bytes != end:
            fault = "overlaps" if header.offset_bytes < end else "leaves a gap after"
            neighbour = f"tensor {previous!r}" if previous else "the header"
            what = f"Tensor {header.name!r} {fault} {neighbour}."
            raise CheckpointError(what, where=where, hint=_DAMAGED)
        end, previous = end + header.size_bytes, header.name
    if end > size:
        what = f"The file is truncated: tensor {previous!r} ends at byte {end:,} and the file has {size:,}."
        raise CheckpointError(what, where=where, hint=_DAMAGED)
    if end < size:
        what = f"{size - end:,} bytes trail after the last tensor."
        raise CheckpointError(what, where=where, hint=_DAMAGED)
    return headers


def _parse_entry(name: str, entry: Any, file: str, start: int, where: str) -> TensorHeader:
    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"Tensor {name[:200]!r}: {what}", where=where, hint=_DAMAGED)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("its entry must hold exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"the dtype {str(dtype)[:40]!r} is unknown.")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise fail("shape and data_offsets must be lists of whole numbers that are not negative.")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if max(bits, end) >= 2**63:
        raise fail(f"the shape {shape!r:.80} or its offsets overflow.")
    if end < begin or bits % 8 or end - begin != bits // 8:
        raise fail(f"shape {shape!r:.80} of {dtype} takes {bits / 8:,.0f} bytes and its offsets give {end - begin:,}.")
    return TensorHeader(name, dtype, tuple(shape), file, end - begin, start + begin)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
