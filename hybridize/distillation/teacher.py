"""The frozen teacher: its last hidden states, or what goes into and comes out of the layers that were converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.families import family


@dataclass(frozen=True)
class AttentionTrace:
    """One attention layer in one forward pass of the teacher.

    Attributes:
        hidden_states: [B, T, hidden_size], its input.
        position_embeddings: (cos, sin), each [B or 1, T, R].
        output: [B, T, hidden_size].
    """

    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    output: Tensor


class _LastLayerDone(Exception):
    """Ends the teacher's forward after the last layer that is asked for."""


class Teacher:
    """A teacher model, never trained.

    Args:
        model: a transformers causal language model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.adapter = family(model.config.model_type)

    # `inference_mode` would be a little faster, but its tensors may not be saved for a backward pass.

    @torch.no_grad()
    def last_hidden(self, tokens: Tensor) -> Tensor:
        """[B, T] tokens -> [B, T, hidden_size] after the final norm."""
        return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    @torch.no_grad()
    def trace(self, tokens: Tensor, layers: Iterable[int]) -> dict[int, AttentionTrace]:
        """Input and output of the attention of these layers, in a forward pass that ends with the last of them."""
        traces: dict[int, AttentionTrace] = {}
        wanted = sorted(set(layers))
        with self._listening(wanted, traces), suppress(_LastLayerDone):
            self.model.model(input_ids=tokens, use_cache=False)
        return traces

    @contextmanager
    def _listening(self, wanted: list[int], traces: dict[int, AttentionTrace]) -> Iterator[None]:
        decoder_layers = self.adapter.layers(self.model.model)
        handles = []
        for index in wanted:

            def hear(module: nn.Module, args: Any, kwargs: Any, out: Any, index: int = index) -> None:
                hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
                traces[index] = AttentionTrace(hidden_states, (cos, sin), out[0])
                if index == wanted[-1]:
                    raise _LastLayerDone

            attention = self.adapter.attention(decoder_layers[index])
            handles.append(attention.register_forward_hook(hear, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
