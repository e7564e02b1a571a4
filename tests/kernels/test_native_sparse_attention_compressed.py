"""The kernels of the compressed branch: pooling, attention over blocks, blocks' scores and all of their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close

PACKAGE = "hybridize_kernels.native_sparse_attention"
layout_module = import_module(f"{PACKAGE}.layout")
tiles_module = import_module(f"{PACKAGE}.compressed_tiles")
pooling = import_module(f"{PACKAGE}.pooling")
compressed = import_module(f"{PACKAGE}.compressed")
gradient = import_module(f"{PACKAGE}.compressed_gradient")

TILE = layout_module.TILE
SMALL_TILES = "forward=16,16,4,1;scores=16,16,4,1;query=16,16,4,1;key=16,16,4,1"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and spans so short that a few hundred tokens fill many of them."""
    monkeypatch.setenv(tiles_module.VARIABLE, SMALL_TILES)
    monkeypatch.setattr(gradient, "PROGRAMS", 12)
    monkeypatch.setattr(gradient, "LEAST_STEPS", 2)
    monkeypatch.setattr(pooling, "PROGRAMS", 6)
    monkeypatch.setattr(pooling, "ELEMENTS", 128)


@dataclass(frozen=True)
class Case:
    """One call. text: of one row, its lengths: padding before it, keys without queries, or packed documents."""

    time: int
    heads: int = 2
    group: int = 2
    size: int = 16
    batch: int = 2
    block: int = 16
    earlier: int = 0
    padding: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    scale: float = 0.3

    @property
    def rows(self) -> int:
        return len(self.padding or self.cached) or (1 if self.packed else self.batch)

    @property
    def keys(self) -> int:
        return max(self.cached) if self.cached else self.time + self.earlier

    def documents(self) -> list[tuple[int, int, int, int, int]]:
        """Row, token of the first key, keys, first query's token and end of each document."""
        if self.packed:
            ends = [sum(self.packed[: n + 1]) for n in range(len(self.packed))]
            return [(0, end - n, n, end - n, end) for end, n in zip(ends, self.packed, strict=True)]
        if self.padding:
            return [(b, n, self.time - n, n, self.time) for b, n in enumerate(self.padding)]
        if self.cached:  # a text shorter than its queries' row has padding before it
            return [(b, 0, n, max(self.time - n, 0), self.time) for b, n in enumerate(self.cached)]
        return [(b, 0, self.keys, 0, self.time) for b in range(self.batch)]

    def layout(self, device: str) -> layout_module.Layout:
        if self.packed:
            bounds = torch.tensor([0, *(end for *_, end in self.documents())], device=device)
            documents = layout_module.packed_documents(bounds, self.time)
            spare = len(self.packed)
            return layout_module.layout_of(
                documents, self.block, self.time // TILE + spare + 1, self.time // self.block + spare + 1
            )
        if not (self.padding or self.cached):
            return layout_module.equal_layout(self.batch, self.time, self.keys, self.block, torch.device(device))
        tiles, blocks = -(-self.time // TILE) + 1, -(-self.keys // self.block)
        if self.padding:
            documents = layout_module.padded_documents(torch.tensor(self.padding, device=device), self.time)
        else:
            padding = torch.tensor([max(self.time - n, 0) for n in self.cached], device=device)
            documents = layout_module.cached_documents(padding, torch.tensor(self.cached, device=device), self.time)
        return layout_module.layout_of(
            documents, self.block, self.rows * tiles, self.rows * blocks, tiles, row_blocks=blocks
        )


def random_of(case: Case, device: str, *names: str) -> list[Tensor]:
    """Tensors as a projection gives them: heads before time in memory for some, of the dtype of the case."""
    query_heads, generator = case.heads * case.group, torch.Generator().manual_seed(1)
    shapes = {
        "q": (case.rows, query_heads, case.time, case.size),
        "x": (case.rows, case.heads, case.keys, case.size),
        "gate": (case.rows, query_heads, case.time, 3),
    }
    made = (torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in names)
    tensors = [x.to(case.dtype).to(device).transpose(1, 2) for x in made]
    return [x[..., 1] if name == "gate" else x for x, name in zip(tensors, names, strict=True)]


def expected_pool(x: Tensor, case: Case, layout: layout_module.Layout, weights: Tensor) -> Tensor:
    """Pooled blocks `[num_blocks, H, D]` by the table of blocks, in x's dtype; weights `[BS, H, D]`."""
    pooled = []
    for row, token, tokens, *_ in layout.blocks.tolist():
        block = x[row, token : token + case.block]
        pooled.append((block * weights).sum(0) if tokens == case.block else 0 * weights[0])
    return torch.stack(pooled)


def expected_attention(
    q: Tensor, kc: Tensor, vc: Tensor, case: Case, layout: layout_module.Layout
) -> tuple[Tensor, Tensor, dict[tuple[int, int], tuple[int, Tensor]]]:
    """Output, log-sum-exp in base 2, and by (row, token) the number of the document's block 0 and the probabilities
    `[H, blocks]`; one query after the other, in q's dtype."""
    outputs = 0 * (q + kc.sum() + vc.sum())  # hangs on all of them, whether or not there is a block
    lses, scores = torch.full(q.shape[:3], float("inf"), dtype=q.dtype), {}
    first_blocks = {}
    for n, (row, token, *_rest) in enumerate(layout.blocks.tolist()):
        first_blocks.setdefault((row, token), n)
    rows = []
    for row, key, length, low, high in case.documents():
        for token in range(low, high):
            seen = (length - high + token + 1) // case.block
            if not seen:
                continue
            base = first_blocks[row, key]
            query = q[row, token].unflatten(0, (case.heads, case.group))
            logits = case.scale * torch.einsum("hgd,chd->hgc", query, kc[base : base + seen])
            weights = logits.softmax(-1)
            rows.append((row, token, torch.einsum("hgc,chd->hgd", weights, vc[base : base + seen]).flatten(0, 1)))
            lses[row, token] = logits.logsumexp(-1).flatten() / torch.log(torch.tensor(2.0, dtype=q.dtype))
            scores[row, token] = (base, weights.sum(1))
    if rows:
        index = tuple(torch.tensor([place[n] for place in rows]) for n in range(2))
        outputs = outputs.index_put(index, torch.stack([place[2] for place in rows]))
    return outputs, lses, scores


def assert_kernels_agree(case: Case, device: str) -> None:
    """Output, log-sum-exp, scores and gradients against the loop above on the same numbers in fp64."""
    layout = case.layout(device)
    q, x, y, d_output, gate = random_of(case, device, "q", "x", "x", "q", "gate")
    kc, vc = (pooling.pool(tensor, layout, case.block) for tensor in (x, y))
    mean = torch.full((case.block, case.heads, case.size), 1 / case.block, dtype=torch.float64)
    for name, tensor, pooled in (("kc", x, kc), ("vc", y, vc)):
        assert_close(name, pooled.cpu(), expected_pool(tensor.double().cpu(), case, layout, mean), OUTPUT[case.dtype])

    leaves = [tensor.double().cpu().requires_grad_() for tensor in (q, kc, vc)]
    expected, expected_lse, probabilities = expected_attention(*leaves, case, layout)
    output, lse = compressed.attend_blocks(q, kc, vc, layout, case.block, case.scale)
    assert_close("output", output.cpu(), expected.detach(), OUTPUT[case.dtype])
    lse_cpu, expected_lse = lse.double().cpu(), expected_lse.detach()
    assert torch.equal(lse_cpu.isinf(), expected_lse.isinf())
    hidden = expected_lse.isinf()
    precise = OUTPUT[torch.float32] * (1 if case.dtype == torch.float32 else 4)
    assert_close("lse", lse_cpu.masked_fill(hidden, 0), expected_lse.masked_fill(hidden, 0), precise)
    assert_scores_agree(case, layout, q, kc, lse, probabilities, precise)

    total = (expected * gate.double().cpu()[..., None] * d_output.double().cpu()).sum()
    expected_gradients = torch.autograd.grad(total, leaves)
    delta = gate.float() * (d_output.float() * expected.detach().float().to(device)).sum(-1)
    gradients = gradient.attend_blocks_backward(q, kc, vc, d_output, gate, delta, lse, layout, case.block, case.scale)
    for name, actual, wanted in zip(("dq", "dkc", "dvc"), gradients, expected_gradients, strict=True):
        assert_close(name, actual.cpu(), wanted, GRADIENT[case.dtype])
    again = gradient.attend_blocks_backward(q, kc, vc, d_output, gate, delta, lse, layout, case.block, case.scale)
    assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))


