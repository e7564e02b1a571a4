"""failure.json: what was known when a loss or gradient was not finite, for whoever looks into it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.checkpoint import resource_errors
from hybridize.distillation.run_state import random_states


def failure_name(process: int) -> str:
    """File name by process; each has documents of its own."""
    return "failure.json" if process == 0 else f"failure-{process}.json"


def write_failure(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes the facts, as a whole file or not at all; numbers that JSON does not have become their names.

    Raises:
        ResourceError: disk full, and the like.
    """
    partial = path.with_name(path.name + ".partial")
    with resource_errors(path):
        partial.write_text(json.dumps(_plain(facts), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)


def random_digests() -> dict[str, str]:
    """SHA-256 of the state of every random generator."""
    states, tensors = random_states()
    contents = {name: json.dumps(state).encode() for name, state in states.items()}
    contents |= {name.removeprefix("random."): state.numpy().tobytes() for name, state in tensors.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@torch.no_grad()
def first_bad_layer(model: Any, batches: Sequence[Tensor]) -> int | None:
    """Index of the first decoder layer whose output is not finite for one of the tokens [B, T]; None if all are."""
    bad: list[int] = []

    def watch(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            if not bool((out[0] if isinstance(out, tuple) else out).isfinite().all()):
                bad.append(index)

        return hook

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(model.model.layers)]
    try:
        for tokens in batches:
            model.model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return min(bad, default=None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
