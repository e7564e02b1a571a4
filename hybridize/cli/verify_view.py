"""Verifying a model: against the manifest if it is ours, against its config.json if it is a teacher."""

from __future__ import annotations

from typing import Any

from hybridize.checkpoint import (
    has_our_manifest,
    read_config,
    require_usable_weights,
    resolve_source,
    verify_folder,
)
from hybridize.families import family_of_config
from hybridize.plan import check_teacher_tensors


def verify_model(spec: str, *, offline: bool, finite: bool) -> dict[str, Any]:
    """What was checked; it only returns when everything was right.

    Raises:
        VerificationError: a folder of ours is not what its manifest says.
        CheckpointError: files or tensors are damaged, missing or misshapen.
        NumbersError: a teacher's weights are not finite.
    """
    source = resolve_source(spec, offline=offline)
    values: dict[str, Any] = {"model": spec, "manifest": None, "files": 0, "warnings": []}
    if source.gguf_file is None and has_our_manifest(source.path):
        report = verify_folder(source.path, finite=finite)
        warnings = list(report.warnings)
        return {
            **values,
            "manifest": report.kind,
            "files": report.num_files,
            "tensors": report.num_tensors,
            "finite": finite or None,
            "warnings": warnings,
        }
    adapter, geometry = family_of_config(read_config(source))
    headers = check_teacher_tensors(source, adapter, geometry)
    warnings = list(require_usable_weights(source).warnings) if finite else []
    return {**values, "tensors": len(headers), "finite": finite or None, "warnings": warnings}
