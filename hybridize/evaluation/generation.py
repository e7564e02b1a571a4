"""Greedy continuation through the model's own `generate`: prefill, then decode from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt, with the tokenizer's start token and without an end token."""
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    ends_itself = ids and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends_itself and not text.endswith(str(tokenizer.eos_token)) else ids


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continues every prompt by at most `new_tokens` likeliest tokens; padding is on the left.

    Returns:
        The new tokens of each prompt, cut at the end-of-sequence token.
    """
    from transformers import GenerationConfig

    eos = model.generation_config.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos or [])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    longest = max(len(prompt) for prompt in prompts)
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends or None,
    )
    with torch.inference_mode():
        out = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=settings,
        )
    return [_until_end(row[longest:].tolist(), ends) for row in out]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    places = [i for i, token in enumerate(tokens) if token in ends]
    return tokens[: places[0]] if places else tokens
