"""How much goes through a model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")

CPU_TOKENS = 4096
MOST_TOKENS = 2**19
FREE_SHARE = 0.4
"""Of a GPU's free memory: a growing cache is copied when it grows, and allocators leave gaps."""


def batches_by_tokens(
    things: Sequence[T], batch_tokens: int, length: Callable[[T], int], order: Callable[[T], Any] | None = None
) -> Iterator[list[int]]:
    """Indices of things that go together: in order of length, then of `order`, at most `batch_tokens` when all are as
    long as the longest of them; one thing at least."""
    ranked = sorted(range(len(things)), key=lambda i: (length(things[i]), order(things[i]) if order else 0))
    batch: list[int] = []
    for index in ranked:
        if batch and (len(batch) + 1) * length(things[index]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def groups_of_equal(keys: Sequence[int]) -> list[list[int]]:
    """The places of equal keys, in the order in which a key first comes."""
    groups: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def default_batch_tokens(models: Sequence[Any], device: torch.device) -> int:
    """Tokens that fit into the free memory of a GPU with their keys, values and activations; on a CPU, where more
    at once is not faster, a few thousand."""
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    largest = max(_bytes_per_token(model) for model in models)
    return int(min(MOST_TOKENS, max(CPU_TOKENS, FREE_SHARE * free / largest)))


def _bytes_per_token(model: Any) -> int:
    """Full attention's keys and values in every layer, and what one layer holds while it computes."""
    config, size = model.config, model.dtype.itemsize
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    computing = 4 * config.intermediate_size + 10 * config.hidden_size
    return int(size * (cached + computing))
