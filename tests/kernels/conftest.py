"""Fixtures of the op tests: the devices to run on, and memory that does not forgive a read before a write."""

from collections.abc import Iterator

import pytest
import torch

CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine; a test on CUDA carries the marker `gpu`."""
    return str(request.param)


@pytest.fixture(params=CUDA or ["cpu"])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run on this machine: compiled on its GPU, or else interpreted on the CPU."""
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what is never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
