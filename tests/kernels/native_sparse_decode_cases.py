"""Rows of a text for the decoding step of native sparse attention, a step at a time, and how its kernel is compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize_kernels import native_sparse_attention, native_sparse_decode, use_implementation
from tests.kernels.tolerances import OUTPUT, assert_close

Cache = dict[str, Tensor]


@dataclass
class Stream:
    """Random rows of a text, a step at a time: q `[B, steps, HQ, D]`, k and v `[B, steps, H, D]`, gates
    `[B, steps, HQ, 3]`, positions `[B, steps]`.

    Its cache has `spare` slots more than steps; `padding` is the share of the positions that are none.
    """

    batch: int = 2
    steps: int = 40
    heads: int = 2
    group: int = 1
    size: int = 4
    block: int = 4
    chosen: int = 4
    window: int = 6
    dense_below: int = 0
    learned: bool = False
    padding: float = 0.2
    spare: int = 3
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape).to(self.dtype).to(self.device)

        each = self.batch, self.steps
        self.q = draw(*each, self.heads * self.group, self.size)
        self.k, self.v = (draw(*each, self.heads, self.size) for _ in range(2))
        self.gates = draw(*each, self.heads * self.group, 3).sigmoid()
        real = torch.rand(*each) >= self.padding
        self.positions = torch.where(real, real.cumsum(1) - 1, -1).to(self.device)
        pooling = draw(2, self.block, self.heads, self.size) / self.block
        self.pooling = {"key_pooling": pooling[0], "value_pooling": pooling[1]} if self.learned else {}

    @property
    def options(self) -> dict[str, Any]:
        return {
            "block_size": self.block,
            "num_selected_blocks": self.chosen,
            "window": self.window,
            "dense_below": self.dense_below,
        }

    def empty_cache(self) -> Cache:
        """What lies in a slot that is not occupied must not show."""
        capacity = self.steps + self.spare

        def garbage(slots: int) -> Tensor:
            shape = self.batch, slots, self.heads, self.size
            return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

        return {
            "keys": garbage(capacity),
            "values": garbage(capacity),
            "compressed_k": garbage(capacity // self.block),
            "compressed_v": garbage(capacity // self.block),
            "lengths": torch.zeros(self.batch, dtype=torch.int32, device=self.device),
        }

    def cache_behind(self, lengths: Iterable[int]) -> Cache:
        """A cache with so many random tokens in each row, behind which the positions then come."""
        cache = self.empty_cache()
        cache["lengths"].copy_(torch.tensor(list(lengths)))
        self.positions += cache["lengths"][:, None]
        for name in ("keys", "values"):
            tokens = torch.randn_like(cache[name])
            whole = tokens[:, : tokens.shape[1] // self.block * self.block]
            pooled = whole.unflatten(1, (-1, self.block)).mean(2, dtype=torch.float32)
            for part, x in ((name, tokens), (f"compressed_{name[0]}", pooled)):
                cache[part] = torch.where(occupied(cache, self.block, part), x.to(self.dtype), cache[part])
        return cache

    def at(self, step: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return tuple(x[:, step : step + 1].to(dtype or self.dtype) for x in (self.q, self.k, self.v, self.gates))

    def step(self, cache: Cache, step: int, **options: Any) -> Tensor:
        positions = self.positions[:, step : step + 1]
        return native_sparse_decode(
            *self.at(step), **cache, positions=positions, **{**self.options, **self.pooling, **options}
        )

    def exact_step(self, cache: Cache, step: int) -> Tensor:
        """By the eager form on the same numbers in fp64; the cache is in fp64 too."""
        with use_implementation("eager"):
            return native_sparse_decode(
                *self.at(step, torch.float64),
                **cache,
                positions=self.positions[:, step : step + 1],
                **self.options,
                **{name: weights.double() for name, weights in self.pooling.items()},
            )

    def whole(self) -> Tensor:
        """All steps at once, by the reference of the attention over the whole text."""
        with use_implementation("reference"):
            return native_sparse_attention(
                *(x.double() for x in (self.q, self.k, self.v, self.gates)),
                query_positions=self.positions,
                key_positions=self.positions,
                **self.options,
                **{name: weights.double() for name, weights in self.pooling.items()},
            )


def occupied(cache: Cache, block: int, name: str) -> Tensor:
    """bool `[B, slots, 1, 1]`: where something lies in that tensor of the cache."""
    filled = cache["lengths"] // (block if name.startswith("compressed") else 1)
    slots = torch.arange(cache[name].shape[1], device=filled.device)
    return (slots < filled[:, None])[:, :, None, None]


def held(cache: Cache, block: int, name: str) -> Tensor:
    """A tensor of the cache with zeros where nothing lies."""
    return cache[name] if name == "lengths" else cache[name].masked_fill(~occupied(cache, block, name), 0.0)


def compare(stream: Stream, at: Iterable[int], cache: Cache | None = None) -> None:
    """The kernel at those steps against eager in fp64 on the same numbers, from caches that are the same before each.

    A pooled block may be rounded the other way; in the step that completes it, that is no matter of choice.
    """
    cache, workspace, compared = cache or stream.empty_cache(), {}, set(at)
    for step in range(max(compared) + 1):
        if step not in compared:
            with use_implementation("eager"):
                stream.step(cache, step)
            continue
        exact = {name: x.double() if x.is_floating_point() else x.clone() for name, x in cache.items()}
        with use_implementation("triton"):
            out = stream.step(cache, step, workspace=workspace)
        assert_close(f"step {step}", out, stream.exact_step(exact, step), OUTPUT[stream.dtype])
        for name in cache:
            actual, expected = (held(x, stream.block, name) for x in (cache, exact))
            assert_close(f"{name} after step {step}", actual, expected, OUTPUT[stream.dtype])
