"""Which form of an op runs: the reference (the spec), eager (plain PyTorch) or a Triton kernel.

The choice is made once a call, here and nowhere else, from device, dtype, gradient mode and what the op says of its
shapes. `use_implementation` overrides it, which is how tests compare the forms. Whatever else depends on the GPU that
this is, or on torch.compile, is asked here too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch

Implementation = Literal["reference", "eager", "triton"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "eager", "triton")

Result = TypeVar("Result")

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None
_forced: ContextVar[Implementation | None] = ContextVar("hybridize_kernels_implementation", default=None)
_early: ContextVar[bool] = ContextVar("hybridize_kernels_early_launches", default=False)


@contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Every op called inside the block runs in the named form; an op that lacks the form raises ValueError."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(
    op: str,
    *tensors: torch.Tensor | None,
    has_kernel: bool = False,
    kernel_fits: bool = False,
    kernel_has_gradient: bool = False,
) -> Implementation:
    """The form in which `op` runs on these tensors.

    has_kernel: the op has a Triton kernel at all. kernel_fits: that kernel covers the shapes of this call;
    kernel_has_gradient: also where a gradient is asked for. A kernel is chosen by itself only on CUDA; forced, it also
    runs in Triton's interpreter on the CPU.
    """
    covered = kernel_fits and (kernel_has_gradient or not needs_grad(*tensors))
    forced = _forced.get()
    if forced == "triton":
        if not has_kernel:
            raise ValueError(f"{op} has no Triton kernel: use 'eager' or 'reference'")
        if not _HAS_TRITON:
            raise ValueError(f"{op}: Triton is not installed: use 'eager' or 'reference'")
        if not covered:
            raise ValueError(f"the Triton kernel of {op} does not cover this call: its shapes, or a gradient is needed")
    if forced is not None:
        return forced
    present = [tensor for tensor in tensors if tensor is not None]
    on_gpu = all(tensor.device.type == "cuda" and tensor.dtype in _TRITON_DTYPES for tensor in present)
    if has_kernel and covered and _HAS_TRITON and on_gpu:
        return "triton"
    return "eager"


def is_nvidia() -> bool:
    """Whether the GPUs that this torch drives are NVIDIA's."""
    return torch.version.cuda is not None


def is_hopper(device: int) -> bool:
    """Whether the GPU of this index (−1: the CPU) has Hopper's matrix units."""
    return device >= 0 and is_nvidia() and torch.cuda.get_device_capability(device)[0] == 9


@contextmanager
def early_launches() -> Iterator[None]:
    """Kernels of decoding steps called inside the block begin while the one before them still runs, where the GPU can
    (programmatic dependent launch, Hopper). Until it has ended they read nothing but weights and decoding states: for
    blocks in which no state is stepped twice and no weight is written."""
    token = _early.set(True)
    try:
        yield
    finally:
        _early.reset(token)


def launches_early(tensor: torch.Tensor) -> bool:
    """Whether a kernel on this tensor's device is to begin early: compiled with waits, launched with `early_option`."""
    return _early.get() and is_hopper(tensor.get_device())


def multiprocessors(device: int) -> int:
    """How many programs the GPU of this index (−1: the CPU) runs side by side at least."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 1


def current_stream(device: torch.device) -> int:
    """The stream that work on this device goes to now; 0 on the CPU."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether work on this device is recorded for a CUDA graph, and not done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def untraced(run: Callable[..., Result]) -> Callable[..., Result]:
    """`run` as it is, or while torch.compile traces, in a form that it calls and does not look into."""
    return torch.compiler.disable(run) if torch.compiler.is_compiling() else run


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True when autograd records now and any of the tensors asks for a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError, naming the op and the argument, unless the tensor has exactly the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)}")


def check_texts(
    op: str, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> None:
    """Raise ValueError unless queries `[B, T, HQ, D]` and keys `[B, T, H, D]` are of the same texts.

    positions: `[B, T]`, or cu_seqlens: `[N + 1]` with B = 1, or neither.
    """
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q {list(q.shape)} and k {list(k.shape)} must be [batch, time, heads, head size]")
    batch, time, query_heads, head_size = q.shape
    heads = k.shape[2]
    if heads == 0 or query_heads % heads:
        raise ValueError(f"{op}: {query_heads} query heads are not a multiple of {heads} key heads")
    check_shape(op, "k", k, (batch, time, heads, head_size))
    if positions is not None:
        check_shape(op, "positions", positions, (batch, time))
    if cu_seqlens is None:
        return
    if positions is not None:
        raise ValueError(f"{op}: positions and cu_seqlens both say where a text begins: give one of them")
    if batch != 1 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)} for {batch} rows, expected the bounds of the "
            "documents of one row"
        )
