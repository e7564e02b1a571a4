"""A function of fixed tensors, recorded once as a CUDA graph and replayed; on a CPU it is called."""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UP_CALLS = 2


class Recorded:
    """Calls `run`, which reads and writes tensors of fixed place and asks nothing of the device.

    Args:
        run: what is recorded.
        device: where its tensors are.
        idle: a context in which `run` leaves everything as it is, for the calls before the recording, in which kernels
            are compiled.
        enabled: False: `run` is called each time on a GPU too.
    """

    def __init__(
        self, run: Callable[[], None], device: torch.device, idle: Callable[[], None], *, enabled: bool = True
    ) -> None:
        self._run, self._idle = run, idle
        self._records = enabled and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Records, if that is still to be done. The state of the rows that are at work is lost to `idle`."""
        if not self._records or self._graph is not None:
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                self._idle()
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()
        self._graph = graph

    def __call__(self) -> None:
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
