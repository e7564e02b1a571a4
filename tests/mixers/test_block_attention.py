"""The loss that teaches compressed keys which blocks attention looks at, beside its definition in loops."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from hybridize.errors import RecipeError
from hybridize.mixers.configs.native_sparse_attention import NativeSparseAttentionConfig
from hybridize.mixers.parts.block_attention import block_attention_loss
from tests.mixers.one_layer import OneLayer

BLOCK, HEADS, GROUP, SIZE = 4, 2, 3, 8
SCALE = 0.6


def drawn(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, HEADS * GROUP, SIZE), torch.randn(batch, tokens, HEADS, SIZE)


def in_loops(q: Tensor, k: Tensor, pooling: Tensor, first: int = 0, every: int = 1) -> tuple[Tensor, int]:
    """Of one text: the sum over its queries and heads, and the number of queries; q [T, HQ, D], k [T, H, D]."""
    total = q.new_zeros(())
    asked = range(every - 1, len(q), every)
    for i in asked:
        free = range(1, i // BLOCK - 1) if i >= first else range(0)
        if not free:
            continue
        for head in range(q.shape[1]):
            keys = k[:, head // GROUP]
            weight = (SCALE * keys[: i + 1] @ q[i, head]).softmax(0).detach()
            wanted = torch.stack([weight[c * BLOCK : (c + 1) * BLOCK].sum() for c in free])
            pooled = [(pooling[:, head // GROUP] * keys[c * BLOCK : (c + 1) * BLOCK]).sum(0) for c in free]
            said = (SCALE * torch.stack(pooled) @ q[i, head]).log_softmax(0)
            total = total + (wanted * ((wanted / wanted.sum()).log() - said)).sum()
    return total, len(asked)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("tokens", "first", "every"), [(33, 0, 1), (40, 0, 3), (31, 20, 1), (12, 0, 1), (3, 0, 8)])
def test_it_is_the_divergence_of_its_definition(tokens: int, first: int, every: int, learned: bool) -> None:
    q, k = (x.requires_grad_() for x in drawn(2, tokens))
    pooling = (
        torch.randn(BLOCK, HEADS, SIZE) if learned else torch.full((BLOCK, HEADS, SIZE), 1 / BLOCK)
    ).requires_grad_()
    positions = torch.arange(tokens).expand(2, -1)
    loss = block_attention_loss(
        q,
        k,
        block_tokens=BLOCK,
        positions=positions,
        scale=SCALE,
        key_pooling=pooling if learned else None,
        first_position=first,
        queries=-(-tokens // every),
    )
    sums = [in_loops(*row, pooling, first, every) for row in zip(q, k, strict=True)]
    expected = sum(total for total, _ in sums) / max(1, sum(count for _, count in sums)) / (HEADS * GROUP)
    torch.testing.assert_close(loss, expected)
    inputs = [q, k, pooling] if learned else [q, k]
    if expected.requires_grad:
        assert loss > 0
        for found, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(found, wanted)
    else:
        assert loss == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, [q, k]))


def test_padding_and_documents_are_single_texts() -> None:
    lengths = [21, 6, 30, 13]
    q, k = drawn(1, sum(lengths))
    pooling = torch.full((BLOCK, HEADS, SIZE), 1 / BLOCK)
    parts = zip(q[0].split(lengths), k[0].split(lengths), strict=True)
    sums = [in_loops(*part, pooling)[0] for part in parts]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    options = {"block_tokens": BLOCK, "scale": SCALE, "queries": 10**6}
    packed = block_attention_loss(q, k, positions=positions, cu_seqlens=bounds, **options)
    torch.testing.assert_close(packed, sum(sums) / sum(lengths) / (HEADS * GROUP))

    longest = max(lengths)
    rows = [torch.cat((torch.full((longest - length,), -1), torch.arange(length))) for length in lengths]
    padded = [
        torch.stack([torch.cat((torch.randn(longest - len(x), *x.shape[1:]), x)) for x in whole[0].split(lengths)])
        for whole in (q, k)
    ]
    loss = block_attention_loss(*padded, positions=torch.stack(rows), **options)
    torch.testing.assert_close(loss, packed)


def test_a_sharp_look_at_one_token_is_learnt() -> None:
    """One key of a block is looked at by all later queries, and those beside it hide it in their mean."""
    torch.manual_seed(0)
    k = torch.zeros(1, 64, 1, SIZE)
    k[0, :, 0, 1] = 0.1 * torch.randn(64)
    k[0, 13, 0, 0] = 6.0
    k[0, [12, 14, 15], 0, 0] = -3.0
    projection = torch.eye(SIZE).requires_grad_()
    pooling = torch.full((BLOCK, 1, SIZE), 1 / BLOCK).requires_grad_()
    q = torch.zeros(1, 64, 1, SIZE)
    q[..., 0] = 1.0
    positions = torch.arange(64)[None]
    optimizer = torch.optim.Adam([projection, pooling], lr=0.05)

    def loss() -> Tensor:
        return block_attention_loss(
            q, k @ projection, block_tokens=BLOCK, positions=positions, scale=1.0, key_pooling=pooling, queries=64
        )

    before = loss()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 0.1 * before
    keys = (k @ projection)[0, :, 0]
    compressed = (pooling[:, 0] * keys.unflatten(0, (16, BLOCK))).sum(1)[:, 0]
    assert compressed.argmax() == 3


@pytest.mark.parametrize("compression", ["mean", "learned"])
def test_the_mixer_adds_it_in_training(compression: str) -> None:
    config = NativeSparseAttentionConfig(block_tokens=4, selected_blocks=4, window_tokens=6, compression=compression)
    layer = OneLayer(dataclasses.replace(config, block_attention=0.5))
    x = layer.hidden_states(2, 64)
    layer.mixer.train()
    out = layer(x)
    loss = layer.mixer.auxiliary["block_attention"]
    assert loss > 0
    loss.backward()
    assert all(layer.mixer.get_submodule(name).weight.grad.any() for name in ("q_proj", "k_proj"))
    if compression == "learned":
        assert layer.mixer.new.key_pooling.grad.any()
    layer.mixer.eval()
    assert torch.equal(layer(x), out)
    assert not layer.mixer.auxiliary
    plain = OneLayer(dataclasses.replace(config, block_attention=0.0))
    plain.mixer.train()
    plain(x)
    assert not plain.mixer.auxiliary


def test_its_weight_is_a_number() -> None:
    for weight in (-1.0, float("inf")):
        with pytest.raises(RecipeError, match="block_attention"):
            NativeSparseAttentionConfig(block_attention=weight)
