"""The quicker interpreter gives what Triton's own gives, and leaves the language as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import (
    Patches,
    languages_of,
    remember_block_types,
    remember_numpy_dtypes,
    remember_shapes,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

SCALARS = ("int1", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
SCALARS += ("float16", "bfloat16", "float32", "float64", "float8e5", "float8e4nv")
PLACES = (tl, tl.core, tl.tensor, tl.math, tl.dtype)


@triton.jit
def scaled(x, FACTOR: tl.constexpr):
    """A function of a kernel, which calls one of the language's own."""
    return tl.sum(x, 0) * FACTOR


@triton.jit
def sums_kernel(x_ptr, output_ptr, size, FAILS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of BLOCK numbers, scaled, and their largest times the number of programs; a program each."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)
    total = scaled(x, 3)
    for _ in tl.range(0, tl.cdiv(size, BLOCK)):
        total += tl.max(x, 0)
    tl.static_assert(not FAILS, "asked to fail")
    tl.store(output_ptr + tl.program_id(0), total)


def sums(fails: bool = False) -> torch.Tensor:
    x, output = torch.arange(20, dtype=torch.float16), torch.zeros(3)
    sums_kernel[(3,)](x, output, 20, fails, 8)
    return output


def language() -> list[dict[str, object]]:
    """All that a launch may change."""
    return [{name: getattr(place, name) for name in dir(place)} for place in PLACES]


def test_the_quicker_one_is_used() -> None:
    assert isinstance(interpreter._patch_lang, Patches)
    assert not interpreter.interpreter_builder.options.sanitize_overflow
    assert not interpreter.interpreter_builder.options.debug, "else overflows would be looked for"


def test_a_launch_gives_the_sums_and_leaves_nothing_behind() -> None:
    before = language()
    assert sums().tolist() == [3 * 28 + 3 * 7, 3 * 92 + 3 * 15, 3 * 70 + 3 * 19]
    assert language() == before


def test_a_launch_that_fails_leaves_nothing_behind() -> None:
    before = language()
    with pytest.raises(interpreter.InterpreterError, match="asked to fail"):
        sums(fails=True)
    assert language() == before
    assert sums().all()


def test_the_modules_are_gone_through_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    patch = interpreter._patch_lang.__wrapped__
    watched = Patches(lambda function: calls.append(function) or patch(function))
    monkeypatch.setattr(interpreter, "_patch_lang", watched)
    sums()
    ours, the_languages_own = calls  # of more than a dozen calls; once rewritten, the second may see both modules
    assert languages_of(ours) == {"triton.language"}
    assert languages_of(the_languages_own) >= {"triton.language.core"}


def test_numpy_dtypes_are_those_of_the_interpreter() -> None:
    own, asked = interpreter._get_np_dtype.__wrapped__, []
    look_up = remember_numpy_dtypes(lambda dtype: asked.append(dtype) or own(dtype))
    scalars = [getattr(tl, name) for name in SCALARS]
    scalars += [tl.pointer_type(scalar) for scalar in scalars]
    for _ in range(2):
        for scalar in scalars:
            assert look_up(scalar) == look_up(tl.block_type(scalar, [4])) == own(scalar), scalar
    assert asked == scalars


@pytest.mark.parametrize("element", [tl.int32, tl.bfloat16, tl.pointer_type(tl.float32)], ids=str)
def test_blocks_and_tensors_have_the_attributes_that_they_would_have(
    element: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(shape: list[Any]) -> list[dict[str, Any]]:
        block = tl.block_type(element, shape)
        tensors = [tl.tensor("a handle", type) for type in (block, element)]
        given = [vars(x) for x in (block, *tensors)]
        return [{name: (type(x), repr(x)) for name, x in given.items()} for given in given]

    shapes = ([4], [4, 16], [16, 4], [tl.constexpr(4), 16], tl.core.tuple([2, 1, 8]))
    with monkeypatch.context() as patch:
        for place in (tl.block_type, tl.tensor):
            patch.setattr(place, "__init__", place.__init__.__wrapped__)
        expected = [made(shape) for shape in shapes]
    monkeypatch.setattr(tl.block_type, "__init__", remember_block_types(tl.block_type.__init__.__wrapped__))
    monkeypatch.setattr(tl.tensor, "__init__", remember_shapes(tl.tensor.__init__.__wrapped__))
    for _ in range(2):
        assert [made(shape) for shape in shapes] == expected
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(element, [3])
    with pytest.raises(TypeError, match="0d block_type"):
        tl.block_type(element, [])
    with pytest.raises(AssertionError):
        tl.block_type(element, (4,))
