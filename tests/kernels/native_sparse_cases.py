"""Calls of native sparse attention in every layout, with a clear choice of blocks, and how its kernels are compared.

A choice is discrete: where two blocks score nearly alike, rounding flips it and nothing can be compared. So queries are
drawn again, one by one, until the worst chosen block of each stands clearly above the best one that is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from hybridize_kernels import native_sparse_attention
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, outputs_and_gradients

PACKAGE = "hybridize_kernels.native_sparse_attention"
eager = import_module(f"{PACKAGE}.eager")
SMALL_TILES = "union=16,0,4,1;pairs=16,0,4,1;gradient=16,0,4,1;limit=1;entries=16"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["reference", "eager"]
NAMES = ("q", "k", "v", "gates")
COMPRESSED = ("compressed_k", "compressed_v")
POOLING = ("key_pooling", "value_pooling")


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, unions and pieces of work so small, and so little memory, that a hundred tokens fill many of each.

    Then most blocks of a query are no part of its union, but come from the lists by block.
    """
    monkeypatch.setenv(import_module(f"{PACKAGE}.tiles").VARIABLE, SMALL_TILES)
    monkeypatch.setattr(import_module(f"{PACKAGE}.selection"), "SCORE_BYTES", 1)
    monkeypatch.setattr(import_module(f"{PACKAGE}.selected"), "PAIR_BYTES", 1)


