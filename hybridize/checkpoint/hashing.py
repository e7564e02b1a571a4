"""SHA-256 of files and of whole sources."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hybridize.checkpoint.files import open_regular
from hybridize.checkpoint.reader import tensor_headers
from hybridize.checkpoint.source import CheckpointSource


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(folder: Path, name: str) -> tuple[str, int]:
    """Hexadecimal SHA-256 and size in bytes of ``folder/name``, which must be a contained regular file."""
    file, _ = open_regular(folder, name)
    digest = hashlib.sha256()
    size = 0
    with file:
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def source_fingerprint(source: CheckpointSource, *, headers_only: bool = False) -> str:
    """One SHA-256 for a checkpoint: of its configuration, tokenizer and weight files by name, size and contents.

    Args:
        source: the checkpoint.
        headers_only: take of the weights the headers alone. Quick, for plan; it does not see a changed weight, and is
            never equal to the full fingerprint.
    """
    digest = hashlib.sha256(b"headers\n" if headers_only else b"files\n")
    if source.gguf_file is not None:
        names = [source.gguf_file]
    else:
        names = sorted(
            path.name for path in source.path.iterdir() if path.suffix in (".json", ".safetensors", ".model")
        )
    for name in names:
        if headers_only and name.endswith((".safetensors", ".gguf")):
            continue
        sha256, size = sha256_file(source.path, name)
        digest.update(f"{name}\0{size}\0{sha256}\n".encode())
    if headers_only:
        for _, header in sorted(tensor_headers(source).items()):
            digest.update(f"{header}\n".encode())
    return digest.hexdigest()
