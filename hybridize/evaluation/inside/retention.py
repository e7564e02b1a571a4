"""What token eviction retains: how much of its budget, from where in the text, and whether it is what is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hybridize.evaluation.inside.held import held_after
from hybridize.evaluation.inside.layers import layers_with
from hybridize.evaluation.items import Item
from hybridize.evaluation.parts import Row
from hybridize.evaluation.windows import Window

PLACES = 10


def retention(student: Any, windows: Sequence[Window], *, batch_tokens: int) -> Row | None:
    """Retained tokens at the end of each text, by layer and key head; None without token-eviction layers.

    Returns:
        "layers": index, window_tokens, budget_tokens and "heads": "kept" (mean retained tokens), "use" (kept over
        budget) and "places" (of the retained tokens, the share in each tenth of the text that has left the window;
        zeros where nothing is retained); "texts" and "tokens", what was read in all.
    """
    layers = layers_with(student, "token_eviction")
    if not layers:
        return None
    counts = {layer.index: torch.zeros(layer.view.geometry.num_key_heads, PLACES) for layer in layers}
    texts = [window.tokens for window in windows]
    for _, held in held_after(student, texts, batch_tokens=batch_tokens):
        for layer in layers:
            counts[layer.index] += by_place(held[layer.index], layer.attention.config.window_tokens)
    rows = []
    for layer in layers:
        config = layer.attention.config
        rows.append(
            {
                "index": layer.index,
                "window_tokens": config.window_tokens,
                "budget_tokens": config.budget_tokens,
                "heads": [_head(count, len(texts), config.budget_tokens) for count in counts[layer.index]],
            }
        )
    return {"layers": rows, "texts": len(texts), "tokens": sum(len(text) for text in texts)}


def by_place(held: Tensor, window: int) -> Tensor:
    """bool [H, T] -> [H, 10]: how many of the tokens outside the window are held, by the tenth they lie in."""
    outside = held[:, : max(0, held.shape[1] - window)].float()
    num_outside = outside.shape[1]
    place = torch.arange(num_outside) * PLACES // max(1, num_outside)
    return torch.zeros(held.shape[0], PLACES).index_add_(1, place, outside)


def needles(student: Any, items: Sequence[Item], *, batch_tokens: int) -> Row | None:
    """The share of a question's evidence that is held when the prompt has been read: where forgetting happens.

    Args:
        items: those without `evidence` are left out.

    Returns:
        "layers": index and "heads", the mean over the prompts of the share of the evidence's tokens that the key head
        holds, retained or still in the window; "texts" and "tokens", what was read in all. None without token-eviction
        layers, or without evidence.
    """
    layers = layers_with(student, "token_eviction")
    asked = [item for item in items if item.evidence]
    if not layers or not asked:
        return None
    shares: dict[int, Tensor] = {layer.index: torch.zeros(layer.view.geometry.num_key_heads) for layer in layers}
    for i, held in held_after(student, [item.prompt for item in asked], batch_tokens=batch_tokens):
        evidence = sorted({token for start, end in asked[i].evidence for token in range(start, end)})
        for index, mask in held.items():
            shares[index] += mask[:, evidence].float().mean(1)
    return {
        "layers": [{"index": index, "heads": (share / len(asked)).tolist()} for index, share in shares.items()],
        "texts": len(asked),
        "tokens": sum(len(item.prompt) for item in asked),
    }


def _head(count: Tensor, num_texts: int, budget_tokens: int) -> Row:
    total = float(count.sum())
    kept = total / num_texts
    return {"kept": kept, "use": kept / budget_tokens, "places": (count / max(total, 1.0)).tolist()}
