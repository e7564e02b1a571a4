"""One text token by token: which of them each head still holds at its end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from hybridize.evaluation.inside.held import held_after
from hybridize.evaluation.inside.layers import layers_with
from hybridize.evaluation.parts import Row
from hybridize.evaluation.windows import Window


def shown(student: Any, tokenizer: Any, windows: Sequence[Window], *, shown_tokens: int) -> Row | None:
    """The first text that is long enough (else the longest), cut to `shown_tokens`, read into a cache.

    Returns:
        "pieces": the text of each token; "window_tokens", the widest; "layers": index and "heads", of each key head the
        `bit_mask` of the tokens that are retained or still in the window. None without token-eviction layers.
    """
    layers = layers_with(student, "token_eviction")
    if not layers:
        return None
    enough = (window for window in windows if len(window.tokens) >= shown_tokens)
    window = next(enough, None) or max(windows, key=lambda window: len(window.tokens))
    tokens = window.tokens[:shown_tokens]
    ((_, held),) = held_after(student, [tokens], batch_tokens=len(tokens))
    return {
        "pieces": pieces(tokenizer, tokens),
        "window_tokens": max(layer.attention.config.window_tokens for layer in layers),
        "layers": [
            {"index": index, "heads": [bit_mask(of_head) for of_head in mask]} for index, mask in sorted(held.items())
        ],
    }


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the text of all.

    A character of several tokens belongs to the one that completes it: a token's piece is what it adds to the
    beginning of the text that is final.
    """
    beginnings = [
        tokenizer.decode(tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for end in range(1, len(tokens) + 1)
    ]
    text = beginnings[-1]
    ends = [0]
    for beginning in beginnings:
        ends.append(max(ends[-1], _common(beginning, text)))
    return [text[start:end] for start, end in pairwise(ends)]


def bit_mask(held: Tensor) -> str:
    """bool [T] -> hexadecimal, token 0 first, most significant bit first, filled up with zeros to whole bytes."""
    bits = "".join("1" if token else "0" for token in held.tolist())
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").hex()


def _common(a: str, b: str) -> int:
    """Characters before the first that differs."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
