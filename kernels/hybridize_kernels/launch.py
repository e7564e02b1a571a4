"""Launch a Triton kernel again without the questions of the first time.

Triton looks at every argument of every launch, and its launcher asks the driver about every pointer; both take longer
than many of our kernels run. Where numbers, constants and dtypes are known to be the same, here only the device and the
alignment of the pointers are looked at.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from .dispatch import early_launches, is_nvidia, launches_early

__all__ = ["Launch", "early_launches", "early_option", "launch", "launches_early", "remembers"]

MOST = 4096
"""Launches remembered by `launch`; texts of ever new lengths make ever new ones."""

_remembered: dict[tuple[Any, ...], Launch] = {}


def early_option(early: bool) -> dict[str, Any]:
    """The option of a launch that other backends do not know."""
    return {"launch_pdl": True} if early else {}


class Launch:
    """A kernel with its grid, numbers and constants, ready for pointers.

    Args:
        kernel: its parameters are pointers, then numbers, then constants.
        constants: the constexpr parameters in any order, and options of the compiler.
    """

    __slots__ = ("_arguments", "_compiled", "_constants", "_grid", "_kernel", "_numbers", "_remembers")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int | float, ...], constants: dict[str, Any]
    ) -> None:
        self._kernel, self._numbers, self._constants = kernel, numbers, constants
        self._grid = (*grid, 1, 1)[:3]
        self._remembers = remembers(kernel)
        self._compiled: Any = None
        self._arguments: tuple[Any, ...] = ()

    def __call__(self, *pointers: Tensor) -> None:
        """Runs on the pointers' device and its current stream; their device and dtypes are the same every time.

        Raises:
            ValueError: the tensors lie on several devices.
        """
        device = pointers[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*pointers)
            return
        if not self._remembers or device < 0:
            self._kernel[self._grid](*pointers, *self._numbers, **self._constants)
            return
        # The driver takes any address: whether it is one of this GPU is asked here.
        if len({tensor.get_device() for tensor in pointers}) > 1:
            devices = ", ".join(sorted({str(tensor.device) for tensor in pointers}))
            raise ValueError(f"{self._kernel.__name__}: tensors on {devices}, expected all on one GPU")
        addresses = [tensor.data_ptr() for tensor in pointers]
        # Triton compiles other code for pointers that are not aligned.
        aligned = not reduce(or_, addresses) & 15
        compiled = self._compiled
        if not aligned or compiled is None or _hooked():
            compiled = self._kernel[self._grid](*pointers, *self._numbers, **self._constants)
            if aligned and compiled is not None:  # None where a hook of Triton's took the launch over
                names = self._kernel.arg_names[len(pointers) + len(self._numbers) :]
                self._arguments = (*self._numbers, *[self._constants[name] for name in names])
                self._compiled = compiled
            return
        compiled.run(
            *self._grid,
            triton.runtime.driver.active.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            None,  # what hooks would be told, and the hooks
            None,
            None,
            *addresses,
            *self._arguments,
        )


def launch(
    kernel: Any, grid: tuple[int, ...], pointers: tuple[Tensor, ...], numbers: tuple[int | float, ...], **constants: Any
) -> None:
    """`kernel[grid](*pointers, *numbers, **constants)` on the pointers' device, remembered by all but the addresses."""
    if not remembers(kernel):
        Launch(kernel, grid, numbers, constants)(*pointers)
        return
    dtypes = [tensor.dtype for tensor in pointers]
    key = (kernel.fn, pointers[0].get_device(), *dtypes, grid, numbers, *constants, *constants.values())
    ready = _remembered.get(key)
    if ready is None:
        if len(_remembered) >= MOST:
            _remembered.clear()
        ready = _remembered[key] = Launch(kernel, grid, numbers, constants)
    ready(*pointers)


def remembers(kernel: Any) -> bool:
    """Interpreted kernels have no compiled code; for AMD's compiler, sizes of tensors matter too."""
    return is_nvidia() and isinstance(kernel, JITFunction)


def _hooked() -> bool:
    """Whether somebody, a profiler say, wants to be told of launches."""
    runtime = triton.knobs.runtime
    # A hook is a chain of calls, or one call, or None.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
