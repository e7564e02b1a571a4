"""Training passes by the kernels: the output, the auxiliary loss and every gradient are those of plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.gated_delta_net import GatedDeltaNetConfig
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.documents import document_positions
from hybridize_kernels import use_implementation
from tests.mixers.one_layer import OneLayer

TOKENS = 24
EVICTION = TokenEvictionConfig(window_tokens=8, budget_tokens=6, sink_tokens=2, scorer_dropout=0.0)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("config", [EVICTION, GatedDeltaNetConfig()], ids=lambda config: config.name)
def test_a_training_pass_is_that_of_plain_torch(config: MixerConfig, packed: bool) -> None:
    layer = OneLayer(config)
    layer.disturb()
    mixer = layer.mixer.train()
    if config is EVICTION:
        mixer.new.controller.l1_weight.fill_(0.3)
    bounds = torch.tensor([0, 3, 17, TOKENS], dtype=torch.int32) if packed else None
    x = layer.hidden_states(1 if packed else 2, TOKENS).requires_grad_()
    positions = torch.arange(TOKENS)[None] if bounds is None else document_positions(bounds, TOKENS)
    rope = layer.rope(x, positions)
    found = {}
    for form in ("eager", "triton"):
        mixer.zero_grad()
        x.grad = None
        with use_implementation(form):  # type: ignore[arg-type]
            out, _ = mixer(x, rope, cu_seqlens=bounds)
            loss = out.square().sum() + sum(100 * value for value in mixer.auxiliary.values())
            loss.backward()
        gradients = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
        losses = {name: value.detach() for name, value in mixer.auxiliary.items()}
        found[form] = {"out": out.detach(), **losses, "x": x.grad, **gradients}
        mixer.after_step()
    assert found["eager"].keys() == found["triton"].keys()
    for name, expected in found["eager"].items():
        assert expected is not None
        # Sums over a text in another order: 2.5e-5 of the decays' gradients was seen.
        size = float(expected.abs().max())
        torch.testing.assert_close(found["triton"][name], expected, rtol=0, atol=1e-4 * size, msg=name)
