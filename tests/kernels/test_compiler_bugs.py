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
"""Seen with Triton 3.6.0 on an H100, 4 warps: a product whose left side is itself a product, transposed or not, and
whose right side has fewer than 64 columns and is loaded outside of a pipeline, reads that from the wrong places, or
from beyond the end of shared memory. With 64 columns, or with a left side that was loaded, the same is right.
"""

pytestmark = pytest.mark.gpu


@triton.jit
def chained_products_kernel(a_ptr, b_ptr, c_ptr, output_ptr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(A B) C or (A B)ᵀ C, 64 rows each, C of COLUMNS columns: the left side is a product that is rounded."""
    row, column = tl.arange(0, 64), tl.arange(0, COLUMNS)
    square = row[:, None] * 64 + row[None, :]
    of_columns = row[:, None] * COLUMNS + column[None, :]
    left = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square)).to(a_ptr.dtype.element_ty)
    if TRANSPOSED:
        left = tl.trans(left)
    tl.store(output_ptr + of_columns, tl.dot(left, tl.load(c_ptr + of_columns)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_a_product_as_the_left_side_of_another(columns: int, warps: int, transposed: bool) -> None:
    call = f"chained_products(columns={columns}, warps={warps}, transposed={transposed})"
    if warps == 4 and columns < 64:
        right_unless_beyond(call)
    else:
        chained_products(columns, warps, transposed)


def chained_products(columns: int, warps: int, transposed: bool) -> None:
    """Raises where the numbers are wrong."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(64, size, device=DEVICE).to(DTYPE) for size in (64, 64, columns))
    output = torch.full((64, columns), float("nan"), device=DEVICE)
    chained_products_kernel[(1,)](a, b, c, output, COLUMNS=columns, TRANSPOSED=transposed, num_warps=warps)
    left = (a.double() @ b.double()).to(DTYPE).double()
    require_close(output, (left.T if transposed else left) @ c.double())


@pytest.mark.parametrize("size", [64, 128])
def test_a_walk_with_a_narrow_tile_and_no_pipeline(size: int) -> None:
    right_unless_beyond(f"walk_in_narrow_tiles({size})")


def walk_in_narrow_tiles(size: int) -> None:
    """The walk by programs of 32 value columns, 4 warps and one stage; raises where the numbers are wrong."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 2, size, device=DEVICE).to(DTYPE) for _ in range(3))
    log_decay, beta = -torch.rand(2, 300, 2, device=DEVICE), torch.rand(2, 300, 2, device=DEVICE)
    tiles = tiles_for(size, size, DTYPE)._replace(forward=Tile(columns=32, warps=4, stages=1))
    output, _ = chunked(q, k, v, log_decay, beta, normalize_qk=True, tiles=tiles, segment_chunks=1 << 20)
    with use_implementation("eager"):
        expected, _ = gated_delta_rule(*(x.double() for x in (q, k, v, log_decay, beta)), normalize_qk=True)
    require_close(output, expected)


def right_unless_beyond(call: str) -> None:
    """Does a call in a process of its own: it may read beyond its memory, and then nothing more runs on that GPU."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.kernels import test_compiler_bugs as bugs; bugs.{call}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if READS_BEYOND:
        assert done.returncode != 0, "compiled rightly now: tiles may be narrow without a pipeline"
        assert "illegal memory access" in done.stderr or "ArithmeticError: error" in done.stderr, done.stderr[-2000:]
    else:
        assert done.returncode == 0, done.stderr[-2000:]


def require_close(actual: Tensor, expected: Tensor) -> None:
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    if not error < 2e-2:
        raise ArithmeticError(f"error {error:.3g}")
