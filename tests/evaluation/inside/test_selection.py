"""Selected blocks against the op, and the teacher's attention against plain sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.evaluation.inside import selection as module
from hybridize.evaluation.inside.blocks import attention_mass, compressed_importance, selected
from hybridize.evaluation.inside.layers import layers_of, listening, queries_and_keys
from hybridize.evaluation.inside.selection import selection, spread
from hybridize.mixers.base import Rope
from hybridize_kernels import native_sparse_attention, use_implementation
from tests.evaluation.inside.hybrids import DELTA, EVICTION, FULL, SPARSE, make_texts, tiny_hybrid

HEADS, GROUP, SIZE = 2, 3, 8


def draw(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_tokens, HEADS * GROUP, SIZE, generator=generator)
    return q, torch.randn(num_tokens, HEADS, SIZE, generator=generator)


def chosen_by_the_op(q: Tensor, k: Tensor, block_tokens: int, count: int, pooling: Tensor | None) -> Tensor:
    """bool [H, T, blocks], read off an output: values name their block, keys let every chosen token show alike."""
    num_tokens = len(k)
    blocks = -(-num_tokens // block_tokens)
    weights = torch.full((block_tokens, *k.shape[1:]), 1 / block_tokens) if pooling is None else pooling
    pooled = torch.zeros(blocks, *k.shape[1:])
    for c in range(num_tokens // block_tokens):
        pooled[c] = (weights * k[c * block_tokens : (c + 1) * block_tokens]).sum(0)
    names = torch.nn.functional.one_hot(torch.arange(num_tokens) // block_tokens, blocks).float()
    with use_implementation("reference"):
        out = native_sparse_attention(
            q[None],
            torch.zeros_like(k)[None],
            names[:, None].expand(-1, HEADS, -1)[None],
            torch.tensor([0.0, 1.0, 0.0]).expand(1, *q.shape[:2], -1),
            block_size=block_tokens,
            num_selected_blocks=count,
            window=1,
            compressed_k=pooled[None],
            compressed_v=torch.zeros(1, blocks, HEADS, blocks),
        )
    by_head = out[0].unflatten(1, (HEADS, GROUP)) > 0  # [T, H, G, blocks]
    assert torch.equal(by_head.any(2), by_head.all(2))
    return by_head[:, :, 0].transpose(0, 1)


@pytest.mark.parametrize(("block_tokens", "count"), [(4, 3), (4, 5), (4, 99), (3, 4), (1, 6)])
@pytest.mark.parametrize("learned", [False, True])
def test_selected_blocks_are_those_of_the_op(block_tokens: int, count: int, learned: bool) -> None:
    num_tokens = 30  # the last block is not complete
    q, k = draw(num_tokens)
    pooling = torch.rand(block_tokens, HEADS, SIZE) if learned else None
    positions = torch.tensor([0, 1, 3, 4, 7, 8, 15, 22, 23, 28, 29])
    expected = chosen_by_the_op(q, k, block_tokens, count, pooling)[:, positions]
    by = compressed_importance(q[positions], k, positions, scale=SIZE**-0.5, block_tokens=block_tokens, pooling=pooling)
    assert torch.equal(selected(by, positions, block_tokens=block_tokens, count=count), expected)


def test_of_equals_the_earlier_block_is_selected() -> None:
    chosen = selected(torch.ones(1, 1, 9), torch.tensor([35]), block_tokens=4, count=5)
    assert chosen[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 7, 8]


@pytest.mark.parametrize(("window", "own_window"), [(1, None), (7, None), (7, 12), (30, None)])
def test_mass_is_what_attention_gives_outside_the_window(window: int, own_window: int | None) -> None:
    q, k = draw(30)
    positions = torch.tensor([7, 13, 29])
    found = attention_mass(q[positions], k, positions, scale=0.7, block_tokens=4, window=window, own_window=own_window)
    assert found.shape == (HEADS, 3, 8)
    expected = torch.zeros(HEADS, 3, 8)
    for n, i in enumerate(positions.tolist()):
        for query_head in range(HEADS * GROUP):
            head = query_head // GROUP
            seen = [j for j in range(i + 1) if own_window is None or i - j < own_window]
            logits = {j: math.exp(0.7 * float(q[i, query_head] @ k[j, head])) for j in seen}
            for j in seen:
                if i - j >= window:
                    expected[head, n, j // 4] += logits[j] / sum(logits.values())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_best_selection_holds_the_most_that_any_can() -> None:
    mass = torch.rand(1, 1, 8)
    position = torch.tensor([31])
    chosen = selected(mass, position, block_tokens=4, count=5)
    free = range(1, 6)
    most = max(float(mass[0, 0, [0, *pair, 6, 7]].sum()) for pair in itertools.combinations(free, 2))
    assert float(mass.masked_fill(~chosen, 0).sum()) == pytest.approx(most)


@pytest.mark.parametrize(
    ("first", "end", "count", "expected"),
    [(3, 3, 4, []), (9, 3, 4, []), (3, 4, 4, [3]), (3, 6, 4, [3, 4, 5]), (0, 9, 3, [0, 4, 8]), (2, 100, 2, [2, 99])],
)
def test_queries_are_spread(first: int, end: int, count: int, expected: list[int]) -> None:
    assert spread(first, end, count).tolist() == expected


def shares(student: Any, teacher: Any | None, *lengths: int, batch_tokens: int = 80) -> list[dict[str, Any]]:
    row = selection(student, teacher, make_texts(*lengths), batch_tokens=batch_tokens)
    assert row is not None
    assert (row["texts"], row["tokens"]) == (len(lengths), sum(lengths))
    return [head for layer in row["layers"] for head in layer["heads"]]


@pytest.mark.parametrize("compression", ["mean", "learned"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shares_are_in_order_and_batches_change_nothing(family: str, compression: str) -> None:
    student = tiny_hybrid(FULL, {**SPARSE, "compression": compression}, DELTA, SPARSE, family=family)
    teacher = tiny_hybrid(*[FULL] * 4, family=family, seed=2)
    found = shares(student, teacher, 40, 40, 33)
    assert len(found) == 4
    for head in found:
        assert 0 < head["always"] <= head["mass"] <= head["best"] < 1
        assert all(0 < gate < 1 for gate in head["gates"].values())
    assert any(head["always"] < head["mass"] < head["best"] for head in found)
    for head, other in zip(found, shares(student, teacher, 40, 40, 33, batch_tokens=1), strict=True):
        assert [head[key] for key in module.SHARES] == pytest.approx([other[key] for key in module.SHARES], rel=1e-4)
        assert head["gates"] == pytest.approx(other["gates"], rel=1e-4)


@pytest.mark.parametrize("compression", ["mean", "learned"])
def test_shares_are_those_of_a_plain_sum(compression: str) -> None:
    student = tiny_hybrid(FULL, {**SPARSE, "compression": compression})
    teacher = tiny_hybrid(FULL, FULL, seed=2)
    learned = layers_of(student)[1].attention.new.key_pooling
    pooling = torch.full((4, 2, 8), 1 / 4) if learned is None else learned.detach()
    windows, found = make_texts(30, 30), shares(student, teacher, 30, 30)
    totals = torch.zeros(2, 2, dtype=torch.float64)  # [H, (held, all)]
    for window in windows:
        pairs = []
        for model in (student, teacher):
            view = layers_of(model)[1].view

            def hear(x: Tensor, rope: Rope, view: Any = view) -> None:
                pairs.append(queries_and_keys(view, x, rope))  # noqa: B023

            with torch.no_grad(), listening(model, {1: hear}):
                model(torch.tensor([window.tokens]))
        (q, k), (their_q, their_k) = [(q[0], k[0]) for q, k in pairs]
        for i, head in itertools.product(range(6, 30), range(2)):
            scores = torch.stack([their_k[: i + 1, head] @ their_q[i, 2 * head + g] for g in range(2)])
            attention = (scores * 8**-0.5).softmax(-1).sum(0)
            current, complete = i // 4, (i + 1) // 4
            pooled = torch.stack([(pooling[:, head] * k[4 * c : 4 * c + 4, head]).sum(0) for c in range(complete)])
            by = torch.stack([pooled @ q[i, 2 * head + g] for g in range(2)])
            ranked = ((by * 8**-0.5).softmax(-1).sum(0)).argsort(descending=True).tolist()
            forced = {0, current - 1, current}
            chosen = forced | set([c for c in ranked if c not in forced][: 4 - len(forced)])
            totals[head, 0] += sum(float(attention[j]) for j in range(i - 5) if j // 4 in chosen)
            totals[head, 1] += float(attention[: i - 5].sum())
    assert [head["mass"] for head in found] == pytest.approx((totals[:, 0] / totals[:, 1]).tolist(), rel=1e-4)


def test_all_blocks_selected_hold_everything() -> None:
    for head in shares(tiny_hybrid({**SPARSE, "selected_blocks": 10}, FULL), tiny_hybrid(FULL, FULL, seed=2), 40):
        assert head["mass"] == head["best"] == pytest.approx(1.0)
        assert head["always"] < 1


def test_blocks_of_one_token_see_the_attention_itself() -> None:
    """In the first layer both models have the same queries and keys, and a mean of one key is the key."""
    student = tiny_hybrid({**SPARSE, "block_tokens": 1, "window_tokens": 1, "compression": "mean"}, FULL)
    for head in shares(student, tiny_hybrid(FULL, FULL), 40):
        assert head["mass"] == pytest.approx(head["best"], rel=1e-6)
        assert head["always"] < head["best"] < 1


def test_gates_start_where_the_configuration_says() -> None:
    student = tiny_hybrid({**SPARSE, "compressed_gate": 0.1, "selected_gate": 0.7, "window_gate": 0.3}, shaken=0.0)
    for head in shares(student, None, 20, 9):
        assert head["gates"] == pytest.approx({"compressed": 0.1, "selected": 0.7, "window": 0.3}, rel=1e-5)


@torch.no_grad()
def test_gates_are_means_over_tokens_and_the_group() -> None:
    student, inputs = tiny_hybrid(FULL, SPARSE), []
    with listening(student, {1: lambda x, rope: inputs.append(x[0])}):
        for window in make_texts(20, 9):
            student(torch.tensor([window.tokens]))
    values = student.model.layers[1].self_attn.new(torch.cat(inputs))  # [29, HQ, 3]
    for head, found in enumerate(shares(student, None, 20, 9)):
        expected = values[:, 2 * head : 2 * head + 2].mean((0, 1)).tolist()
        assert list(found["gates"].values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("with_teacher", "length", "changes"), [(False, 40, {}), (True, 6, {}), (True, 20, {"dense_below": 20})]
)
def test_where_nothing_can_be_compared_there_is_no_share(
    with_teacher: bool, length: int, changes: dict[str, Any]
) -> None:
    teacher = tiny_hybrid(FULL, FULL) if with_teacher else None
    for head in shares(tiny_hybrid(FULL, {**SPARSE, **changes}), teacher, length):
        assert head["mass"] is head["best"] is head["always"] is None


def test_a_teacher_with_a_window_of_its_own_has_no_mass_beyond_it() -> None:
    student = tiny_hybrid(SPARSE, FULL, family="mistral")
    near = tiny_hybrid(FULL, FULL, family="mistral", sliding_window=6)
    wide = tiny_hybrid(FULL, FULL, family="mistral", sliding_window=20)
    assert all(head["mass"] is None for head in shares(student, near, 40))
    assert all(0 < head["mass"] <= 1 for head in shares(student, wide, 40))


def test_nothing_to_tell_is_none() -> None:
    assert selection(tiny_hybrid(FULL, EVICTION), tiny_hybrid(FULL, FULL), make_texts(20), batch_tokens=99) is None
