"""The files of a safetensors checkpoint: which shards there are, and that they and the index tell one story."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridize.checkpoint.files import PICKLE_SUFFIXES, check_shard_name, contained_path, list_names, read_json_object
from hybridize.checkpoint.safetensors_header import TensorHeader, read_safetensors_header
from hybridize.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "manifest.json"
MAX_INDEX_BYTES = 32 * 2**20
MAX_INDEX_ENTRIES = 500_000  # the largest open models have about 10^5 tensors

_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SAME_SIZE_FLOATS = {"float16": "BF16", "bfloat16": "F16"}  # what a file must not hold when config.json says the key


def read_folder_headers(folder: Path) -> dict[str, TensorHeader]:
    """Headers of every tensor in a safetensors folder, after checking shards and index against each other.

    Raises:
        CheckpointError: a fault in a file, a hostile name, or files that do not belong together.
    """
    present = [name for name in list_names(folder) if name.endswith(".safetensors")]
    has_index = (folder / INDEX_FILE).exists() or (folder / INDEX_FILE).is_symlink()
    if not has_index and SINGLE_FILE not in present:
        raise _no_weights(folder, present)
    weight_map = _read_index(folder) if has_index else None
    shards = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    for name in present:
        if name not in shards and _SHARD.fullmatch(name):
            what = f"The shard is not listed in {INDEX_FILE}." if has_index else f"It stands beside a {SINGLE_FILE}."
            hint = "Two checkpoints may be mixed in this folder; download the checkpoint again into an empty one."
            raise CheckpointError(what, where=str(folder / name), hint=hint)
    headers: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, header in read_safetensors_header(folder, shard).items():
            if name in headers:
                what = f"Tensor {name!r} is also in {headers[name].file}."
                hint = "Two checkpoints may be mixed in this folder; download the checkpoint again."
                raise CheckpointError(what, where=str(folder / shard), hint=hint)
            headers[name] = header
    if weight_map is not None:
        _compare_with_index(folder, weight_map, headers)
    return headers


def check_safetensors_folder(folder: Path, *, complete: bool = True) -> dict[str, TensorHeader]:
    """Every refusal that needs no tensor body: files, names, index, headers, dtype, tokenizer code, completeness.

    Args:
        folder: the checkpoint.
        complete: also refuse a folder that hybridize wrote and that has no manifest (a write that was cut off).

    Returns:
        the headers by tensor name.
    """
    config = read_json_object(folder, "config.json")
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists() or (folder / name).is_symlink():
            _refuse_tokenizer_code(folder, name)
    headers = read_folder_headers(folder)
    _refuse_relabelled(folder, config, headers)
    if complete and "hybridize" in config and not (folder / MANIFEST_FILE).exists():
        what = f"There is no {MANIFEST_FILE}: the folder was not written to its end."
        hint = "Run the command that wrote it again."
        raise CheckpointError(what, where=str(folder), hint=hint)
    return headers


def _no_weights(folder: Path, present: list[str]) -> CheckpointError:
    pickles = [name for name in list_names(folder) if name.endswith(PICKLE_SUFFIXES)]
    if any(_SHARD.fullmatch(name) for name in present):
        what = f"There are shards but no {INDEX_FILE}."
        hint = "Download the index too; without it nobody can tell whether a shard is missing."
    elif present:
        what = f"There is no {SINGLE_FILE} or {INDEX_FILE}, only {', '.join(present[:4])}."
        hint = f"If it is the whole model, rename it to {SINGLE_FILE}; adapters must be merged first."
    elif pickles:
        what = f"The weights are pickle files only ({', '.join(pickles[:4])}), which can run code when read."
        hint = (
            "Convert them to safetensors where you trust them (load with transformers, then save_pretrained), "
            "or use a revision of the model that has safetensors."
        )
    else:
        what = f"There are no weights: neither {SINGLE_FILE} nor {INDEX_FILE}."
        hint = "Give the folder of a whole checkpoint."
    return CheckpointError(what, where=str(folder), hint=hint)


def _read_index(folder: Path) -> dict[str, str]:
    where = str(folder / INDEX_FILE)
    weight_map = read_json_object(folder, INDEX_FILE, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        hint = "The index is damaged; download it again."
        raise CheckpointError("The index holds no `weight_map`.", where=where, hint=hint)
    if len(weight_map) > MAX_INDEX_ENTRIES:
        what = f"The index lists {len(weight_map):,} tensors; at most {MAX_INDEX_ENTRIES:,} are read."
        raise CheckpointError(what, where=where, hint="No model has this many tensors; the index is not genuine.")
    names = {check_shard_name(name, where=where) for name in _distinct(weight_map)}
    for name in sorted(names):
        contained_path(folder, name)
    return weight_map


def _distinct(weight_map: Mapping[str, Any]) -> list[Any]:
    """The index's file names, each once; unhashable values are kept for the name check to refuse."""
    names = {value for value in weight_map.values() if isinstance(value, str)}
    return [*sorted(names), *(value for value in weight_map.values() if not isinstance(value, str))]


def _compare_with_index(folder: Path, weight_map: Mapping[str, str], headers: Mapping[str, TensorHeader]) -> None:
    where = str(folder / INDEX_FILE)
    hint = "Index and shards are of different checkpoints; download both again."
    missing = sorted(name for name, file in weight_map.items() if name not in headers or headers[name].file != file)
    if missing:
        what = f"{len(missing)} tensors are not in the shard that the index names: {name_some(missing)}."
        raise CheckpointError(what, where=where, hint=hint)
    unlisted = sorted(name for name in headers if name not in weight_map)
    if unlisted:
        what = f"{len(unlisted)} tensors of the shards are not in the index: {name_some(unlisted)}."
        raise CheckpointError(what, where=where, hint=hint)


def name_some(names: list[str], limit: int = 8) -> str:
    """The first `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name[:200] for name in names[:limit]) + more


def _refuse_tokenizer_code(folder: Path, name: str) -> None:
    settings = read_json_object(folder, name, max_bytes=64 * 2**20)
    auto_map = settings.get("auto_map")
    if isinstance(auto_map, dict) and "AutoTokenizer" in auto_map:
        what = "The tokenizer needs Python code from the checkpoint, which is never run."
        hint = "Use a checkpoint with a tokenizer.json, or remove `auto_map` if the tokenizer works without it."
        raise CheckpointError(what, where=str(folder / name), hint=hint)


def _refuse_relabelled(folder: Path, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> None:
    """float16 and bfloat16 have equal sizes, so that a wrong label passes every size check and ruins the weights."""
    stated = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    wrong = _SAME_SIZE_FLOATS.get(stated)
    tensors = sorted(header.name for header in headers.values() if header.dtype == wrong)
    if tensors:
        what = f"config.json says {stated}, and these tensors are labelled {wrong}: {name_some(tensors)}."
        hint = "One of the two is wrong; download the checkpoint again, or correct `dtype` in config.json if you know."
        raise CheckpointError(what, where=str(folder / headers[tensors[0]].file), hint=hint)
