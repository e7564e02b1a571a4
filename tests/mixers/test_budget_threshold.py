"""A threshold of its own for each head: in every decision, of training, prefill and decode, and in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hybridize.mixers.registry import config_from_dict
from hybridize.model.convert import save_model
from hybridize.model.load import load_hybrid
from hybridize.model.swap import swap
from tests.tiny import tiny_teacher, tiny_tokens

EVICTION = {"mixer": "token_eviction", "window_tokens": 9, "sink_tokens": 2, "budget_tokens": 5}
TOKENS = 34


def hybrid(threshold: float, **options: Any) -> Any:
    """A model with eviction in its second layer, where the heads have this threshold, one a little more."""
    layers = [config_from_dict({"mixer": "full_attention"}) for _ in range(4)]
    layers[1] = config_from_dict({**EVICTION, "budget_control": "threshold", **options})
    torch.manual_seed(0)
    model = swap(tiny_teacher(), layers).eval()
    new = model.mixers[1].new
    with torch.no_grad():
        for parameter in new.scorer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        new.controller.threshold.copy_(threshold + torch.arange(2) / 10)
    return model


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, splits: tuple[int, ...] | None = None) -> torch.Tensor:
    if splits is None:
        return model(tokens, use_cache=False).logits  # type: ignore[no-any-return]
    cache, parts = DynamicCache(config=model.config), []
    for part in tokens.split(list(splits), dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


def test_it_decides() -> None:
    tokens = tiny_tokens(2, TOKENS)
    one, other = logits(hybrid(0.4), tokens), logits(hybrid(0.8), tokens)
    assert not torch.allclose(one, other, atol=1e-4)
    nothing = logits(hybrid(1e4), tokens)  # no token is kept but the sinks
    windowed = logits(hybrid(0.4, budget_tokens=2), tokens)  # and none but they have a slot
    torch.testing.assert_close(nothing, windowed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("splits", [(1,) * TOKENS, (13, 1, 1, 19)], ids=["token by token", "in pieces"])
def test_prefill_and_decode_decide_alike(splits: tuple[int, ...]) -> None:
    model, tokens = hybrid(0.5), tiny_tokens(2, TOKENS)
    torch.testing.assert_close(logits(model, tokens, splits), logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, tokens = hybrid(0.5), tiny_tokens(1, TOKENS)
    save_model(model, tmp_path)
    loaded = load_hybrid(tmp_path, dtype=torch.float32, complete=False)
    assert torch.equal(loaded.mixers[1].new.controller.threshold, model.mixers[1].new.controller.threshold)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
