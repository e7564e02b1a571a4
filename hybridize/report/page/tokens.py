"""A text with each token shaded by the share of heads that hold it; layer and head can be chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def held(mask: str, num_tokens: int) -> list[bool]:
    """A bit mask as `inside.shown` writes it: hexadecimal, token 0 first, the most significant bit first."""
    return [bool(int(mask[token // 4], 16) >> (3 - token % 4) & 1) for token in range(num_tokens)]


def token_view(shown: Mapping[str, Any]) -> str:
    """The text, its legend, two selectors, and the masks for the script (`page.script`)."""
    pieces, layers = shown["pieces"], shown["layers"]
    heads = [held(mask, len(pieces)) for layer in layers for mask in layer["heads"]]
    first_in_window = len(pieces) - shown["window_tokens"]
    spans = [
        _span(piece, token, sum(head[token] for head in heads), len(heads), token >= first_in_window)
        for token, piece in enumerate(pieces)
    ]
    most_heads = max((len(layer["heads"]) for layer in layers), default=0)
    return (
        "<h3>What is held of a text</h3>"
        '<p class="note">At the end of the text: the stronger the colour, the more heads hold the token; what is '
        f"underlined lies in the window of {shown['window_tokens']} tokens, and every head sees it.</p>"
        f'<div class="choose">{_select("layer", [layer["index"] for layer in layers])}'
        f"{_select('head', range(most_heads))}</div>"
        f'<div class="tokens" id="tokens">{"".join(spans)}</div>'
        f'<script type="application/json" id="masks">{_masks(layers)}</script>'
    )


def _span(piece: str, token: int, count: int, num_heads: int, in_window: bool) -> str:
    kinds = [name for name, applies in (("window", in_window), ("break", "\n" in piece)) if applies]
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    share = count / num_heads if num_heads else 0.0
    title = f"token {token}: {count} of {num_heads} heads"
    return f'<span{kind} style="--v:{share:.3f}" title="{title}">{escape(piece)}</span>'


def _select(name: str, numbers: Sequence[int]) -> str:
    options = "".join(f'<option value="{int(number)}">{int(number)}</option>' for number in numbers)
    return f'<label>{name} <select id="{name}"><option value="all">all</option>{options}</select></label>'


def _masks(layers: Sequence[Mapping[str, Any]]) -> str:
    """As JSON that cannot end the script element."""
    masks = [{"index": layer["index"], "heads": layer["heads"]} for layer in layers]
    return json.dumps(masks, separators=(",", ":")).replace("<", "\\u003c")
