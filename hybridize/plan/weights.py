"""Whether a checkpoint holds the tensors of the teacher that its config.json describes."""

from __future__ import annotations

from hybridize.checkpoint import CheckpointSource, TensorHeader, check_folder, check_tensors
from hybridize.families import AttentionGeometry, FamilyAdapter

UNREAD = (".rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints hold and nobody reads."""


def check_teacher_tensors(
    source: CheckpointSource, adapter: FamilyAdapter, geometry: AttentionGeometry
) -> dict[str, TensorHeader]:
    """Compares the headers of a checkpoint with what its family needs; returns them.

    A head that is tied to the embedding may be stored or not.

    Raises:
        CheckpointError: damaged or hostile files, or tensors missing, unexpected or misshapen.
    """
    headers = check_folder(source)
    expected = adapter.tensor_shapes(geometry)
    tied = {"lm_head.weight": expected["model.embed_tokens.weight"]} if geometry.tied_embeddings else {}
    check_tensors(headers, {**expected, **tied}, optional=tuple(tied), extra_allowed=UNREAD, where=source.spec)
    return headers
