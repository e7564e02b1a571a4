"""Tiny hybrids, and texts for them to read."""

from __future__ import annotations

from typing import Any

import torch

from hybridize.evaluation.windows import Window
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from tests.evaluation.conftest import VOCABULARY
from tests.tiny import tiny_teacher

FULL = {"mixer": "full_attention"}
WINDOW = {"mixer": "sliding_window", "window_tokens": 9, "sink_tokens": 2}
EVICTION = {
    **{"mixer": "token_eviction", "window_tokens": 8, "sink_tokens": 2, "budget_tokens": 6},
    **{"scorer_layers": 1, "scorer_dilation": 1},
}
DELTA = {"mixer": "gated_delta_net", "short_convolution": 3}
SPARSE = {"mixer": "native_sparse_attention", "block_tokens": 4, "selected_blocks": 4, "window_tokens": 6}


def tiny_hybrid(*mixers: dict[str, Any], family: str = "llama", shaken: float = 0.3, **changes: Any) -> Any:
    """One layer for each of `mixers`; new parameters are moved off their start by noise of this size."""
    model = tiny_teacher(family, vocab_size=VOCABULARY, num_hidden_layers=len(mixers), **changes)
    hybrid = swap(model, [config_from_dict(mixer) for mixer in mixers]).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in hybrid.mixers.values():
            for parameter in module.new.parameters() if module.new is not None else ():
                parameter += shaken * torch.randn(parameter.shape, generator=generator)
    return hybrid


def make_texts(*lengths: int, num_prefix: int = 0) -> list[Window]:
    """Random tokens, the same for the same lengths."""
    generator = torch.Generator().manual_seed(7)
    return [
        Window(tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()), "s", f"d{i}", num_prefix)
        for i, n in enumerate(lengths)
    ]
