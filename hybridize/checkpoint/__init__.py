"""The only code that opens model files: finding, checking, reading, writing and verifying checkpoints."""

from hybridize.checkpoint.faults import fault_point
from hybridize.checkpoint.hashing import sha256_bytes, sha256_file, source_fingerprint
from hybridize.checkpoint.lock import FolderLock
from hybridize.checkpoint.manifest import FileRecord, Manifest, read_manifest, replace_in_manifest, write_manifest
from hybridize.checkpoint.reader import (
    check_folder,
    check_tensors,
    load_state,
    load_tensors,
    read_config,
    tensor_headers,
)
from hybridize.checkpoint.resources import require_free_disk, require_memory, resource_errors
from hybridize.checkpoint.safetensors_header import TensorHeader
from hybridize.checkpoint.safetensors_writer import save_tensors
from hybridize.checkpoint.single_file import load_file, load_one, require_place, save_file
from hybridize.checkpoint.source import CheckpointSource, resolve_source
from hybridize.checkpoint.verify import (
    VerifyReport,
    WeightScan,
    has_our_manifest,
    require_usable_weights,
    scan_finite,
    scan_tensors,
    verify_folder,
)
from hybridize.checkpoint.writer import AtomicFolder

__all__ = [
    "AtomicFolder",
    "CheckpointSource",
    "FileRecord",
    "FolderLock",
    "Manifest",
    "TensorHeader",
    "VerifyReport",
    "WeightScan",
    "check_folder",
    "check_tensors",
    "fault_point",
    "has_our_manifest",
    "load_file",
    "load_one",
    "load_state",
    "load_tensors",
    "read_config",
    "read_manifest",
    "replace_in_manifest",
    "require_free_disk",
    "require_memory",
    "require_place",
    "require_usable_weights",
    "resolve_source",
    "resource_errors",
    "save_file",
    "save_tensors",
    "scan_finite",
    "scan_tensors",
    "sha256_bytes",
    "sha256_file",
    "source_fingerprint",
    "tensor_headers",
    "verify_folder",
    "write_manifest",
]
