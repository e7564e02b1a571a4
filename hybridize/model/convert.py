"""convert: the plan carried out. Teacher in, loadable hybrid checkpoint out; nothing is trained here."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybridize.checkpoint import (
    AtomicFolder,
    require_free_disk,
    require_memory,
    resolve_source,
    save_tensors,
    source_fingerprint,
)
from hybridize.errors import CheckpointError
from hybridize.model.load import load_teacher, load_tokenizer
from hybridize.model.swap import swap
from hybridize.progress import SILENT, Reporter

if TYPE_CHECKING:
    from hybridize.plan import ConversionPlan


def convert(
    plan: ConversionPlan,
    out: Path,
    *,
    overwrite: bool = False,
    offline: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    """Builds the hybrid that `plan` describes and writes it.

    Args:
        plan: from `hybridize.plan.plan`.
        out: folder to write: weights, config.json with the `hybridize` block, tokenizer, plan.json, manifest.json.
        overwrite: replace a folder that is not empty.

    Returns:
        `out`.

    Raises:
        CheckpointError, FamilyError, NumbersError: the teacher cannot be used, or changed since it was planned for.
        ResourceError, UsageError: the folder cannot be written.
    """
    source = resolve_source(plan.teacher, offline=offline)
    if source_fingerprint(source, headers_only=True) != plan.fingerprint:
        raise CheckpointError(
            "the teacher is not the one that was planned for.", where=plan.model, hint="Plan again: hybridize plan."
        )
    require_memory(plan.bill.convert_memory_bytes)
    require_free_disk(Path(out).absolute().parent, plan.bill.disk_bytes)
    provenance = {"teacher": plan.model, "revision": plan.revision, "fingerprint": plan.fingerprint}
    atomic = AtomicFolder(out, overwrite=overwrite, kind="converted", provenance=provenance)
    with atomic as folder, reporter.task("convert", total=4) as task:
        task.advance(0, step="reading the teacher")
        model = load_teacher(source, dtype=getattr(torch, plan.dtype))
        task.advance(1, step="putting in the mixers")
        torch.manual_seed(plan.seed)
        swap(model, plan.layers)
        task.advance(1, step="writing the weights")
        save_model(model, folder)
        del model
        gc.collect()
        task.advance(1, step="writing the tokenizer")
        save_tokenizer(load_tokenizer(source), folder)
        plan.save(folder / "plan.json")
        task.advance(1)
    for note in atomic.notes:
        reporter.note(note)
    return Path(out)


def save_model(
    model: Any, folder: Path, *, max_shard_bytes: float = 5e9, extra_config: dict[str, Any] | None = None
) -> None:
    """Writes weights, config.json and generation_config.json of a hybrid into an existing folder.

    A head tied to the embedding is left out, as transformers does; other shared tensors are written under each name.
    """
    tied = set()
    if getattr(model.config, "tie_word_embeddings", False):
        tied.add("lm_head.weight")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_tensors(folder, tensors, skip=tied, max_shard_bytes=max_shard_bytes)
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(next(iter(model.parameters())).dtype).removeprefix("torch.")
    config.update(extra_config or {})
    write_json(folder / "config.json", config)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer's files, without what only says how it was loaded here."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    write_json(path, settings)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with sorted keys and a final newline: the same value gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
