"""The matrix: every registered mixer, on every family.

A mixer enters by being registered; it may name settings here that suit the tiny models (else its defaults are used).
"""

from __future__ import annotations

from typing import Any

import torch

from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.registry import MIXERS, config_class
from hybridize.model.swap import swap
from tests import tiny
from tests.tiny import FAMILY_NAMES

TINY: dict[str, dict[str, Any]] = {
    "sliding_window": {"window_tokens": 9, "sink_tokens": 2},
    "token_eviction": {"window_tokens": 9, "sink_tokens": 2, "budget_tokens": 5},
    "gated_delta_net": {"short_convolution": 3},
    "native_sparse_attention": {"block_tokens": 4, "selected_blocks": 4, "window_tokens": 6},
}

ON_GPU: dict[str, dict[str, Any]] = {
    # Blocks as small as the kernels take; of the few tokens here, every one is in a block that is selected.
    "native_sparse_attention": {"block_tokens": 16, "selected_blocks": 3, "window_tokens": 6},
}

MIXER_NAMES = tuple(MIXERS)
CASES = [(mixer, family) for mixer in MIXER_NAMES for family in FAMILY_NAMES]
LAYERS = (1, 2)
"""Layers of the tiny models that are swapped; 0 and 3 keep full attention."""


DEVICES = {"device": "cpu"}
"""Where models and tokens of a test go; set by the fixture that runs every test on every device."""


def tiny_teacher(family: str, seed: int = 0) -> Any:
    return tiny.tiny_teacher(family, seed).to(DEVICES["device"])


def tiny_tokens(batch: int, length: int, **options: Any) -> torch.Tensor:
    return tiny.tiny_tokens(batch, length, **options).to(DEVICES["device"])


def tiny_mixer(name: str) -> MixerConfig:
    on_gpu = ON_GPU if DEVICES["device"] == "cuda" else {}
    return config_class(name)(**(on_gpu.get(name) or TINY.get(name, {})))


def tiny_hybrid(mixer: str, family: str, seed: int = 0, layers: tuple[int, ...] = LAYERS) -> Any:
    """A tiny model with `mixer` in `layers`. New parameters are shaken, so that no gate is at a special value."""
    model = tiny.tiny_teacher(family, seed)
    full = tiny_mixer("full_attention")
    hybrid = swap(model, [tiny_mixer(mixer) if i in layers else full for i in range(model.config.num_hidden_layers)])
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in hybrid.mixers.values():
            for parameter in module.new.parameters() if module.new is not None else ():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return hybrid.eval().to(DEVICES["device"])