GAP = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of a score, between the last chosen block and the first that is not. Kernels round the mean key to its dtype, which
moves a logit by its size (up to about 6) times half an ulp over the root of the head size: 2e-3 in bf16."""
LONGEST_LOOP = 300 if DEVICE == "cpu" else 0
"""Queries of a call that the reference still walks one by one; above, eager in fp64, its equal, stands for it."""


@dataclass(frozen=True)
class Case:
    """One call. past: earlier tokens without queries; layout: what `order` makes of it; compression: "mean" of what the
    op sees, "kept" by a cache, or "learned" weights."""

    time: int
    heads: int = 2
    group: int = 2
    size: int = 16
    block_size: int = 16
    selected: int = 4
    window: int = 20
    dense_below: int = 0
    layout: str = "plain"
    past: int = 0
    batch: int = 2
    dtype: torch.dtype = torch.float32
    compression: str = "mean"

    @property
    def rows(self) -> int:
        return 1 if self.layout == "documents" else self.batch

    @property
    def keys(self) -> int:
        return self.time + self.past + (self.block_size + 3 if self.layout.startswith("lengths") else 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that have a gradient."""
        return NAMES + {"mean": (), "kept": COMPRESSED, "learned": POOLING}[self.compression]

    def arguments(self) -> tuple[list[Tensor], dict[str, object]]:
        """The tensors of `names` and all other arguments."""
        options = self.order() | {
            "block_size": self.block_size,
            "num_selected_blocks": self.selected,
            "window": self.window,
            "dense_below": self.dense_below,
        }
        k, v = self._keys(), self._random(self.keys, self.heads, self.size)
        gates = torch.rand(self.rows, self.time, self.heads * self.group, 3).to(DEVICE, self.dtype)
        inputs = [self._queries(), k, v, gates, *self._compression(k, v, options)]
        return self._with_clear_choices(inputs, options), options

    def order(self) -> dict[str, object]:
        """The arguments that say where the tokens are."""
        if self.layout == "plain":
            return {}
        if self.layout == "documents":
            # One of no tokens at the beginning, between and at the end, two shorter than a block, one just longer.
            cuts = [0, 0, 3, 3, self.block_size + 2, 2 * self.block_size + 3, self.time, self.time]
            bounds = torch.tensor(cuts, dtype=torch.int32).clamp(max=self.time)
            return {"cu_seqlens": bounds.to(DEVICE)}
        positions = self._columns(middle=self.layout.endswith("middle"))
        if self.layout.startswith("padded"):
            positions = positions.to(DEVICE)
            return {"query_positions": positions, "key_positions": positions}
        # A row has less and less behind it, and the last one, where there are three, has nothing at all.
        past = torch.tensor([max(self.past - 7 * row, 0) for row in range(self.rows)])
        real = (positions >= 0).sum(1)
        query_positions = torch.where(positions >= 0, positions + past[:, None], -1)
        lengths = torch.where(real > 0, past + real, 0).to(torch.int32)
        return {"query_positions": query_positions.to(DEVICE), "key_lengths": lengths.to(DEVICE)}

    def _columns(self, *, middle: bool) -> Tensor:
        """`[B, T]`: where real tokens are, counted; row 0 is full, row 1 padded, row 2 nothing but padding."""
        real = torch.ones(self.rows, self.time, dtype=torch.bool)
        if self.rows > 1:
            real[1] = torch.rand(self.time) > 0.3 if middle else torch.arange(self.time) >= self.time // 4
        real[2:] = False
        return torch.where(real, real.cumsum(1) - 1, -1)

    def _random(self, tokens: int, heads: int, size: int) -> Tensor:
        return torch.randn(self.rows, tokens, heads, size).to(DEVICE, self.dtype)

    def _queries(self) -> Tensor:
        """Heads of a group agree in half of what they look for: their sum stays as uneven as each of them."""
        shape = (self.rows, self.time, self.heads, self.group, self.size)
        shared = torch.randn(*shape[:3], 1, self.size)
        return (1.2 * (shared + torch.randn(shape))).flatten(2, 3).to(DEVICE, self.dtype)

    def _keys(self) -> Tensor:
        """Each stretch of a block's length has a direction of its own, about which its keys vary."""
        stretches = torch.randn(self.rows, -(-self.keys // self.block_size), self.heads, self.size)
        direction = stretches.repeat_interleave(self.block_size, dim=1)[:, : self.keys]
        return (direction + 0.5 * torch.randn(direction.shape)).to(DEVICE, self.dtype)

    def _compression(self, k: Tensor, v: Tensor, options: dict[str, object]) -> list[Tensor]:
        if self.compression == "learned":
            shape = (self.block_size, self.heads, self.size)
            return [((1 + 0.5 * torch.randn(shape)) / self.block_size).to(DEVICE, self.dtype) for _ in POOLING]
        if self.compression == "mean":
            return []
        positions = key_positions_of(options, k)
        means = [eager._pool(x, positions, self.block_size) for x in (k, v)]
        # What a cache holds where a block is not complete is no mean of anything.
        complete = (positions.amax(1) + 1) // self.block_size
        unused = torch.arange(means[0].shape[1], device=k.device) >= complete[:, None]
        return [mean.masked_fill(unused[..., None, None], 50.0) for mean in means]

    def _with_clear_choices(self, inputs: list[Tensor], options: dict[str, object]) -> list[Tensor]:
        for _ in range(200):
            unclear = smallest_gap(self, inputs, options) < GAP[self.dtype]
            if not unclear.any():
                return inputs
            inputs[0] = torch.where(unclear[..., None, None], self._queries(), inputs[0])
        raise AssertionError(f"{int(unclear.sum())} queries have no clear choice of blocks")


def key_positions_of(options: dict[str, object], k: Tensor) -> Tensor:
    """int64 `[B, S]`: the positions that the options give the keys, other than documents'."""
    slots = torch.arange(k.shape[1], device=k.device).expand(len(k), -1)
    positions, lengths = options.get("key_positions"), options.get("key_lengths")
    if isinstance(lengths, Tensor):
        return torch.where(slots < lengths[:, None], slots, -1)
    return positions if isinstance(positions, Tensor) else slots


def op_of(case: Case, options: dict[str, object]) -> Callable[..., Tensor]:
    def op(*inputs: Tensor) -> Tensor:
        named = dict(zip(case.names, inputs, strict=True))
        return native_sparse_attention(**named, **options)  # type: ignore[arg-type]

    return op


def smallest_gap(case: Case, inputs: list[Tensor], options: dict[str, object]) -> Tensor:
    """fp64 `[B, T]`: how far, of its score, the last chosen block of a query is above the first that is not.

    The smallest over the key heads; infinite where there is nothing to choose. Scores are those of eager in fp64.
    """
    gaps = []
    choose = eager._choose_blocks

    def recorded(importance: Tensor, position: Tensor, block_size: int, num_selected_blocks: int) -> Tensor:
        gap = _gap(importance, position, block_size, num_selected_blocks)
        gaps.append(gap.masked_fill(position[..., 0] < case.dense_below, torch.inf))
        return choose(importance, position, block_size, num_selected_blocks)

    def nothing(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        return q.new_zeros(*q.shape[:-1], v.shape[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "_choose_blocks", recorded)
        patch.setattr(eager, "_attend", nothing)  # scores alone are asked for
        named = dict(zip(case.names, (x.double() for x in inputs), strict=True))
        eager.native_sparse_attention(**named, **options)
    return torch.cat(gaps, dim=2).amin(1)


def _gap(importance: Tensor, position: Tensor, block_size: int, num_selected_blocks: int) -> Tensor:
    """importance `[B, H, t, blocks]`, position `[B, 1, t, 1]` -> `[B, H, t]`."""
    block = torch.arange(importance.shape[-1], device=importance.device)
    current = position.clamp(min=0) // block_size
    free = (block > 0) & (block < current - 1) & (block < (position + 1) // block_size)
    places = num_selected_blocks - 1 - current.clamp(max=2)  # forced are min(current, 2) + 1
    ranked = torch.where(free, importance, 0.0).sort(dim=-1, descending=True).values
    ranked = torch.nn.functional.pad(ranked, (0, 2))
    last = places.clamp(1, ranked.shape[-1] - 1).expand(*ranked.shape[:-1], 1)
    chosen, left_out = ranked.gather(-1, last - 1), ranked.gather(-1, last)
    has_choice = (places > 0) & (free.sum(-1, keepdim=True) > places)
    return torch.where(has_choice, (chosen - left_out) / chosen, torch.inf)[..., 0]


def assert_kernels_agree(case: Case, *, repeats: bool = True) -> None:
    """Outputs and every gradient; with `repeats` twice, with equal bits."""
    inputs, options = case.arguments()
    op = op_of(case, options)
    outputs, gradients = outputs_and_gradients("triton", op, inputs)
    form = "reference" if case.rows * case.time <= LONGEST_LOOP else "eager"
    expected, expected_gradients = outputs_and_gradients(form, op, [x.double() for x in inputs])
    assert_close("output", outputs[0], expected[0], OUTPUT[case.dtype])
    for name, x, y in zip(case.names, gradients, expected_gradients, strict=True):
        assert_close(f"d{name}", x, y, GRADIENT[case.dtype])
    if repeats:
        again = outputs_and_gradients("triton", op, inputs)
        assert all(torch.equal(x, y) for x, y in zip(outputs + gradients, again[0] + again[1], strict=True))
