"""Evaluation from folders to results.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridize.errors import UsageError
from hybridize.evaluation.device import pick_device, pick_dtype
from hybridize.evaluation.probes import Probes
from hybridize.evaluation.provenance import model_record, provenance
from hybridize.evaluation.results import SCHEMA, contents_sha256, write_results
from hybridize.model.load import load_any, load_tokenizer
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.documents import Document, held_out_documents, read_documents
from hybridize.recipe.probes import Evaluate
from hybridize.recipe.schema import Data
from hybridize.recipe.sources import TextSource

MAX_SOURCE_BYTES = 16 * 2**20
"""Held-out text read of each source: far more than the probes use, and no data set is read to its end for it."""


def evaluate(
    model_folder: str | Path,
    *,
    teacher: str | None,
    recipe_evaluate: Evaluate,
    held_out: Sequence[TextSource] | Data,
    base: Path,
    out: Path | None = None,
    reporter: Reporter = SILENT,
    seed: int = 0,
    offline: bool = False,
    recipe_sha256: str | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Measures a model against its teacher.

    Args:
        model_folder: a hybrid, or any model of a supported family.
        teacher: its specification; None: the student is measured alone, and nothing is compared.
        recipe_evaluate: which probes, and how.
        held_out: text sources that the student has not been trained on, or a recipe's `data`, which says them.
        base: folder that the sources' relative paths start from.
        out: the results.json to write.
        seed: of needles and keys.
        recipe_sha256, command: recorded as provenance.

    Returns:
        The content of results.json: "schema", "model", "teacher", "provenance", "probes". A probe that ran out of
        memory has "status": "failed" (`results.failed_probes` lists them).

    Raises:
        CheckpointError, RecipeError: a model or text cannot be read.
        NumbersError: logits are not finite.
        UsageError: teacher and student have different vocabularies.
    """
    device = pick_device()
    dtype = pick_dtype(recipe_evaluate.precision, device)
    documents = _documents(held_out, base, offline)
    with reporter.task("loading models", 1 if teacher is None else 2) as task:
        student_model = load_any(model_folder, dtype=dtype, offline=offline).to(device).eval()
        task.advance()
        teacher_model = None
        if teacher is not None:
            teacher_model = load_any(teacher, dtype=dtype, offline=offline).to(device).eval()
            task.advance()
    _require_one_vocabulary(student_model, teacher_model)
    tokenizer = load_tokenizer(model_folder, offline=offline)
    probes = Probes(
        student_model,
        teacher_model,
        tokenizer,
        recipe_evaluate,
        documents,
        base=base,
        offline=offline,
        seed=seed,
        reporter=reporter,
    )
    results = {
        "schema": SCHEMA,
        "model": {
            **model_record(str(model_folder), offline=offline),
            "contents_sha256": contents_sha256(Path(model_folder)),
        },
        "teacher": None if teacher is None else model_record(teacher, offline=offline),
        "provenance": provenance(
            settings=recipe_evaluate,
            documents=documents,
            device=device,
            dtype=dtype,
            batch_tokens=probes.batch_tokens,
            seed=seed,
            recipe_sha256=recipe_sha256,
            command=command,
        ),
        "probes": probes.run(),
    }
    if out is not None:
        write_results(results, out)
    return results


def _documents(held_out: Sequence[TextSource] | Data, base: Path, offline: bool) -> list[Document]:
    if isinstance(held_out, Data):
        return list(held_out_documents(held_out, base, offline=offline, limit_bytes=MAX_SOURCE_BYTES))
    return [
        document
        for source in held_out
        for document in read_documents(source, base, offline=offline, limit_bytes=MAX_SOURCE_BYTES)
    ]


def _require_one_vocabulary(student: Any, teacher: Any | None) -> None:
    if teacher is None or student.config.vocab_size == teacher.config.vocab_size:
        return
    raise UsageError(
        f"the student has {student.config.vocab_size} tokens and the teacher {teacher.config.vocab_size}.",
        where="--against",
        hint="Compare a hybrid with the model that it was converted from.",
    )
