"""Triton's interpreter without what it does again and again: the same numbers in a third of the time.

Nothing is left out that could fail. What changes, of Triton 3.6 and 3.7:

- A kernel's launch puts the interpreted functions into `triton.language` and takes them out at its end. Each call of a
  `triton.jit` function within the kernel, `tl.sum` and `tl.cdiv` too, walks through the modules to put them in once
  more; here a launch does it once.
- Each sum, difference and product of int32 is repeated in int64 and compared, for an assertion that is then dropped,
  since the interpreter's option `debug` is off; here the option `sanitize_overflow` is off, too.
- What follows from a dtype's name or from a shape alone (a numpy dtype, the number of elements, the constants that a
  tensor has for its shape) is made anew for each result of each operation; here it is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from types import FunctionType
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class Patches:
    """`_patch_lang`, once a launch for each of the modules that it goes through.

    Args:
        patch: the interpreter's own: functions for `triton.language` and its `core`, as far as a kernel's globals name
            them, with a scope that takes them out again.
    """

    def __init__(self, patch: Callable[[FunctionType], Any]) -> None:
        self.__wrapped__ = patch
        self._scopes: list[Any] = []
        self._patched: set[str] = set()

    def __call__(self, function: FunctionType) -> Any:
        """The scope that ends with the launch; within one, a scope of nothing."""
        is_launch = not self._scopes
        languages = languages_of(function)
        if is_launch or not languages <= self._patched:
            self._scopes.append(self.__wrapped__(function))
            self._patched |= languages
        return self if is_launch else interpreter._LangPatchScope()

    def restore(self) -> None:
        """Ends the launch."""
        while self._scopes:
            self._scopes.pop().restore()
        self._patched.clear()


@cache
def languages_of(function: FunctionType) -> frozenset[str]:
    """Names of the modules that hold what a kernel calls, of those that the interpreter changes."""
    modules = {id(module): module.__name__ for module in (tl, tl.core)}
    return frozenset(modules[id(x)] for x in function.__globals__.values() if id(x) in modules)


def remember_numpy_dtypes(own: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """`_get_np_dtype`, which depends on a scalar's name alone."""
    found: dict[str, np.dtype] = {}

    @wraps(own)
    def look_up(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in found:
            found[name] = own(dtype)
        return found[name]

    return look_up


def remember_block_types(own: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`: all but the element type itself follows from its name and the shape, and stays."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    @wraps(own)
    def initialise(self: Any, element_ty: Any, shape: Any) -> None:
        if not isinstance(shape, (list, tl.core.tuple)):
            own(self, element_ty, shape)  # which refuses it
            return
        key = (element_ty.name, *(x.value if isinstance(x, tl.constexpr) else x for x in shape))
        if key in found:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = found[key]
        else:
            own(self, element_ty, shape)
            found[key] = self.shape, self.numel, self.name

    return initialise


def remember_shapes(own: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`: the constants for a shape follow from the type's, and are not changed."""
    found: dict[tuple[int, ...], tuple[Any, ...]] = {}

    @wraps(own)
    def initialise(self: Any, handle: Any, type: Any) -> None:
        key = (*type.shape,) if type.is_block() else ()
        if key in found:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = found[key]
        else:
            own(self, handle, type)
            found[key] = self.shape, self.numel

    return initialise


def hasten() -> None:
    """Changes the interpreter of this process."""
    interpreter._patch_lang = Patches(interpreter._patch_lang)
    interpreter._get_np_dtype = remember_numpy_dtypes(interpreter._get_np_dtype)
    tl.block_type.__init__ = remember_block_types(tl.block_type.__init__)
    tl.tensor.__init__ = remember_shapes(tl.tensor.__init__)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
