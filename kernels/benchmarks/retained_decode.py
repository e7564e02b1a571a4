"""The decoding step of retained attention over a full cache, as replays of a CUDA graph.

Each graph walks over several caches, more than the second-level cache holds, so that a step reads its cache from memory
as it would between the other layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import Report, Yardsticks, graph_ms, relative_error
from benchmarks.retained_peers import BACKENDS
from hybridize_kernels import retained_decode, use_implementation

ROTATED_BYTES = 300_000_000
MAX_CACHES = 128
MARGIN = 6


@dataclass(frozen=True)
class Case:
    """C: slots for retained tokens."""

    B: int
    HQ: int
    H: int
    D: int
    W: int
    C: int


CASES = [Case(batch, 32, 8, *sizes) for sizes in ((64, 768, 512), (128, 512, 512)) for batch in (1, 64)]


@dataclass
class Cache:
    """The arguments of a step whose cache is full."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    last_position: Tensor
    scores: Tensor
    retained_positions: Tensor
    num_retained: Tensor
    fresh_score: Tensor
    workspace: dict[str, Tensor]

    @classmethod
    def make(cls, case: Case, device: str) -> Cache:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        slots, last = case.W + case.C, 4 * (case.W + case.C)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        old = torch.rand(case.B, case.H, last - case.W, device=device).argsort(-1)[..., : case.C]
        scores = torch.rand(case.B, case.H, slots, device=device)
        return cls(
            q=draw(case.B, 1, case.HQ, case.D),
            k=draw(case.B, 1, case.H, case.D),
            v=draw(case.B, 1, case.H, case.D),
            keys=draw(case.B, case.H, slots, case.D),
            values=draw(case.B, case.H, slots, case.D),
            last_position=torch.full((case.B,), last, dtype=torch.int32, device=device),
            scores=scores,
            retained_positions=old.to(torch.int32),
            num_retained=torch.full((case.B, case.H), case.C, dtype=torch.int32, device=device),
            fresh_score=torch.rand(case.B, case.H, device=device),
            workspace={},
        )

    def step(self, case: Case, positions: Tensor) -> Tensor:
        return retained_decode(**vars(self), window=case.W, sinks=4, positions=positions, margin=MARGIN)


def error_of(case: Case, device: str) -> float:
    """Of a few steps on one row, against the reference in fp32 on a cache of the same numbers."""
    short = Case(1, case.HQ, case.H, case.D, case.W, case.C)
    cache = Cache.make(short, device)
    exact = Cache(**{name: _copied(x) for name, x in vars(cache).items()})
    worst = 0.0
    for _ in range(3):
        positions = (cache.last_position + 1)[:, None]
        out = cache.step(short, positions)
        with use_implementation("reference"):
            worst = max(worst, relative_error(out, exact.step(short, positions)))
    return worst


def _copied(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return {}
    return x.clone().float() if x.is_floating_point() else x.clone()


def run(report: Report, yardsticks: Yardsticks, *, tiny: bool) -> None:
    for case in [Case(2, 4, 2, 16, 16, 8)] if tiny else CASES:
        measure(case, report, yardsticks)


def measure(case: Case, report: Report, yardsticks: Yardsticks) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    letters = vars(case)
    num_bytes = 2 * case.B * case.H * (case.W + case.C) * case.D * (2 if device == "cuda" else 4)
    count = min(MAX_CACHES, -(-ROTATED_BYTES // num_bytes) + 1) if device == "cuda" else 2

    def row(name: str, ms: float, **more: Any) -> None:
        report.add(name, "decode", letters, ms=ms, **yardsticks.of_copy(num_bytes, ms), caches=count, **more)

    with report.guarded("ours", "decode", letters):
        error = error_of(case, device)
        caches = [Cache.make(case, device) for _ in range(count)]
        positions = torch.stack([cache.last_position for cache in caches])[..., None]  # [caches, B, 1]

        def steps() -> None:
            positions.add_(1)
            for cache, position in zip(caches, positions, strict=True):
                cache.step(case, position)

        first = graph_ms(steps, count)
        for name in ("cudnn", "flash") if device == "cuda" else ("math",):
            with report.guarded(f"sdpa-{name}", "decode", letters):
                row(f"sdpa-{name}, no append, no eviction", graph_ms(_peer(caches, name), count))
        row("ours", first, again_ms=graph_ms(steps, count), rel_error=error)


def _peer(caches: list[Cache], backend: str) -> Callable[[], None]:
    """Attention over the same slots as they are: a lower bound of what a cache in this form costs there."""

    def steps() -> None:
        with sdpa_kernel(BACKENDS[backend]):
            for cache in caches:
                scaled_dot_product_attention(cache.q.transpose(1, 2), cache.keys, cache.values, enable_gqa=True)

    return steps
