"""Reading a checkpoint: configuration, tensor headers, tensors, and whether they are what a model expects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hybridize.checkpoint.files import contained_path, read_json_object
from hybridize.checkpoint.folder import check_safetensors_folder, name_some, read_folder_headers
from hybridize.checkpoint.gguf_file import gguf_config, load_gguf_tensors, read_gguf
from hybridize.checkpoint.safetensors_header import TensorHeader
from hybridize.checkpoint.source import CheckpointSource
from hybridize.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_NOT_WEIGHTS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "C64", "F4"}


def read_config(source: CheckpointSource) -> dict[str, Any]:
    """The model's configuration in the words of transformers' config.json; of GGUF, built from its metadata.

    `auto_map` is returned like any key; the code it names is never imported.
    """
    if source.gguf_file is not None:
        where = str(source.path / source.gguf_file)
        return gguf_config(read_gguf(source.path, source.gguf_file), where=where)
    config = read_json_object(source.path, "config.json")
    if not isinstance(config.get("model_type"), str):
        hint = "Give the folder of a transformers checkpoint."
        raise CheckpointError("There is no `model_type`.", where=str(source.path / "config.json"), hint=hint)
    return config


def tensor_headers(source: CheckpointSource) -> dict[str, TensorHeader]:
    """Every tensor's dtype, shape and place by name, reading headers only. Index and shards are compared."""
    if source.gguf_file is not None:
        return read_gguf(source.path, source.gguf_file).headers
    return read_folder_headers(source.path)


def check_folder(source: CheckpointSource, *, complete: bool = True) -> dict[str, TensorHeader]:
    """Refuse a damaged, hostile or incomplete checkpoint without reading a tensor; return its headers.

    Args:
        source: the checkpoint.
        complete: also refuse a folder of ours without its manifest; False while it is being written.
    """
    if source.gguf_file is not None:
        file = read_gguf(source.path, source.gguf_file)
        gguf_config(file, where=str(source.path / source.gguf_file))
        return file.headers
    return check_safetensors_folder(source.path, complete=complete)


def check_tensors(
    headers: Mapping[str, TensorHeader],
    expected: Mapping[str, tuple[int, ...]],
    *,
    optional: Collection[str] = (),
    extra_allowed: Collection[str] = (),
    where: str = "",
) -> None:
    """Compare a checkpoint's tensors with those a model needs, by name.

    Args:
        headers: of the checkpoint.
        expected: shape by name.
        optional: expected names that may be absent (a tied ``lm_head.weight``).
        extra_allowed: names, or suffixes beginning with a dot, that may be there and are not read
            (``.rotary_emb.inv_freq`` of old checkpoints).
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: lists what is missing, unexpected, misshapen or not of a floating-point dtype.
    """
    missing = sorted(name for name in expected if name not in headers and name not in optional)
    suffixes = tuple(name for name in extra_allowed if name.startswith("."))
    extra = sorted(
        name
        for name in headers
        if name not in expected and name not in extra_allowed and not (suffixes and name.endswith(suffixes))
    )
    both = sorted(name for name in expected if name in headers)
    misshapen = [
        f"{name} is {list(headers[name].shape)}, expected {list(expected[name])}"
        for name in both
        if headers[name].shape != tuple(expected[name])
    ]
    quantised = [f"{name} is {headers[name].dtype}" for name in both if _is_no_weight(headers[name].dtype)]
    problems = [
        f"{len(names)} {word}: {name_some(names)}"
        for word, names in (
            ("missing", missing),
            ("unexpected", extra),
            ("of the wrong shape", misshapen),
            ("not in floating point", quantised),
        )
        if names
    ]
    if problems:
        hint = (
            "Use the unquantised checkpoint."
            if quantised
            else "config.json and the weights do not belong together; download the checkpoint again."
        )
        raise CheckpointError(f"The tensors are not those of the model. {'; '.join(problems)}.", where=where, hint=hint)


def _is_no_weight(dtype: str) -> bool:
    return dtype in _NOT_WEIGHTS or dtype.startswith(("F8_", "F6_"))


def load_tensors(source: CheckpointSource, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) one at a time, in the order of the files; GGUF tensors come dequantised to fp32.

    Args:
        source: the checkpoint; its headers are checked first.
        names: only these; None means all.

    Raises:
        CheckpointError: a name that is not there, or a damaged file.
    """
    gguf = read_gguf(source.path, source.gguf_file) if source.gguf_file is not None else None
    headers = gguf.headers if gguf is not None else read_folder_headers(source.path)
    wanted = set(headers if names is None else names)
    unknown = sorted(wanted - set(headers))
    if unknown:
        hint = "Compare config.json with the checkpoint (`hybridize inspect`)."
        raise CheckpointError(f"There is no tensor {name_some(unknown)}.", where=source.spec, hint=hint)
    ordered = sorted(wanted, key=lambda name: (headers[name].file, headers[name].offset_bytes))
    if gguf is not None:
        yield from load_gguf_tensors(source.path, gguf, ordered)
        return
    from safetensors import safe_open

    for shard in sorted({headers[name].file for name in ordered}):
        with safe_open(contained_path(source.path, shard), framework="pt") as file:
            for name in ordered:
                if headers[name].file == shard:
                    yield name, file.get_tensor(name)


def load_state(source: CheckpointSource, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """`load_tensors` as a dictionary."""
    return dict(load_tensors(source, names))