def assert_scores_agree(
    case: Case,
    layout: layout_module.Layout,
    q: Tensor,
    kc: Tensor,
    lse: Tensor,
    probabilities: dict[tuple[int, int], tuple[int, Tensor]],
    tolerance: float,
) -> None:
    """The scores of all tiles, and of the last ones alone, over the blocks that each query sees."""
    tiles = layout.tiles.tolist()
    for first_tile in {0, len(tiles) // 2}:
        arguments = (first_tile, len(tiles) - first_tile)
        scores = compressed.block_scores(q, kc, lse, layout, case.block, case.scale, *arguments).double().cpu()
        assert scores.shape == (case.heads, arguments[1], TILE, layout.most_blocks)
        for tile, (row, start, low, high, _, _, base, _) in enumerate(tiles[first_tile:]):
            for token in range(max(start, low), min(start + TILE, high)):
                if (row, token) not in probabilities:
                    continue
                first_block, expected = probabilities[row, token]
                assert first_block == base
                actual = scores[:, tile, token - start, : expected.shape[1]]
                assert_close("scores", actual, expected.detach(), tolerance)


CASES = {
    "one token": Case(1),
    "before the first block": Case(15),
    "one block": Case(16),
    "one token after a block": Case(17),
    "several tiles": Case(70),
    "many blocks": Case(300, heads=1, batch=1),
    "no group": Case(70, group=1),
    "group of three": Case(70, group=3, size=24),
    "group of four": Case(70, group=4, heads=1, size=24),
    "large blocks": Case(150, block=64, batch=1),
    "earlier context": Case(21, earlier=60, group=4),
    "one token after a context": Case(1, earlier=79, group=3),
    "a context with long tiles": Case(40, earlier=290, heads=1, batch=1),
    "padded": Case(70, padding=(0, 5, 70, 37), group=3),
    "cached": Case(20, cached=(70, 20, 3, 48), group=3),
    "cached, one token": Case(1, cached=(70, 16, 1)),
    "packed": Case(163, packed=(40, 3, 0, 16, 7, 64, 0, 33), group=4),
    "packed, all short": Case(40, packed=(3, 15, 1, 0, 14, 7)),
    "packed, one document": Case(70, packed=(70,), group=1),
    "halves": Case(70, group=3, dtype=torch.float16),
    "halves, packed": Case(100, packed=(40, 3, 57), dtype=torch.float16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("small")
def test_kernels_equal_the_loop(case: Case, kernel_device: str) -> None:
    if kernel_device == "cuda" and case.dtype == torch.float16:
        pytest.skip("tiles of 16 rows are for the interpreter")
    assert_kernels_agree(case, kernel_device)
