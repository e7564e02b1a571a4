"""What the tests of decoding build on: tiny hybrids whose windows and budgets a short text overflows, on a device."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.settings import CASES, MIXER_NAMES, tiny_hybrid
from tests.tiny import tiny_teacher

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
ENDLESS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

__all__ = [
    "CASES",
    "ENDLESS",
    "MIXER_NAMES",
    "TOLERANCE",
    "continued",
    "logits_of",
    "texts",
    "tiny_hybrid",
    "tiny_teacher",
]


def texts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Random texts that avoid the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def logits_of(model: Any, text: list[int]) -> torch.Tensor:
    """[vocabulary], after the whole text, by the model's own forward pass."""
    tokens = torch.tensor([text], device=model.device)
    with torch.no_grad():
        return model(tokens, use_cache=False).logits[0, -1]


def continued(model: Any, text: list[int], new_tokens: int) -> list[int]:
    """The greedy continuation by transformers' `generate`."""
    tokens = torch.tensor([text], device=model.device)
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, **ENDLESS)
    return made[0, len(text) :].tolist()
