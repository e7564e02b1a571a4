"""A model whose answers are known: it writes what a function makes of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

END = 2


class _Inner:
    """The inner model: hidden states are the logits, and the cache is what is still to be written."""

    def __init__(self, owner: Scripted) -> None:
        self.owner = owner

    def forward(
        self, input_ids: Tensor, cache: Any = None, use_cache: bool = True, attention_mask: Any = None, **_: Any
    ):
        owner = self.owner
        owner.batches.append(tuple(input_ids.shape))
        if cache is None:
            masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            prompts = [owner.tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, masks, strict=True)]
            cache = [[*owner.tokenizer(owner.answer(prompt))["input_ids"], END] for prompt in prompts]
        following = torch.tensor([rest.pop(0) if rest else END for rest in cache])
        hidden = torch.nn.functional.one_hot(following, owner.vocabulary).float()[:, None]
        return SimpleOutput(last_hidden_state=hidden, cache=cache)

    __call__ = forward


class SimpleOutput(SimpleNamespace):
    """Attributes that can also be asked for as keys, as in transformers' outputs."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


class Scripted:
    """Answers `answer(prompt text)`, then the end token, for ever.

    Attributes:
        batches: shape of the tokens of every pass.
    """

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=END)

    def __init__(self, tokenizer: Any, answer: Callable[[str], str]) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.vocabulary = len(tokenizer)
        self.batches: list[tuple[int, ...]] = []
        self.model = _Inner(self)

    @staticmethod
    def lm_head(hidden: Tensor) -> Tensor:
        return hidden
