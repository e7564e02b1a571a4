"""Puts items to a model: continuations in batches, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hybridize.evaluation.batches import batches_by_tokens, groups_of_equal
from hybridize.evaluation.generation import greedy
from hybridize.evaluation.items import Item, score
from hybridize.progress import Task


def ask(model: Any, tokenizer: Any, items: Sequence[Item], *, batch_tokens: int, task: Task) -> list[float]:
    """The scores of items, 0 to 1, in their order.

    Args:
        model: a causal language model in eval mode.
        batch_tokens: tokens that go through it at once, of prompts and answers.
    """
    forced = [i for i, item in enumerate(items) if item.targets]
    written = [i for i, item in enumerate(items) if not item.targets]
    texts = answers(model, tokenizer, [items[i] for i in written], batch_tokens=batch_tokens, task=task)
    scores = dict(zip(written, (score(items[i], text) for i, text in zip(written, texts, strict=True)), strict=True))
    shares = target_shares(model, [items[i] for i in forced], batch_tokens=batch_tokens, task=task)
    scores |= dict(zip(forced, shares, strict=True))
    return [scores[i] for i in range(len(items))]


def answers(model: Any, tokenizer: Any, items: Sequence[Item], *, batch_tokens: int, task: Task) -> list[str]:
    """What the model writes after each prompt, at most the item's `answer_tokens`, greedily.

    Items of one `group` go together, so that prompts of one length need no padding; an item in a batch with longer
    answers gets no more tokens for it.
    """
    texts = [""] * len(items)
    for group in groups_of_equal([item.group for item in items]):
        own = [items[i] for i in group]
        batches = batches_by_tokens(
            own, batch_tokens, lambda item: len(item.prompt) + item.answer_tokens, lambda item: item.answer_tokens
        )
        for batch in batches:
            budget = max(own[n].answer_tokens for n in batch)
            made = greedy(model, tokenizer, [own[n].prompt for n in batch], budget)
            for n, tokens in zip(batch, made, strict=True):
                texts[group[n]] = tokenizer.decode(tokens[: own[n].answer_tokens], skip_special_tokens=True)
            task.advance(len(batch))
    return texts


def target_shares(model: Any, items: Sequence[Item], *, batch_tokens: int, task: Task) -> list[float]:
    """The share of each item's targets that the model finds likeliest after the tokens before them."""
    shares = [0.0] * len(items)
    for same_length in groups_of_equal([len(item.prompt) for item in items]):
        for batch in batches_by_tokens(same_length, batch_tokens, lambda i: len(items[i].prompt)):
            chosen = [same_length[i] for i in batch]
            for i, share in zip(chosen, _shares_of(model, [items[i] for i in chosen]), strict=True):
                shares[i] = share
            task.advance(len(batch))
    return shares


def _shares_of(model: Any, items: Sequence[Item]) -> list[float]:
    """Of items whose prompts have one length."""
    rows = [row for row, item in enumerate(items) for _ in item.targets]
    positions = [position for item in items for position, _ in item.targets]
    wanted = torch.tensor([token for item in items for _, token in item.targets])
    with torch.inference_mode():
        tokens = torch.tensor([item.prompt for item in items], device=model.device)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[rows, positions]  # [targets, width]
        right = (model.lm_head(hidden).argmax(-1).cpu() == wanted).float()
    parts = right.split([len(item.targets) for item in items])
    return [float(part.mean()) for part in parts]
