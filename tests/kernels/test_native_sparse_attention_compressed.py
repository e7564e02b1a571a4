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
tiles_module = import_module(f"{PACKAGE}.tiles")
pooling = import_module(f"{PACKAGE}.pooling")
compressed = import_module(f"{PACKAGE}.compressed")
gradient = import_module(f"{PACKAGE}.compressed_gradient")

TILE = layout_module.TILE
SMALL_TILES = "compressed=16,16,4,1;scores=16,16,4,1;compressed_query=16,16,4,1;compressed_key=16,16,4,1"


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
    """One call. earlier: keys before the first query; of each row: padding, or keys in a cache; or packed documents."""

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
    gate: float | None = None

    @property
    def ragged(self) -> bool:
        return bool(self.padding or self.cached or self.packed)

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
        if not self.ragged:
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


def assert_kernels_agree(case: Case, device: str, *, repeats: bool = True) -> None:
    """Output, log-sum-exp, scores and gradients against the loop above on the same numbers in fp64.

    With `repeats` the gradients twice, with equal bits.
    """
    layout = case.layout(device)
    q, x, y, d_output, gate = random_of(case, device, "q", "x", "x", "q", "gate")
    if case.gate is not None:
        gate = torch.full_like(gate, case.gate)
    kc, vc = (pooling.pool(tensor, layout, case.block) for tensor in (x, y))
    mean = torch.full((case.block, case.heads, case.size), 1 / case.block, dtype=torch.float64)
    for name, tensor, pooled in (("kc", x, kc), ("vc", y, vc)):
        assert_close(name, pooled.cpu(), expected_pool(tensor.double().cpu(), case, layout, mean), OUTPUT[case.dtype])

    leaves = [tensor.double().cpu().requires_grad_() for tensor in (q, kc, vc)]
    expected, expected_lse, probabilities = expected_attention(*leaves, case, layout)
    output, lse = compressed.attend_blocks(q, kc, vc, layout, case.block, case.scale, padded=case.ragged)
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
    arguments = (q, kc, vc, d_output, gate, delta, lse, layout, case.block, case.scale)
    gradients = gradient.attend_blocks_backward(*arguments, padded=case.ragged)
    for name, actual, wanted in zip(("dq", "dkc", "dvc"), gradients, expected_gradients, strict=True):
        assert_close(name, actual.cpu(), wanted, GRADIENT[case.dtype])
    if repeats:
        again = gradient.attend_blocks_backward(*arguments, padded=case.ragged)
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
    "several tiles": Case(70, batch=1),
    "many blocks": Case(290, heads=1, group=1, batch=1),
    "no group": Case(40, group=1),
    "group of three": Case(37, group=3, size=24, batch=1),
    "group of four": Case(37, group=4, heads=1, size=24),
    "large blocks": Case(150, block=64, batch=1, heads=1),
    "earlier context": Case(21, earlier=60, group=4, batch=1),
    "one token after a context": Case(1, earlier=79, group=3),
    "a context of many blocks": Case(20, earlier=290, heads=1, batch=1),
    "padded": Case(41, padding=(0, 5, 41, 25), group=3, heads=1),
    "cached": Case(20, cached=(70, 20, 3, 48), group=3, heads=1),
    "cached, one token": Case(1, cached=(70, 16, 1, 0)),
    "packed": Case(98, packed=(37, 3, 0, 16, 7, 33, 0, 2), group=3, heads=1),
    "packed, all short": Case(40, packed=(3, 15, 1, 0, 14, 7)),
    "packed, one document": Case(40, packed=(40,), group=1),
    "gates of zero": Case(40, gate=0.0, heads=1),
    "halves": Case(40, group=3, heads=1, dtype=torch.float16),
    "halves, packed": Case(60, packed=(37, 3, 20), heads=1, dtype=torch.float16),
}
REPEATED = {"several tiles", "many blocks", "packed, one document"}
"""In the interpreter, which runs one program after the other; compiled kernels all run twice."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("small")
def test_kernels_equal_the_loop(name: str, kernel_device: str) -> None:
    assert_kernels_agree(CASES[name], kernel_device, repeats=name in REPEATED or kernel_device != "cpu")


def test_default_tiles_run_in_the_interpreter(kernel_device: str) -> None:
    assert_kernels_agree(Case(70, group=4, heads=1, batch=1), kernel_device, repeats=kernel_device != "cpu")


POOLED = {
    "rows": Case(70),
    "no whole block": Case(15),
    "padded": Case(70, padding=(0, 5, 70, 37), size=24),
    "packed": Case(163, packed=(40, 3, 0, 16, 7, 64, 0, 33)),
    "large blocks": Case(150, block=64, size=24),
    "halves": Case(70, dtype=torch.float16),
}


@pytest.mark.parametrize("case", POOLED.values(), ids=POOLED)
@pytest.mark.usefixtures("small")
def test_learned_pooling_and_the_gradient_of_its_weights(case: Case, kernel_device: str) -> None:
    layout = case.layout(kernel_device)
    (x,) = random_of(case, kernel_device, "x")
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(case.block, case.heads, case.size, generator=generator).to(kernel_device)
    leaf = weights.double().cpu().requires_grad_()
    expected = expected_pool(x.double().cpu(), case, layout, leaf)
    pooled = pooling.pool(x, layout, case.block, weights)
    assert pooled.dtype == x.dtype
    assert_close("pooled", pooled.cpu(), expected.detach(), OUTPUT[case.dtype])
    d_pooled = torch.randn(expected.shape, generator=generator).to(kernel_device)
    (wanted,) = torch.autograd.grad((expected * d_pooled.double().cpu()).sum(), leaf)
    actual = pooling.pool_weight_gradient(x, d_pooled, layout, case.block)
    assert actual.dtype == torch.float32
    assert_close("weights", actual.cpu(), wanted, GRADIENT[torch.float32])
    assert torch.equal(actual, pooling.pool_weight_gradient(x, d_pooled, layout, case.block))


def test_nothing_to_attend(kernel_device: str) -> None:
    case = Case(0, earlier=40)
    layout = case.layout(kernel_device)
    q, x = random_of(case, kernel_device, "q", "x")
    kc = pooling.pool(x, layout, case.block)
    output, lse = compressed.attend_blocks(q, kc, kc, layout, case.block, 1.0)
    dq, dkc, dvc = gradient.attend_blocks_backward(q, kc, kc, output, lse, lse, lse, layout, case.block, 1.0)
    assert output.shape == dq.shape == q.shape
    assert not torch.stack((dkc, dvc)).any()


def test_several_rows_need_equally_many_blocks_in_the_table(kernel_device: str) -> None:
    case = Case(40, padding=(0, 5))
    documents = layout_module.padded_documents(torch.tensor(case.padding, device=kernel_device), case.time)
    layout = layout_module.layout_of(documents, case.block, 4, 6)
    q, x, gate = random_of(case, kernel_device, "q", "x", "gate")
    kc = pooling.pool(x, layout, case.block)
    output, lse = compressed.attend_blocks(q, kc, kc, layout, case.block, 1.0)
    with pytest.raises(ValueError, match="equally many blocks"):
        gradient.attend_blocks_backward(q, kc, kc, output, gate, gate.float(), lse, layout, case.block, 1.0)


@pytest.mark.parametrize(("time", "owners", "group", "rows"), [(1, 1, 1, 64), (32768, 32, 16, 64), (70, 900, 7, 64)])
def test_spans_cover_the_text(time: int, owners: int, group: int, rows: int) -> None:
    span = gradient.span_of(time, owners, group, tiles_module.Tile(rows, 64, 4, 1))
    assert span % max(1, rows // group) == 0
    assert span >= gradient.LEAST_STEPS * max(1, rows // group)
    assert owners * -(-time // span) <= gradient.PROGRAMS + owners


GPU = torch.device("cuda") if torch.cuda.is_available() else None
LARGE = {
    f"{dtype}, {size} features, group of {group}": Case(
        2500, heads=2, group=group, size=size, batch=1, dtype=getattr(torch, dtype), scale=size**-0.5
    )
    for dtype, size, group in [
        ("bfloat16", 64, 1),
        ("bfloat16", 64, 32),
        ("bfloat16", 80, 7),
        ("bfloat16", 128, 4),
        ("bfloat16", 128, 16),
        ("bfloat16", 128, 64),
        ("bfloat16", 256, 2),
        ("bfloat16", 256, 8),
        ("float16", 128, 8),
        ("float32", 64, 4),
        ("float32", 128, 3),
        ("float32", 256, 4),
    ]
} | {
    "padded": Case(1500, padding=(0, 700, 1499, 1500), group=16, size=128, dtype=torch.bfloat16),
    "packed": Case(2000, packed=(700, 3, 0, 16, 31, 1200, 50), group=16, size=128, dtype=torch.bfloat16),
    "cached": Case(65, cached=(2000, 70, 3, 2048), group=16, size=128, dtype=torch.bfloat16),
    "large blocks": Case(2500, block=128, group=4, size=64, dtype=torch.bfloat16),
}


@pytest.mark.gpu
@pytest.mark.skipif(GPU is None, reason="needs a GPU")
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large_calls_equal_the_loop(case: Case) -> None:
    assert_kernels_agree(case, "cuda")
