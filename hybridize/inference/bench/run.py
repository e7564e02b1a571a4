"""A folder's model beside its teacher, loaded and measured."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from hybridize.inference.bench.dense import Attention
from hybridize.inference.bench.implementations import Implementation, dense, engine
from hybridize.inference.bench.measure import Case, Row, measure
from hybridize.model.load import load_any
from hybridize.model.precision import computes_bfloat16
from hybridize.progress import SILENT, Reporter

ON_GPU_CONTEXTS, ON_GPU_BATCHES = (1024, 8192, 32768), (1, 16)
ON_CPU_CONTEXTS, ON_CPU_BATCHES = (128, 512), (1,)
"""Where nothing is asked for: what a GPU does in minutes, and a CPU in seconds."""
_PREFILL_LIMIT_TOKENS = {"cuda": 2**19, "cpu": 2**14}
"""Larger cases are not read: decoding from a made-up state costs the same."""


def bench(
    model: str | Path,
    *,
    teacher: str | None,
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (),
    chunk_tokens: int | None = None,
    engine_teacher: bool = True,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
    offline: bool = False,
    reporter: Reporter = SILENT,
    seed: int = 0,
) -> dict[str, Any]:
    """Times a model in our engine, and its teacher by torch's own attention and in our engine.

    Args:
        model: a hybrid, or any model of a supported family.
        teacher: its specification; None: the model is measured alone.
        contexts, batches: tokens a sequence, and sequences; every pair is a case. None: a few that suit the device.
        chunk_tokens: of our engine's prefill; None: what suits the device.
        engine_teacher: the teacher in our engine, too.
        compiled: the teacher's step by torch.compile, too.
        seed: of the random tokens.

    Returns:
        {"machine": device, torch, triton and versions, "max_positions": longest context that the model was trained
        for, "rows": see `measure`}.

    Raises:
        CheckpointError: a model cannot be read.
        UsageError: a mixer or model that the engine does not take.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    contexts = tuple(contexts) or (ON_GPU_CONTEXTS if on_gpu else ON_CPU_CONTEXTS)
    batches = tuple(batches) or (ON_GPU_BATCHES if on_gpu else ON_CPU_BATCHES)
    with reporter.task("loading models", 1 if teacher is None else 2) as task:
        own = load_any(model, dtype=dtype, offline=offline).to(device)
        task.advance()
        other = None
        if teacher is not None:
            other = load_any(teacher, dtype=dtype, offline=offline).to(device)
            task.advance()
    name = "hybrid" if getattr(own, "mixers", None) else "model"
    implementations = [engine(name, own, chunk_tokens=chunk_tokens)]
    if other is not None:
        implementations += dense_ways(other, compiled=compiled)
        if engine_teacher:
            implementations.append(engine("teacher, engine", other, chunk_tokens=chunk_tokens))
    rows = measure(
        implementations,
        [Case(batch, context) for context in contexts for batch in batches],
        prefill_limit_tokens=_PREFILL_LIMIT_TOKENS[device.type],
        reporter=reporter,
        seed=seed,
    )
    return {
        "machine": machine(device, dtype),
        "max_positions": int(getattr(own.config, "max_position_embeddings", 0) or 0),
        "rows": list(rows),
    }


def pick_dtype(name: str) -> torch.dtype:
    """The type of that name; "auto": bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32


def dense_ways(model: Any, *, compiled: bool) -> list[Implementation]:
    """The teacher outside of our engine: both of torch's kernels on a GPU, the one that there is on a CPU."""
    kernels: tuple[Attention, ...] = ("cudnn", "flash") if model.device.type == "cuda" else ("flash",)
    ways = [dense(model, attention) for attention in kernels]
    return [*ways, dense(model, "flash", compiled=True)] if compiled else ways


def machine(device: torch.device, dtype: torch.dtype) -> Row:
    """What the numbers hold for."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "torch": torch.__version__,
        "triton": triton_version(),
        "versions": dict(_versions()),
        "dtype": str(dtype).removeprefix("torch."),
    }


def triton_version() -> str | None:
    """None where there is no Triton."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _versions() -> Iterator[tuple[str, str | None]]:
    yield "python", platform.python_version()
    yield "cuda", torch.version.cuda
    yield "transformers", transformers.__version__
