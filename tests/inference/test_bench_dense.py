"""The dense baseline against the model's ordinary forward, and what it does with its slots."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.errors import UsageError
from hybridize.inference.bench import dense
from hybridize.inference.bench.dense import DenseBaseline
from hybridize.inference.bench.dense_attention import dense_attention
from hybridize.model.training_form import enter
from tests.tiny import FAMILY_NAMES, tiny_teacher, tiny_tokens


@torch.no_grad()
def greedy(model: Any, tokens: Tensor, steps: int) -> Tensor:
    """[B, steps], each from a whole forward pass."""
    for _ in range(steps):
        tokens = torch.cat((tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens[:, -steps:]


def baseline(model: Any, **options: Any) -> DenseBaseline:
    return DenseBaseline(model, batch=2, context_tokens=60, **options)


@pytest.mark.parametrize(("name", "window"), [*((name, None) for name in FAMILY_NAMES), ("mistral", 16)])
def test_writes_what_the_model_writes(name: str, window: int | None) -> None:
    changes = {} if window is None else {"sliding_window": window}
    model, tokens = tiny_teacher(name, **changes), tiny_tokens(2, 40)
    timed = baseline(model)
    logits = timed.read(tokens.tolist())
    torch.testing.assert_close(logits, model(input_ids=tokens).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert torch.equal(timed.write(12), greedy(model, tokens, 12))
    timed.reset()
    timed.read(tokens[:, :25].tolist())
    again = timed.read(tokens[:, 25:].tolist())  # in two pieces
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)


def test_a_timed_step_is_the_next_step_and_stays_where_it_is() -> None:
    model, tokens = tiny_teacher(), tiny_tokens(2, 40)
    timed = baseline(model)
    timed.read(tokens.tolist())
    expected = greedy(model, tokens, 2)
    assert torch.equal(timed.following, expected[:, 0])
    timed.run(1)
    assert torch.equal(timed.following, expected[:, 1])
    timed.run(3)
    assert timed.filled == 40
    last = torch.cat((tokens, timed.following[:, None]), dim=1)  # whatever it wrote, it goes on from the same text
    timed.run(1)
    assert torch.equal(timed.following, greedy(model, last, 1)[:, 0])


def test_reads_in_pieces_where_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_teacher(), tiny_tokens(2, 40)
    expected = model(input_ids=tokens).logits[:, -1]
    monkeypatch.setattr(dense, "PIECE_TOKENS", 16)
    timed = baseline(model)
    forward, sizes = model.model.forward, []

    def small_memory(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[1])
        if sizes[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", small_memory)
    torch.testing.assert_close(timed.read(tokens.tolist()), expected, atol=1e-4, rtol=1e-4)
    timed.reset()
    timed.read(tokens.tolist())
    assert sizes == [40, 16, 16, 8, 16, 16, 8]  # once is enough to know


def test_leaves_the_model_as_transformers_has_it() -> None:
    model, tokens = tiny_teacher(), tiny_tokens(2, 40)
    before, expected = model.config._attn_implementation, model(input_ids=tokens).logits
    enter(model)  # as an engine does
    timed = baseline(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]
    timed.read(tokens.tolist())
    timed.run(2)
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=tokens).logits, expected)


def test_pretends_and_counts_its_state() -> None:
    model = tiny_teacher(num_hidden_layers=3)
    timed = baseline(model)
    assert timed.state_bytes() == 3 * 2 * 2 * 60 * 8 * 4
    timed.pretend(59)
    timed.run(2)
    assert int(timed.following.max()) < model.config.vocab_size
    timed.pretend(60)
    with pytest.raises(UsageError, match="slots"):
        timed.run(1)
    with pytest.raises(UsageError, match="one length"):
        timed.read([[1], [1, 2]])
    timed.reset()
    with pytest.raises(UsageError, match="slots"):
        timed.read(tiny_tokens(2, 61).tolist())


def test_a_compiled_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    model, tokens = tiny_teacher(), tiny_tokens(2, 40)
    timed = baseline(model, compiled=True)
    timed.read(tokens.tolist())
    timed.run(1)
    assert torch.equal(timed.following, greedy(model, tokens, 2)[:, 1])


@pytest.mark.parametrize("attention", ["cudnn", "flash"])
@pytest.mark.gpu
def test_captured_steps_write_what_the_model_writes(attention: Any) -> None:
    model = tiny_teacher(head_dim=64, num_attention_heads=4).to("cuda", torch.bfloat16)
    tokens = tiny_tokens(2, 40).cuda()
    timed = baseline(model, attention=attention)
    logits = timed.read(tokens.tolist())
    torch.testing.assert_close(logits, model(input_ids=tokens).logits[:, -1], atol=0.15, rtol=0.05)
    written = timed.write(1)
    following = timed.following
    timed.filled -= 1
    timed._next.copy_(written)
    timed.run(1)  # from a graph
    assert torch.equal(timed.following, following)


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys"), [(1, 90), (90, 90), (30, 90)])
@pytest.mark.parametrize("attention", ["cudnn", "flash"])
def test_kernels_without_a_mask_see_what_they_should(attention: Any, queries: int, keys: int) -> None:
    from torch.nn.attention import sdpa_kernel

    q = torch.randn(2, 8, queries, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 2, 128, 64, device="cuda", dtype=torch.bfloat16)[:, :, :, :keys].unbind(0)
    with sdpa_kernel(dense._BACKENDS[attention], set_priority=True):
        out, _ = dense_attention(torch.nn.Module(), q, k, v, None, scaling=0.125)
    scores = q.float() @ k.float().repeat_interleave(4, dim=1).mT * 0.125
    places = torch.arange(keys, device="cuda")
    scores.masked_fill_(places > places[keys - queries :, None], -torch.inf)
    expected = scores.softmax(-1) @ v.float().repeat_interleave(4, dim=1)
    torch.testing.assert_close(out.transpose(1, 2).float(), expected, atol=2e-2, rtol=2e-2)
