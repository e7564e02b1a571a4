"""`variants.py` with an error of published converters, to measure what it costs.

Keys and values of grouped heads are expanded row by row of the projection's matrix instead of head by head, so that
queries and keys do not match any more. For recipes with `own_keys: true` and without `calibrate_sequences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import nn

from benchmarks import variants
from hybridize.families.base import AttentionView
from hybridize.mixers import gated_delta_net
from hybridize.mixers.parts.own_keys import with_own_keys


def scrambled(view: AttentionView) -> AttentionView:
    """The view with own keys whose rows stand where a row-wise repeat puts them."""
    wide = with_own_keys(view)
    if wide is view:
        return view
    group = view.geometry.group_size
    return replace(
        wide, **{name: _repeated(getattr(view, name), getattr(wide, name), group) for name in ("k_proj", "v_proj")}
    )


def _repeated(narrow: Any, wide: Any, group: int) -> Any:
    for name in ("weight", "bias"):
        rows = getattr(narrow, name)
        if rows is not None:
            setattr(wide, name, nn.Parameter(rows.detach().repeat_interleave(group, dim=0)))
    return wide


def main(arguments: Sequence[str] | None = None) -> None:
    with patch.object(gated_delta_net, "with_own_keys", scrambled):
        variants.main(arguments)


if __name__ == "__main__":
    main()
