"""Greedy continuation: prompts are read in one pass, then tokens are written from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

CHECK_STEPS = 8
"""Steps between looks at whether every row has ended: a look waits for the GPU."""


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt, with the tokenizer's start token and without an end token."""
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    ends_itself = ids and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends_itself and not text.endswith(str(tokenizer.eos_token)) else ids


class Decoder:
    """A model that reads tokens into a cache and says what comes next.

    Rows of unequal length are padded on the left. Without padding no mask is passed, which attention kernels need to
    be at their fastest.

    Args:
        model: a causal language model in eval mode, plain or hybrid.
        pad: the token that stands for padding.
    """

    def __init__(self, model: Any, pad: int = 0) -> None:
        self.model, self.pad = model, pad
        takes = signature(type(model.model).forward).parameters
        self._argument = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
        self._cache: Any = None
        self._mask: Tensor | None = None

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads one prompt a row into a new cache; returns the logits after the last token of each, [B, vocabulary]."""
        self._cache = None
        longest = max(len(prompt) for prompt in prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        rows = [[self.pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._mask = None
        if min(len(prompt) for prompt in prompts) < longest:
            columns = torch.arange(longest, device=self.model.device)
            self._mask = (columns >= longest - lengths[:, None]).long()  # [B, T]
        return self._pass(torch.tensor(rows, device=self.model.device))

    def step(self, tokens: Tensor) -> Tensor:
        """Appends one token a row, [B]; returns the logits after it, [B, vocabulary]."""
        if self._mask is not None:
            self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        return self._pass(tokens[:, None])

    def _pass(self, tokens: Tensor) -> Tensor:
        arguments: dict[str, Any] = {self._argument: self._cache}
        if self._mask is not None:
            positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            arguments |= {"attention_mask": self._mask, "position_ids": positions}
        outputs = self.model.model(input_ids=tokens, use_cache=True, **arguments)
        self._cache = cache_of(outputs)
        logits: Tensor = self.model.lm_head(outputs.last_hidden_state[:, -1])
        return logits


def cache_of(outputs: Any) -> Any:
    """The cache that a model's outputs name; `past_key_values` before transformers 5.24."""
    return outputs["cache"] if "cache" in outputs else outputs["past_key_values"]


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continues every prompt by at most `new_tokens` likeliest tokens.

    Returns:
        The new tokens of each prompt, cut before the end-of-sequence token.
    """
    ends = end_tokens(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    decoder = Decoder(model, pad)
    written: list[Tensor] = []
    with torch.inference_mode():
        logits = decoder.read(prompts)
        stops = torch.tensor(ends, device=logits.device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)
        for number in range(1, new_tokens + 1):
            written.append(logits.argmax(-1))
            ended |= torch.isin(written[-1], stops)
            if number == new_tokens or (number % CHECK_STEPS == 0 and bool(ended.all())):
                break
            logits = decoder.step(written[-1])
    return [_until_end(row, ends) for row in torch.stack(written, dim=1).tolist()]


def end_tokens(model: Any) -> list[int]:
    """The tokens that end a text, as the model's generation settings name them."""
    eos = model.generation_config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    places = [i for i, token in enumerate(tokens) if token in ends]
    return tokens[: places[0]] if places else tokens
