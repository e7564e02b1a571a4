"""Launch a Triton kernel with the same numbers again without looking its compiled code up anew.

Triton inspects every argument of every launch, which takes longer than many of our kernels run. Here the numbers of a
launch are one key; only the pointers are looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

MOST = 4096
"""Launches remembered; texts of ever new lengths make ever new ones."""

_remembered: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], pointers: tuple[Tensor, ...], numbers: tuple[int | float, ...], **constants: Any
) -> None:
    """`kernel[grid](*pointers, *numbers, **constants)`, on the current device and stream.

    Args:
        kernel: its parameters are pointers, then numbers, then constants.
        constants: the constexpr parameters in any order, and options of the compiler.
    """
    addresses = 0
    if torch.version.cuda and isinstance(kernel, JITFunction) and not torch.compiler.is_compiling():
        for tensor in pointers:
            addresses |= tensor.data_ptr()
    else:
        addresses = -1  # interpreted and traced calls have no compiled code; for AMD's, sizes of tensors matter too
    if addresses & 15:  # Triton compiles other code for pointers that are not aligned
        kernel[grid](*pointers, *numbers, **constants)
        return
    dtypes = [tensor.dtype for tensor in pointers]
    key = (kernel.fn, pointers[0].get_device(), *dtypes, numbers, *constants, *constants.values())
    remembered = _remembered.get(key)
    if remembered is None:
        compiled = kernel[grid](*pointers, *numbers, **constants)
        if len(_remembered) >= MOST:
            _remembered.clear()
        if compiled is not None:  # as it is where a hook of Triton's took the launch over
            names = kernel.arg_names[len(pointers) + len(numbers) :]
            _remembered[key] = compiled, (*numbers, *[constants[name] for name in names])
        return
    compiled, rest = remembered
    compiled[(*grid, 1, 1)[:3]](*pointers, *rest)
