"""Reading whole checkpoints to judge them: numbers that are finite, bytes that are those of the manifest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridize.checkpoint.files import read_json_object
from hybridize.checkpoint.folder import INDEX_FILE, MANIFEST_FILE, SINGLE_FILE, name_some
from hybridize.checkpoint.manifest import FORMAT, MAX_MANIFEST_BYTES, compare_with_manifest, folder_files, read_manifest
from hybridize.checkpoint.reader import load_tensors, tensor_headers
from hybridize.checkpoint.source import CheckpointSource
from hybridize.errors import CheckpointError, NumbersError, VerificationError

if TYPE_CHECKING:
    import torch

_AGAIN = "Copy or download the folder again, or repeat the command that wrote it."


@dataclass(frozen=True)
class WeightScan:
    """What reading every tensor once found.

    Attributes:
        num_tensors: how many were read.
        num_matrices: how many of them have two dimensions or more.
        not_finite: names of tensors with NaN or Inf.
        all_zero: names of matrices that are zero throughout.
    """

    num_tensors: int
    num_matrices: int
    not_finite: tuple[str, ...]
    all_zero: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences for the user; empty when nothing is odd."""
        return tuple(f"The matrix {name} is zero throughout; the file may be damaged." for name in self.all_zero)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_folder` checked; it only exists when everything was right.

    Attributes:
        folder: what was checked.
        kind: the manifest's kind.
        num_files: files compared with the manifest.
        size_bytes: of those files.
        num_tensors: tensors of the model in the folder; 0 if it holds none.
        warnings: oddities that are no fault.
    """

    folder: Path
    kind: str
    num_files: int
    size_bytes: int
    num_tensors: int
    warnings: tuple[str, ...]


def scan_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> WeightScan:
    """Report NaN, Inf and all-zero matrices among named tensors. Nothing is raised for what is found."""
    num_tensors = num_matrices = 0
    not_finite: list[str] = []
    all_zero: list[str] = []
    for name, tensor in tensors:
        num_tensors += 1
        num_matrices += tensor.dim() >= 2
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.element_size() == 1:
            tensor = tensor.float()  # 8-bit floats have no order
        # The extremes tell both: NaN spreads through them, and they need no second copy of the tensor.
        least, greatest = (float(extreme) for extreme in tensor.detach().aminmax())
        if not (math.isfinite(least) and math.isfinite(greatest)):
            not_finite.append(name)
        elif tensor.dim() >= 2 and least == greatest == 0:
            all_zero.append(name)
    return WeightScan(num_tensors, num_matrices, tuple(not_finite), tuple(all_zero))


def scan_finite(source: CheckpointSource) -> WeightScan:
    """`scan_tensors` of a checkpoint's files, one tensor in memory at a time."""
    return scan_tensors(load_tensors(source))


def require_usable_weights(
    source: CheckpointSource, tensors: Iterable[tuple[str, torch.Tensor]] | None = None
) -> WeightScan:
    """Judge all weights before work begins; raise for those that no model can be made from.

    A folder that carries a manifest of ours is compared with it first, which finds a single flipped bit.

    Args:
        source: the checkpoint.
        tensors: its tensors if they are loaded already (``model.named_parameters()``); else they are read.

    Raises:
        NumbersError: NaN or Inf, by tensor name.
        CheckpointError: files that differ from the manifest, or most matrices zero throughout: the bodies were lost.
    """
    if source.gguf_file is None and has_our_manifest(source.path):
        # Other files may lie beside the model: nobody reads them.
        manifest, beside = read_manifest(source.path), folder_files(source.path)
        differences = compare_with_manifest(source.path, manifest, allow_extra=beside)
        if differences:
            what = f"The folder is not what its manifest says ({differences})."
            raise CheckpointError(what, where=str(source.path), hint=_AGAIN)
    scan = scan_finite(source) if tensors is None else scan_tensors(tensors)
    if scan.not_finite:
        what = f"{len(scan.not_finite)} tensors hold NaN or Inf: {name_some(list(scan.not_finite))}."
        hint = "The checkpoint is damaged or diverged in training; download it again or use another revision."
        raise NumbersError(what, where=source.spec, hint=hint)
    if 2 * len(scan.all_zero) > scan.num_matrices:
        what = f"{len(scan.all_zero)} of {scan.num_matrices} matrices are zero: {name_some(list(scan.all_zero))}."
        raise CheckpointError(what, where=source.spec, hint="The file lost its contents; download it again.")
    return scan


def verify_folder(folder: str | Path, *, allow_extra: Collection[str] = (), finite: bool = True) -> VerifyReport:
    """Check a folder of ours against its manifest: every file there, none besides, each byte the same.

    Tensor headers are parsed and, unless `finite` is False, every weight is checked for NaN and Inf.

    Raises:
        CheckpointError: no manifest, or a damaged one.
        VerificationError: names every file that is missing, changed or extra, or tensors that are not finite.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    differences = compare_with_manifest(folder, manifest, allow_extra=allow_extra)
    if differences:
        what = f"The folder is not what its manifest says ({differences})."
        raise VerificationError(what, where=str(folder), hint=_AGAIN)
    size = sum(record.size_bytes for record in manifest.files.values())
    num_tensors = 0
    warnings: tuple[str, ...] = ()
    if SINGLE_FILE in manifest.files or INDEX_FILE in manifest.files:
        num_tensors, warnings = _verify_weights(folder, finite)
    return VerifyReport(folder, manifest.kind, len(manifest.files), size, num_tensors, warnings)


def _verify_weights(folder: Path, finite: bool) -> tuple[int, tuple[str, ...]]:
    source = CheckpointSource("folder", folder, None, str(folder), None, 0)
    if not finite:
        return len(tensor_headers(source)), ()
    scan = scan_finite(source)
    if scan.not_finite:
        what = f"Tensors hold NaN or Inf: {name_some(list(scan.not_finite))}."
        raise VerificationError(what, where=str(folder), hint="The model was broken when it was saved; write it again.")
    return scan.num_tensors, scan.warnings


def has_our_manifest(folder: Path) -> bool:
    """Whether the folder holds a manifest that hybridize wrote; teachers may carry a manifest.json of their own."""
    path = folder / MANIFEST_FILE
    return (
        path.exists() and read_json_object(folder, MANIFEST_FILE, max_bytes=MAX_MANIFEST_BYTES).get("format") == FORMAT
    )
