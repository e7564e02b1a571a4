"""The inverse that a chunk of the gated delta rule needs, alone in a kernel."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridize_kernels.gated_delta_rule.within import unit_lower_inverse

# Largest error over the largest number of the inverse where products are of halves. One step of Newton's comes after
# them: never more than rounding to bf16 loses afterwards.
ERROR_OF_HALVES = {"random": 2e-5, "parallel": 2e-3}
# Else as many times what LAPACK loses in fp32 on the same systems, which are badly conditioned where keys are nearly
# parallel; how much that is depends on the processor's order of summation.
TIMES_LAPACK = 4.0


@triton.jit
def inverse_kernel(matrix_ptr, inverse_ptr, C: tl.constexpr, HALVES: tl.constexpr):
    place = tl.arange(0, C)
    at = tl.program_id(0) * C * C + place[:, None] * C + place[None, :]
    tl.store(inverse_ptr + at, unit_lower_inverse(tl.load(matrix_ptr + at), C, HALVES))


def systems(size: int, parallel: bool) -> Tensor:
    """Strictly lower triangles of beta kᵢ·kⱼ, as chunks without decay have them; with beta 2 nothing damps them."""
    keys = torch.randn(3, size, 16, dtype=torch.float64)
    if parallel:
        keys = torch.randn(3, 1, 16, dtype=torch.float64) + 0.05 * keys
    keys = keys / keys.norm(dim=-1, keepdim=True)
    beta = torch.full((3, 1, size), 2.0, dtype=torch.float64) if parallel else 2 * torch.rand(3, 1, size)
    return (keys @ keys.mT * beta).tril(-1)


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest error of three inverses, each over the largest number in it."""
    error = (found.double() - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
    return float(error.max())


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("kind", ["random", "parallel"])
def test_it_is_the_inverse(size: int, halves: bool, kind: str, kernel_device: str) -> None:
    matrix = systems(size, kind == "parallel").float().to(kernel_device)
    found = torch.empty_like(matrix)
    inverse_kernel[(3,)](matrix, found, C=size, HALVES=halves, num_warps=4)
    one = torch.eye(size, dtype=torch.float64, device=kernel_device)
    expected = torch.linalg.inv(one + matrix.double())
    assert not found.triu(1).any()
    assert torch.equal(found.diagonal(dim1=1, dim2=2), torch.ones(3, size, device=kernel_device))
    error = worst(found, expected)
    by_lapack = torch.linalg.solve_triangular(one.float().cpu() + matrix.cpu(), one.float().cpu(), upper=False)
    limit = ERROR_OF_HALVES[kind] if halves else TIMES_LAPACK * worst(by_lapack, expected.cpu())
    assert error <= limit, f"error {error:.3g}, at most {limit:.3g}"


@pytest.mark.parametrize("halves", [False, True])
def test_of_nothing_it_is_one(halves: bool, kernel_device: str) -> None:
    matrix = torch.zeros(1, 64, 64, device=kernel_device)
    found = torch.empty_like(matrix)
    inverse_kernel[(1,)](matrix, found, C=64, HALVES=halves, num_warps=4)
    assert torch.equal(found[0], torch.eye(64, device=kernel_device))
