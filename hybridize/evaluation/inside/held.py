"""Which tokens the token-eviction layers hold after a text has been read into a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.evaluation.batches import batches_by_tokens, groups_of_equal
from hybridize.evaluation.generation import cache_of
from hybridize.evaluation.inside.layers import layers_with
from hybridize.mixers.base import MixerState


def held_after(
    model: Any, texts: Sequence[Sequence[int]], *, batch_tokens: int
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Reads every text in one pass and tells what is held at its end.

    Args:
        model: a hybrid in eval mode.
        texts: tokens of each, at least one.
        batch_tokens: of texts of one length that go through the model at once.

    Yields:
        The number of a text, in no particular order, and by layer which tokens it holds: bool [H, T], retained or
        still in the window.
    """
    windows = {layer.index: layer.attention.config.window_tokens for layer in layers_with(model, "token_eviction")}
    for batch in equal_length_batches(texts, batch_tokens):
        with torch.inference_mode():
            tokens = torch.tensor([list(texts[i]) for i in batch], device=model.device)
            outputs = model.model(input_ids=tokens, use_cache=True)
            cache = cache_of(outputs)
            held = {index: held_tokens(cache.layers[index], window).cpu() for index, window in windows.items()}
            del outputs, cache
        for row, i in enumerate(batch):
            yield i, {index: mask[row] for index, mask in held.items()}


def held_tokens(state: MixerState, window: int) -> Tensor:
    """bool [B, H, T] of a token-eviction state that has read T tokens a row, none of them padding."""
    retained = state["retained_positions"].long()  # [B, H, budget], -1 where a slot is empty
    num_tokens = state.seen_tokens
    held = torch.zeros(*retained.shape[:2], num_tokens + 1, dtype=torch.bool, device=retained.device)
    held.scatter_(2, torch.where(retained >= 0, retained, num_tokens), True)
    held[..., max(0, num_tokens - window) :] = True
    return held[..., :num_tokens]


def equal_length_batches(texts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of texts of one length, at most `batch_tokens` together; one text at least."""
    for group in groups_of_equal([len(text) for text in texts]):
        for batch in batches_by_tokens(group, batch_tokens, lambda i: len(texts[i])):
            yield [group[n] for n in batch]
