"""The teacher by the best paths that it has elsewhere: transformers' model, a static cache, torch's attention.

transformers' own attention with a static cache makes a mask over all slots. With a mask, the keys of grouped heads are
repeated, and torch uses neither cuDNN nor flash attention; that would be no fair thing to compare with. Here torch's
attention gets the filled slots alone, and no mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from hybridize.errors import UsageError
from hybridize.families import family
from hybridize.inference.bench.dense_attention import IMPLEMENTATION, Slots
from hybridize.inference.bench.errors import is_out_of_memory
from hybridize.inference.recorded import Recorded
from hybridize.model.training_form import leave

Attention = Literal["cudnn", "flash"]
PIECE_TOKENS = 8192
"""Tokens a row that are read at once where memory does not allow the whole prompt."""
_BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION],
}
"""In order: the second where the first has no kernel for a shape."""


class DenseBaseline:
    """Greedy decoding of a plain model, on a GPU from a CUDA graph that was captured at one length.

    Args:
        model: of a supported family, in its transformers class, in eval mode. What an engine has changed of its passes
            is taken off.
        batch: B, rows.
        context_tokens: slots of the cache.
        attention: which of torch's kernels on a GPU; on a CPU torch chooses.
        compiled: the step goes through torch.compile.
    """

    def __init__(
        self, model: Any, *, batch: int, context_tokens: int, attention: Attention = "flash", compiled: bool = False
    ) -> None:
        leave(model)
        self.model, self.batch, self.context_tokens = model, batch, context_tokens
        self.attention: Attention = attention
        self.filled = 0
        """Tokens of each row whose keys are in the cache."""
        self._device: torch.device = model.device
        self._slots = _slots(model, batch, context_tokens)
        takes = signature(type(model.model).forward).parameters
        argument = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
        self._arguments: dict[str, Any] = {argument: Cache(layers=self._slots), "use_cache": True, "logits_to_keep": 1}
        self._step_forward: Callable[..., Any] = compile_model(model) if compiled else model
        self._compiled = compiled
        self._piece_tokens: int | None = None
        # Addresses that a captured step knows: they are written, never replaced.
        self._next = torch.zeros(batch, 1, dtype=torch.long, device=self._device)
        self._position = torch.zeros(1, 1, dtype=torch.long, device=self._device)
        self._graph: Recorded | None = None
        self._captured_at = -1

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Appends texts[i] to row i; all are of one length, since a static cache has one for all rows.

        The whole text is read in one pass; where memory ran out once, in pieces.

        Returns:
            [B, V] logits after the last token.

        Raises:
            UsageError: other than B texts of one length, or more tokens than there are slots.
        """
        if len(texts) != self.batch or len({len(text) for text in texts}) != 1:
            raise UsageError(f"the dense baseline reads {self.batch} texts of one length.", hint="Cut them to one.")
        tokens = torch.tensor(texts, device=self._device)
        start = self.filled
        self._require_slots(tokens.shape[1])
        try:
            logits = self._read_pieces(tokens)
        except Exception as error:
            if not is_out_of_memory(error) or self._piece_tokens is not None:
                raise
            self._piece_tokens = PIECE_TOKENS
            del error
            logits = None
        if logits is None:  # outside of the handler, whose traceback keeps the memory of the pass
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self.filled = start
            logits = self._read_pieces(tokens)
        self._next.copy_(logits.argmax(-1, keepdim=True))
        return logits

    @torch.no_grad()
    def run(self, steps: int) -> None:
        """Steps that all begin at the same place: each overwrites one slot, and costs what it costs at that length."""
        self._aim()
        if self._device.type != "cuda":
            for _ in range(steps):
                self._step()
            return
        if self._graph is None or self._captured_at != self.filled:
            self._capture()
        assert self._graph is not None
        for _ in range(steps):
            self._graph()

    @torch.no_grad()
    def write(self, steps: int) -> Tensor:
        """Writes greedily, each token after the last, without a graph: what the steps of `run` are checked by.

        Returns:
            [B, steps] tokens; the first is the likeliest after what was read.
        """
        written = []
        for _ in range(steps):
            written.append(self._next.clone())
            self._aim()
            self._step()
            self.filled += 1
        return torch.cat(written, dim=1)

    @property
    def following(self) -> Tensor:
        """[B]: the likeliest token after what was read, or after the last step."""
        return self._next[:, 0].clone()

    @torch.no_grad()
    def pretend(self, tokens: int) -> None:
        """Random keys and values, as if each row had read so many tokens."""
        self.filled = 0
        self._require_slots(tokens)
        for slots in self._slots:
            slots.keys[:, :, :tokens].normal_()
            slots.values[:, :, :tokens].normal_()
        self._next.random_(self.model.config.vocab_size)
        self.filled = tokens

    def reset(self) -> None:
        """Nothing was read."""
        self.filled = 0

    def state_bytes(self) -> int:
        """Bytes of the cache of one sequence."""
        return sum(x.nbytes for slots in self._slots for x in (slots.keys, slots.values)) // self.batch

    def _read_pieces(self, tokens: Tensor) -> Tensor:
        for piece in torch.split(tokens, self._piece_tokens or tokens.shape[1], dim=1):
            end = self.filled + piece.shape[1]
            self._show(end)
            positions = torch.arange(self.filled, end, device=self._device)[None]
            with self._as_dense():
                outputs = self.model(input_ids=piece, position_ids=positions, **self._arguments)
            self.filled = end
        logits: Tensor = outputs.logits[:, -1]
        return logits

    def _step(self) -> None:
        with self._as_dense():
            outputs = self._step_forward(input_ids=self._next, position_ids=self._position, **self._arguments)
        self._next.copy_(outputs.logits[:, -1].argmax(-1, keepdim=True))

    def _aim(self) -> None:
        """The next token goes into the first free slot."""
        self._require_slots(1)
        self._show(self.filled + 1)
        self._position.fill_(self.filled)

    def _capture(self) -> None:
        self._graph = None
        if self._compiled:
            torch._dynamo.reset()  # another length is another graph; past a limit dynamo would stop compiling
        following = self._next.clone()
        recorded = Recorded(self._step, self._device, lambda: self._next.copy_(following))
        recorded.prepare()
        self._graph, self._captured_at = recorded, self.filled

    def _show(self, end: int) -> None:
        """What the next pass writes lies between `filled` and `end`, and it sees the slots before `end`."""
        for slots in self._slots:
            slots.start, slots.end = self.filled, end

    def _require_slots(self, tokens: int) -> None:
        if self.filled + tokens > self.context_tokens:
            raise UsageError(
                f"{self.filled} + {tokens} tokens do not fit into {self.context_tokens} slots.",
                hint="Make the baseline with more context_tokens.",
            )

    @contextlib.contextmanager
    def _as_dense(self) -> Iterator[None]:
        """The model as this baseline runs it; left as it was, since others measure it too."""
        config = self.model.config
        before = config._attn_implementation
        config._attn_implementation = IMPLEMENTATION
        on_gpu = self._device.type == "cuda"
        kernels = sdpa_kernel(_BACKENDS[self.attention], set_priority=True) if on_gpu else contextlib.nullcontext()
        try:
            with kernels:
                yield
        finally:
            config._attn_implementation = before


def compile_model(model: Any) -> Callable[..., Any]:
    """torch.compile in its default mode: the CUDA graph is ours."""
    compiled: Callable[..., Any] = torch.compile(model, dynamic=False)
    return compiled


def _slots(model: Any, batch: int, context_tokens: int) -> list[Slots]:
    geometry = family(model.config.model_type).geometry(model.config.to_dict())
    shape = (batch, geometry.num_key_heads, context_tokens, geometry.head_size)
    return [Slots(torch.zeros(2, *shape, dtype=model.dtype, device=model.device)) for _ in range(geometry.num_layers)]
