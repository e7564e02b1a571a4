"""The frozen teacher: its last hidden states, or what goes into and comes out of the layers that were converted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridize.distillation.data import Batch
from hybridize.distillation.losses import Head
from hybridize.families import family


@dataclass(frozen=True)
class AttentionTrace:
    """One attention layer in one forward pass of the teacher.

    Attributes:
        hidden_states: [B, T, hidden_size], its input.
        position_embeddings: (cos, sin), each [B or 1, T, R].
        output: [B, T, hidden_size].
        cu_seqlens: bounds of the documents in a packed row, or None.
    """

    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    output: Tensor
    cu_seqlens: Tensor | None = None

    def inputs(self) -> dict[str, Any]:
        """What a mixer in the layer's place is called with."""
        packed = {} if self.cu_seqlens is None else {"cu_seqlens": self.cu_seqlens}
        return {"hidden_states": self.hidden_states, "position_embeddings": self.position_embeddings, **packed}


class _LastLayerDone(Exception):
    """Ends the teacher's forward after the last layer that is asked for."""


class Teacher:
    """A teacher model, never trained.

    Args:
        model: a transformers causal language model.

    Attributes:
        stops_early: `trace` leaves out what comes after the last layer that is asked for.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.stops_early = True
        self.adapter = family(model.config.model_type)

    # `inference_mode` would be a little faster, but its tensors may not be saved for a backward pass.

    @torch.no_grad()
    def last_hidden(self, batch: Batch) -> Tensor:
        """[B, T, hidden_size] after the final norm; [1, B·T, hidden_size] of packed documents."""
        return self.model.model(**batch.model_inputs(), use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def targets(self, batch: Batch) -> Head:
        """What the student's next-token distributions are compared with."""
        head = self.model.lm_head
        return Head(self.last_hidden(batch), head.weight, head.bias)

    @torch.no_grad()
    def trace(self, batch: Batch, layers: Iterable[int]) -> dict[int, AttentionTrace]:
        """Input and output of the attention of these layers, in a forward pass that ends with the last of them."""
        traces: dict[int, AttentionTrace] = {}
        wanted = sorted(set(layers))
        inputs = batch.model_inputs()
        with self._listening(wanted, traces, inputs.get("cu_seqlens")), suppress(_LastLayerDone):
            self.model.model(**inputs, use_cache=False)
        return traces

    @contextmanager
    def _listening(
        self, wanted: list[int], traces: dict[int, AttentionTrace], cu_seqlens: Tensor | None
    ) -> Iterator[None]:
        decoder_layers = self.adapter.layers(self.model.model)
        handles = []
        for index in wanted:

            def hear(module: nn.Module, args: Any, kwargs: Any, out: Any, index: int = index) -> None:
                hidden_states, embeddings = self.adapter.attention_inputs(args, kwargs)
                traces[index] = AttentionTrace(hidden_states, embeddings, out[0], cu_seqlens)
                if index == wanted[-1] and self.stops_early:
                    raise _LastLayerDone

            attention = self.adapter.attention(decoder_layers[index])
            handles.append(attention.register_forward_hook(hear, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
