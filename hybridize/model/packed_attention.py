"""Attention of transformers' own layers over packed documents, for a teacher and for the layers a hybrid keeps.

transformers' own way is a mask [T, T] made from position ids. Here the bounds of the documents go straight to a kernel
that never leaves one: time by the pairs that are seen, memory linear in the text.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hybridize.errors import UsageError
from hybridize_kernels import retained_attention

IMPLEMENTATION = "hybridize_packed"
"""Its name in transformers, which makes no mask for an implementation that it does not know."""


def use_packed_attention(model: Any) -> None:
    """Lets a loaded transformers model, hybrid or not, take `cu_seqlens` in its forward pass.

    With cu_seqlens [N + 1] and input_ids [1, T] each document attends to itself alone; give position_ids that count in
    each. Without, texts are read as before. The model no longer takes padding: a mask of it is refused.
    """
    inner = model.base_model
    model.set_attn_implementation(IMPLEMENTATION)
    if not getattr(inner, "_refuses_padding", False):
        inner.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
        inner._refuses_padding = True


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: causal, over the model's own sliding window where it has one.

    Args:
        query: [B, HQ, T, D]. key, value: [B, H, S, D]; the queries are the last T of S tokens.
        attention_mask: [B, 1, T, S] made by the caller, or None.
        scaling: factor on q·k; D**-0.5 unless given.
        sliding_window: tokens, the query itself included; None: all.
        cu_seqlens: [N + 1] int32, the bounds of documents of one row, or None.

    Returns:
        [B, T, HQ, D] and None.

    Raises:
        UsageError: packed documents come with a mask or with dropout.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    slides = sliding_window is not None and sliding_window < num_keys
    options = {"dropout": dropout, "scaling": scaling, **kwargs}
    if cu_seqlens is None:
        if attention_mask is not None or (not slides and num_queries in (1, num_keys)):
            out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
            return out, None
    elif attention_mask is not None:
        raise UsageError("packed documents (cu_seqlens) take no attention mask.", hint="Leave the mask out.")
    elif query.device.type == "cpu" and not slides:
        parts = [
            sdpa_attention_forward(module, *(x[:, :, start:end] for x in (query, key, value)), None, **options)[0]
            for start, end in pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, dim=1), None
    if dropout:
        raise UsageError(
            f"attention dropout ({dropout}) does not go with packed documents, sliding windows and caches of texts.",
            hint="Set attention_dropout to 0 in the model's configuration.",
        )
    window = sliding_window if slides else num_keys
    assert window is not None
    # Under autocast the rotation is in fp32.
    query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    return retained_attention(query, key, value, window=window, scale=scaling, cu_seqlens=cu_seqlens), None


def _refuse_padding(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """transformers makes no mask for this implementation, so that one that is given would be ignored."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if module.config._attn_implementation == IMPLEMENTATION and isinstance(mask, Tensor) and mask.dim() == 2:
        raise UsageError(
            "a model set to packed attention takes no padding mask.",
            hint="Use set_attn_implementation('sdpa') to read padded batches.",
        )


AttentionInterface.register(IMPLEMENTATION, packed_attention)
