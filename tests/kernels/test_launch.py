"""Launches that are remembered do what new ones do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from hybridize_kernels import launch as launches
from hybridize_kernels.launch import Launch, launch


@triton.jit(do_not_specialize=["number"])  # type: ignore[untyped-decorator]
def _axpy_kernel(x_ptr, y_ptr, stride, number, factor, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < number
    x = tl.load(x_ptr + at * stride, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(y_ptr + at, (2 * x if TWICE else x).to(y_ptr.dtype.element_ty), mask=inside)


def run(x: torch.Tensor, factor: float, *, twice: bool = False, target: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.empty(len(x), dtype=x.dtype, device=x.device) if target is None else target
    launch(_axpy_kernel, (1,), (x, y), (x.stride(0), len(x), factor), TWICE=twice, BLOCK=64)
    assert torch.equal(y, x * factor * (1 + twice))
    return y


def test_every_change_of_an_argument_is_seen(kernel_device: str) -> None:
    x = torch.arange(128, dtype=torch.float32, device=kernel_device)
    for _ in range(2):  # new, and remembered
        run(x[:50], 2.0)
        run(x[:51], 2.0)
        run(x[:50], 3.0)
        run(x[:50], 3.0, twice=True)
        run(x[:100:2], 2.0)
        run(x[:50].half(), 2.0)
        run(x[1:51], 2.0)  # not aligned
        run(x[:50], 2.0, target=torch.empty(100, device=kernel_device)[3:53])


@pytest.mark.gpu
def test_what_is_remembered_is_bounded_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_remembered", {})
    monkeypatch.setattr(launches, "MOST", 3)
    x = torch.arange(64, dtype=torch.float32, device="cuda")
    run(x, 2.0)
    assert len(launches._remembered) == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(_axpy_kernel), "run", None)  # Triton's own way is closed
        run(x, 2.0)
    for number in range(1, 10):
        run(x[:number], 2.0)
        assert len(launches._remembered) <= 3
    with torch.cuda.stream(torch.cuda.Stream()):
        run(x, 2.0)
    graph = torch.cuda.CUDAGraph()
    y = torch.empty_like(x)
    with torch.cuda.graph(graph):
        launch(_axpy_kernel, (1,), (x, y), (1, 64, 2.0), TWICE=False, BLOCK=64)
    x += 1
    graph.replay()
    assert torch.equal(y, x * 2)


@pytest.mark.gpu
def test_hooks_are_told_of_remembered_launches() -> None:
    x = torch.arange(64, dtype=torch.float32, device="cuda")
    run(x, 2.0)
    told = []
    triton.knobs.runtime.launch_enter_hook.add(told.append)
    try:
        run(x, 2.0)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(told.append)
    assert [metadata.get()["name"] for metadata in told] == ["_axpy_kernel"]


@pytest.mark.gpu
def test_memory_of_the_host_does_not_reach_the_gpu() -> None:
    x, y = torch.randn(64, device="cuda"), torch.zeros(64, device="cuda")
    ready = Launch(_axpy_kernel, (1,), (1, 50, 2.0), {"TWICE": True, "BLOCK": 64})
    for _ in range(2):  # new, and remembered
        with pytest.raises(ValueError, match="tensors on cpu, cuda:0"):
            ready(x, y.cpu())
        ready(x, y)
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        ready(x.cpu(), y.cpu())


def test_a_ready_launch_takes_new_pointers(kernel_device: str) -> None:
    ready = Launch(_axpy_kernel, (1,), (1, 50, 2.0), {"TWICE": True, "BLOCK": 64})
    for start in (0, 64, 3, 128):  # one of them is not aligned
        x, y = torch.randn(200, device=kernel_device)[start:], torch.zeros(60, device=kernel_device)
        ready(x, y)
        assert torch.equal(y[:50], x[:50] * 4)
        assert not y[50:].any()


@dataclass
class Machine:
    """A machine of several GPUs, as far as a launch looks at it; the kernel notes which one is the current one."""

    current: int = 0

    def __post_init__(self) -> None:
        self.ran_on: list[int] = []

    def get_device(self) -> int:
        """As a tensor: it lies on GPU 1."""
        return 1

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """As a kernel."""
        return lambda *arguments, **constants: self.ran_on.append(self.current)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before


def test_a_launch_runs_on_the_gpu_of_its_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    Launch(machine, (1,), (), {})(machine)
    launch(machine, (1,), (machine,), ())
    assert machine.ran_on == [1, 1]
    assert machine.current == 0
