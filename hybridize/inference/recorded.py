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
        idle: called before and after each of the calls before the recording, in which kernels are compiled, so that all
            is left as it was.
        enabled: False: `run` is called each time on a GPU too.
    """

    def __init__(
        self, run: Callable[[], None], device: torch.device, idle: Callable[[], object], *, enabled: bool = True
    ) -> None:
        self._run, self._idle = run, idle
        self._records = enabled and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> None:
        """Records, if that is still to be done; what `idle` sets is then as it sets it."""
        if not self._records or self._graph is not None:
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                self._idle()
                self._run()
            self._idle()
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
