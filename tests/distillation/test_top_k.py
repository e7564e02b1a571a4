"""The most probable tokens as they are stored: small, near to what was said, and finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridize.distillation.top_k import decode_top_k, encode_top_k

ROUNDING = 2.0**-11
"""Of fp16, relative."""


def buckets(log_probs: Tensor) -> Tensor:
    """[..., k] -> [..., k + 1] log-probabilities in fp64, the last one of all other tokens."""
    log_probs = log_probs.double()
    tail = 1 - log_probs.exp().sum(-1, keepdim=True)
    return torch.cat([log_probs, tail.clamp_min(1e-300).log()], -1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities, a row each."""
    return torch.where(p > -600, p.exp() * (p - q), 0.0).sum(-1)


def test_bytes_of_a_token() -> None:
    ids, log_probs = torch.zeros(3, 64, dtype=torch.int32), torch.full((3, 64), -5.0)
    for vocabulary, expected in ((65_536, 260), (65_537, 388)):
        encoded = encode_top_k(ids, log_probs, vocabulary)
        assert sum(tensor.numel() * tensor.element_size() for tensor in encoded.values()) == 3 * expected


@pytest.mark.parametrize("vocabulary", [65_536, 151_936])
def test_ids_come_back(vocabulary: int) -> None:
    ids = torch.tensor([[vocabulary - 1, 32_768, 32_767, 0]], dtype=torch.int32)
    stored = encode_top_k(ids, torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), vocabulary)
    found = decode_top_k(stored)
    assert torch.equal(found.ids, ids)
    assert found.ids.dtype == torch.int32


@given(st.integers(0, 2**31), st.floats(0.01, 30), st.sampled_from([1, 3, 16]))
def test_property_what_is_stored_is_near_what_was_said(seed: int, scale: float, k: int) -> None:
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    log_probs, ids = logits.log_softmax(-1).topk(k)
    found = decode_top_k(encode_top_k(ids.int(), log_probs.float(), 50))
    assert (found.log_probs.diff(dim=-1) <= 0).all()
    tail = 1 - log_probs.exp().sum(-1)
    assert torch.allclose(1 - found.log_probs.double().exp().sum(-1), tail, rtol=0, atol=1e-6)
    # The k among themselves: the storage's own error. fp32 rounds log p, which moves p by less than 1e-6 of itself.
    relative = log_probs - log_probs[:, :1]
    p = log_probs - log_probs.logsumexp(-1, keepdim=True)
    q = found.log_probs.double() - found.log_probs.double().logsumexp(-1, keepdim=True)
    bound = ROUNDING**2 / 2 * (p.exp() * relative.square()).sum(-1)
    assert (divergence(p, q) <= bound * 1.01 + 1e-10).all()


@pytest.mark.parametrize(
    "logits", [[1e4, -1e4, 0.0, 3.0], [0.0] * 4, [80.0, 79.0, 78.0, -float("inf")], [1.0, 1.0, 1.0, -200.0]]
)
def test_extreme_distributions_stay_finite(logits: list[float]) -> None:
    log_probs, ids = torch.tensor([logits]).log_softmax(-1).topk(4)
    found = decode_top_k(encode_top_k(ids.int(), log_probs, 4))
    assert found.log_probs.isfinite().all()
    assert torch.allclose(found.log_probs.exp(), log_probs.exp(), rtol=0, atol=1e-4)
