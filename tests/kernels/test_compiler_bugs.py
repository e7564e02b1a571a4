"""What some versions of Triton compile wrongly for Hopper, each in few lines.

The kernels go around it. Here is what they go around, so that a later version can be judged: where it was seen, the
test asks for exactly what was seen, and fails when that is gone; everywhere else the numbers must be right.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize_kernels import gated_delta_rule, use_implementation
from hybridize_kernels.dispatch import is_hopper
from hybridize_kernels.gated_delta_rule.chunked import gated_delta_rule as chunked
from hybridize_kernels.gated_delta_rule.tiles import Tile, tiles_for

DEVICE, DTYPE = "cuda", torch.bfloat16
ROOT = Path(__file__).parents[2]
READS_BEYOND = triton.__version__.startswith("3.6.") and torch.cuda.is_available() and is_hopper(0)
"""Seen with Triton 3.6.0 on an H100: a product on the matrix units reads shared memory beyond its end."""

pytestmark = pytest.mark.gpu


@triton.jit
def transposed_accumulator_kernel(a_ptr, b_ptr, c_ptr, output_ptr, SIZE: tl.constexpr):
    """(A B)ᵀ C, whose left side is a product that is rounded and transposed.

    Triton 3.4 to 3.7.0 are known to compile some such products wrongly for Hopper; with 3.6.0 this plain one is right.
    """
    place = tl.arange(0, SIZE)
    at = place[:, None] * SIZE + place[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    left = tl.trans(product.to(a_ptr.dtype.element_ty))
    tl.store(output_ptr + at, tl.dot(left, tl.load(c_ptr + at)))


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("size", [64, 128])
def test_a_transposed_accumulator_in_a_product(size: int, warps: int) -> None:
    a, b, c = (torch.randn(size, size, device=DEVICE).to(DTYPE) for _ in range(3))
    output = torch.empty(size, size, device=DEVICE)
    transposed_accumulator_kernel[(1,)](a, b, c, output, SIZE=size, num_warps=warps)
    expected = (a.float() @ b.float()).to(DTYPE).float().T @ c.float()
    assert relative_error(output, expected) < 2e-2


@pytest.mark.parametrize("size", [64, 128])
def test_a_walk_with_a_narrow_tile_and_no_pipeline(size: int) -> None:
    # It may read beyond its memory, after which a process can do nothing more on its GPU.
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tests.kernels.test_compiler_bugs import walk_in_narrow_tiles as walk; walk({size})",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if READS_BEYOND:
        assert done.returncode != 0, "compiled rightly now: walks may have narrow tiles without a pipeline"
        assert "illegal memory access" in done.stderr or "ArithmeticError: error" in done.stderr, done.stderr[-2000:]
    else:
        assert done.returncode == 0, done.stderr[-2000:]


def walk_in_narrow_tiles(size: int) -> None:
    """The walk by programs of 32 value columns, 4 warps and one stage; raises where the numbers are wrong."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 2, size, device=DEVICE).to(DTYPE) for _ in range(3))
    log_decay, beta = -torch.rand(2, 300, 2, device=DEVICE), torch.rand(2, 300, 2, device=DEVICE)
    tiles = tiles_for(size, size, DTYPE)._replace(forward=Tile(columns=32, warps=4, stages=1))
    output, _ = chunked(q, k, v, log_decay, beta, normalize_qk=True, tiles=tiles, segment_chunks=1 << 20)
    with use_implementation("eager"):
        expected, _ = gated_delta_rule(*(x.double() for x in (q, k, v, log_decay, beta)), normalize_qk=True)
    error = relative_error(output, expected)
    if not error < 2e-2:
        raise ArithmeticError(f"error {error:.3g}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value expected."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
