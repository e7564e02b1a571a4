"""The decoding step of native sparse attention over a long cache, as replays of a CUDA graph, beside dense decoding.

Each graph walks over several caches, more than the second-level cache holds, so that a step reads from memory as it
would between the other layers of a model. `gbs` counts the bytes that the pattern needs at least; a dense peer is given
those of the whole cache. `speedup` is the quickest dense peer's time over ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import Report, Yardsticks, graph_ms, relative_error
from hybridize_kernels import native_sparse_decode, use_implementation

ROTATED_BYTES = 300_000_000
"""Read by a graph at least, ours and the peers' alike."""
MOST_BYTES = 60_000_000_000
"""Of caches, on one GPU."""
MAX_CACHES = 128
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@dataclass(frozen=True)
class Case:
    """T: tokens in the cache. BS: tokens of a block. S: chosen blocks. W: window."""

    B: int
    T: int
    HQ: int = 32
    H: int = 8
    D: int = 128
    BS: int = 64
    S: int = 16
    W: int = 512

    def bytes_of(self, tokens: int, element_bytes: int) -> int:
        """Keys and values of so many tokens a row and head."""
        return 2 * self.B * self.H * self.D * tokens * element_bytes

    @property
    def read_tokens(self) -> int:
        """Pooled, selected and window tokens of a step; the window's last block is a chosen one, but read again."""
        return self.T // self.BS + min(self.S * self.BS, self.T) + min(self.W, self.T)


CASES = [Case(batch, 1024 * length) for batch in (1, 16, 64) for length in (8, 32, 128)]
TINY = [Case(2, 90, 4, 2, 16, BS=4, S=4, W=9)]


@dataclass
class Cache:
    """The arguments of a step; the workspace belongs to it."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    keys: Tensor
    values: Tensor
    compressed_k: Tensor
    compressed_v: Tensor
    lengths: Tensor
    workspace: dict[str, Tensor]

    @classmethod
    def make(cls, case: Case, device: str) -> Cache:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        # Room for the steps of the measurement is within the capacity: they begin a block below it.
        shape = case.B, case.T, case.H, case.D

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        keys, values = draw(*shape), draw(*shape)
        return cls(
            q=draw(case.B, 1, case.HQ, case.D),
            k=draw(case.B, 1, case.H, case.D),
            v=draw(case.B, 1, case.H, case.D),
            gates=torch.rand(case.B, 1, case.HQ, 3, device=device, dtype=dtype),
            keys=keys,
            values=values,
            compressed_k=_means(keys, case.BS),
            compressed_v=_means(values, case.BS),
            lengths=torch.full((case.B,), case.T - case.BS, dtype=torch.int32, device=device),
            workspace={},
        )

    def step(self, case: Case, positions: Tensor) -> Tensor:
        return native_sparse_decode(
            **vars(self), block_size=case.BS, num_selected_blocks=case.S, window=case.W, positions=positions
        )


def _means(x: Tensor, block: int) -> Tensor:
    whole = x[:, : x.shape[1] // block * block]
    return whole.unflatten(1, (-1, block)).mean(2, dtype=torch.float32).to(x.dtype)


def error_of(case: Case, device: str) -> float:
    """Of a few steps on one row, against the reference in fp32 on a cache of the same numbers."""
    short = Case(1, min(case.T, 8192), case.HQ, case.H, case.D, case.BS, case.S, case.W)
    cache = Cache.make(short, device)
    worst = 0.0
    for _ in range(3):
        exact = Cache(**{name: _copied(x) for name, x in vars(cache).items()})
        positions = cache.lengths[:, None].clone()
        out = cache.step(short, positions)
        with use_implementation("reference"):
            worst = max(worst, relative_error(out, exact.step(short, positions)))
    return worst


def _copied(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return {}
    return x.clone().float() if x.is_floating_point() else x.clone()


def run(report: Report, yardsticks: Yardsticks, *, tiny: bool) -> None:
    for case in TINY if tiny else CASES:
        measure(case, report, yardsticks)


def measure(case: Case, report: Report, yardsticks: Yardsticks) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    letters, element_bytes = vars(case), 2 if device == "cuda" else 4
    ours_bytes, dense_bytes = (case.bytes_of(tokens, element_bytes) for tokens in (case.read_tokens, case.T))
    held_bytes = case.bytes_of(case.T + case.T // case.BS, element_bytes)
    if held_bytes > MOST_BYTES:
        return
    wanted = -(-ROTATED_BYTES // ours_bytes) + 1 if device == "cuda" else 2
    count = max(1, min(MAX_CACHES, wanted, MOST_BYTES // held_bytes))

    def row(name: str, num_bytes: int, ms: float, **more: Any) -> None:
        report.add(name, "decode", letters, ms=ms, **yardsticks.of_copy(num_bytes, ms), caches=count, **more)

    with report.guarded("ours", "decode", letters):
        error = error_of(case, device)
        caches = [Cache.make(case, device) for _ in range(count)]
        positions = torch.stack([cache.lengths for cache in caches])[..., None]  # [caches, B, 1]
        first, last = case.T - case.BS, case.T - 1

        def steps() -> None:
            positions.add_(1)
            positions.sub_(torch.where(positions > last, last - first + 1, 0))  # the last block, again and again
            for cache, position in zip(caches, positions, strict=True):
                cache.step(case, position)

        before = graph_ms(steps, count)
        dense: list[float] = []
        for name in ("cudnn", "flash", "math") if device == "cuda" else ("math",):
            with report.guarded(f"sdpa-{name}", "decode", letters):
                dense.append(graph_ms(_peer(caches, name), count))
                row(f"sdpa-{name}, dense, no append", dense_bytes, dense[-1])
        again = graph_ms(steps, count)
        speedup = min(dense) / before if dense else None
        row("ours", ours_bytes, before, again_ms=again, rel_error=error, speedup=speedup)


def _peer(caches: list[Cache], backend: str) -> Callable[[], None]:
    """Attention over every slot: what a step of dense attention costs at least."""

    def steps() -> None:
        with sdpa_kernel(BACKENDS[backend]):
            for cache in caches:
                q, k, v = (x.transpose(1, 2) for x in (cache.q, cache.keys, cache.values))
                scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return steps
