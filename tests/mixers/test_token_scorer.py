"""The token scorer as a module: what it computes with, dropout, and streaming."""

import pytest
import torch

from hybridize.mixers.parts.token_scorer import TokenScorer

HEADS, HEAD_SIZE = 2, 4


def make_scorer(num_scorers=HEADS, dropout=0.0):
    scorer = TokenScorer((8, 4, 2, 1), 3, 2, num_scorers, dropout)
    scorer.initialise(0.5)
    torch.nn.init.normal_(scorer.output_weight)
    return scorer.eval()


def make_inputs(time=20, batch=2):
    k, v = (torch.randn(batch, time, HEADS, HEAD_SIZE) for _ in range(2))
    return k, v, torch.ones(batch, time, dtype=torch.bool)


@pytest.mark.parametrize("num_scorers", [1, HEADS])
def test_streaming_equals_the_whole_text(num_scorers):
    scorer = make_scorer(num_scorers)
    k, v, real = make_inputs()
    whole = scorer(k, v, real)
    assert scorer.margin_tokens == 6
    assert scorer.history_width == 4 * (8 + 4 + 2)
    history = torch.zeros(2, HEADS, scorer.history_width)
    logits, seen = [], torch.zeros(2, dtype=torch.int32)
    for chunk in (12, 1, 1, 6):
        now = slice(int(seen[0]), int(seen[0]) + chunk)
        num_new = torch.full((2,), chunk, dtype=torch.int32)
        logits.append(scorer.extend(k[:, now], v[:, now], history, num_new, seen))
        seen = seen + num_new
    streamed = torch.cat(logits, dim=1)[:, scorer.margin_tokens :]
    torch.testing.assert_close(streamed, whole[:, : -scorer.margin_tokens], rtol=1e-5, atol=1e-6)
    assert not streamed.requires_grad


def test_only_training_follows_autocast():
    scorer = make_scorer()
    inputs = make_inputs()
    expected = scorer(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        evaluated = scorer(*inputs)
        trained = scorer.train()(*inputs)
    assert torch.equal(evaluated, expected)
    assert trained.dtype == torch.float32
    difference = (trained - expected).abs().max()
    assert 0 < difference < 0.02 * expected.abs().max()


def test_dropout_only_in_training():
    scorer = make_scorer(dropout=0.5)
    inputs = make_inputs()
    assert torch.equal(scorer(*inputs), scorer(*inputs))
    scorer.train()
    assert not torch.equal(scorer(*inputs), scorer(*inputs))


def test_half_precision_keys_score_in_float32():
    scorer = make_scorer()
    k, v, real = make_inputs()
    k, v = k.bfloat16(), v.bfloat16()
    logits = scorer(k, v, real)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, scorer(k.float(), v.float(), real))
