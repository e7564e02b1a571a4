"""The teacher's attention layers, run again from their stored inputs without the layers below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybridize.distillation.data import Batch
from hybridize.distillation.teacher import AttentionTrace
from hybridize.families import family

_BUILDS_MASKS = ("eager", "sdpa")
"""Attention implementations of transformers that know of windows and documents by their mask alone."""


@torch.no_grad()
def attention_from_inputs(model: Any, batch: Batch, inputs: Mapping[int, Tensor]) -> dict[int, AttentionTrace]:
    """What `Teacher.trace` gives, from the inputs of the layers.

    Args:
        model: a transformers causal language model.
        batch: where its rows and documents begin; its tokens are not read.
        inputs: by layer, [B, T, hidden_size].
    """
    arguments = dict(batch.model_inputs())
    num_rows, length = arguments.pop("input_ids").shape
    device = next(iter(inputs.values())).device
    positions = arguments.pop("position_ids", None)
    if positions is None:
        positions = torch.arange(length, device=device).unsqueeze(0)
    adapter = family(model.config.model_type)
    layers = adapter.layers(model.model)
    windows = adapter.geometry(model.config.to_dict()).windows
    implementation = model.config._attn_implementation
    traces = {}
    for index, stored in inputs.items():
        hidden = stored.reshape(num_rows, length, -1)
        window = windows[index]
        is_plain = batch.bounds is None and (window is None or window >= length) and implementation != "eager"
        needs_mask = implementation in _BUILDS_MASKS and not is_plain
        embeddings = model.model.rotary_emb(hidden, position_ids=positions)
        out, *_ = adapter.attention(layers[index])(
            hidden_states=hidden,
            position_embeddings=embeddings,
            attention_mask=_mask(positions[0], window, hidden.dtype) if needs_mask else None,
            position_ids=positions,
            **arguments,
        )
        traces[index] = AttentionTrace(hidden, embeddings, out, arguments.get("cu_seqlens"))
    return traces


def _mask(positions: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores [1, 1, T, T]: the past of the same document, and of it the window."""
    place = torch.arange(len(positions), device=positions.device)
    document = place - positions  # where it begins
    seen = (place <= place[:, None]) & (document == document[:, None])
    if window is not None:
        seen &= place > place[:, None] - window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[
        None, None
    ]
