"""Rows of text, written side by side: a row whose text has ended begins the next one in the same step.

All that a step needs and leaves lies in tensors of fixed place on the device, the random numbers of many steps
included. So on a GPU one step is recorded as a CUDA graph and replayed, and the host is asked once in `STEPS` steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridize.corpus.sampling.caches import IMPLEMENTATION, RowCaches
from hybridize.corpus.sampling.choice import Sampling, choose
from hybridize.families import family_of_config
from hybridize.inference.recorded import Recorded
from hybridize.model.training_form import enter

STEPS = 256
"""Steps between two looks at what was written."""
_CHANGES_WITH_LENGTH = {"dynamic", "longrope"}
"""Rotary positions that look at the longest text of every step: no graph can hold that."""


@dataclass(frozen=True)
class Openings:
    """What texts begin with.

    Attributes:
        tokens: of each opening, at least one; one is drawn for every text. The first token is no part of the text.
        ends: tokens that end a text.
    """

    tokens: Sequence[Sequence[int]]
    ends: Sequence[int]

    def table(self) -> Tensor:
        """[openings, longest + 1] int64; −1 after the end of each."""
        width = max(map(len, self.tokens)) + 1
        return torch.tensor([[*row, *[-1] * (width - len(row))] for row in self.tokens])


class Writer:
    """Writes texts with a model, `batch` at a time.

    Args:
        model: a causal language model of transformers, in eval mode; it belongs to the writer from now on.
        openings: what texts begin with.
        sampling: how tokens are drawn.
        batch: rows.
        sequence_tokens: longest text, the opening's first token included.
        seed: of all that is drawn. Model, batch and seed decide what is written.
    """

    def __init__(
        self, model: Any, openings: Openings, sampling: Sampling, *, batch: int, sequence_tokens: int, seed: int = 0
    ) -> None:
        self.model, self.sampling = model, sampling
        self.batch, self.sequence_tokens = batch, sequence_tokens
        device = self._device = model.device
        self._numbers = torch.Generator().manual_seed(seed)
        self._draws = random.Random(seed)
        self._openings = openings.table().to(device)
        self._ends = torch.tensor(list(openings.ends), device=device)
        integers = {"dtype": torch.int64, "device": device}
        self._tokens, self._positions, self._opening = (torch.zeros(batch, **integers) for _ in range(3))
        _, geometry = family_of_config(model.config.to_dict())
        slots = [min(window or sequence_tokens, sequence_tokens) for window in geometry.windows]
        self._caches = RowCaches(self._positions, slots)
        self._step_number = torch.zeros(1, **integers)
        self._uniform = torch.zeros(STEPS, batch, device=device)
        self._next_opening = torch.zeros(STEPS, batch, **integers)
        self._written = torch.zeros(STEPS, batch, **integers)
        self._ended = torch.zeros(STEPS, batch, dtype=torch.bool, device=device)
        model.set_attn_implementation(IMPLEMENTATION)
        enter(model)
        # Every text begins anew after the steps that compile kernels: there is nothing to leave as it was.
        self._recorded_step = Recorded(self.step, device, lambda: None, enabled=self._holds_in_a_graph())

    @torch.inference_mode()
    def write(self, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Writes one token a row and step, from new texts on.

        Yields:
            For up to `STEPS` steps at a time, the tokens [steps, B] int64 and whether a text ends with them (bool).
        """
        self._recorded_step.prepare()
        self._begin()
        for start in range(0, steps, STEPS):
            count = min(STEPS, steps - start)
            self._draw(self._uniform, self._next_opening)
            self._step_number.zero_()
            for _ in range(count):
                self._recorded_step()
            # Copies: on a CPU the next steps would write over what was yielded.
            yield self._written[:count].cpu().numpy().copy(), self._ended[:count].cpu().numpy().copy()

    def step(self) -> None:
        """One token a row."""
        logits = self.logits()
        number = self._step_number
        sampled = choose(logits, self._uniform.index_select(0, number)[0], self.sampling)
        following = self._positions + 1
        asked = self._openings[self._opening, following.clamp(max=self._openings.shape[1] - 1)]
        token = torch.where(asked < 0, sampled, asked)
        stops = (asked < 0) & (token[:, None] == self._ends).any(-1)
        ended = stops | (following >= self.sequence_tokens - 1)
        self._written.index_copy_(0, number, token[None])
        self._ended.index_copy_(0, number, ended[None])
        self._opening.copy_(torch.where(ended, self._next_opening.index_select(0, number)[0], self._opening))
        self._positions.copy_(torch.where(ended, 0, following))
        self._tokens.copy_(torch.where(ended, self._openings[self._opening, 0], token))
        number.add_(1)

    def logits(self) -> Tensor:
        """[B, vocabulary] after the token that each row stands at, which goes into the caches."""
        outputs = self.model.model(
            input_ids=self._tokens[:, None],
            position_ids=self._positions[:, None],
            use_cache=False,
            caches=self._caches,
        )
        logits: Tensor = self.model.lm_head(outputs.last_hidden_state[:, 0])
        return logits

    def _begin(self) -> None:
        """Every row at the first token of a new text. What lies in the caches is not read again."""
        self._draw(torch.empty(1, self.batch), self._opening[None])
        self._positions.zero_()
        self._tokens.copy_(self._openings[self._opening, 0])

    def _draw(self, uniform: Tensor, openings: Tensor) -> None:
        """Fills both, [steps, B], by numbers that are the same on every device."""
        uniform.copy_(torch.rand(uniform.shape, generator=self._numbers))
        kinds = len(self._openings)
        if kinds > 1:
            drawn = [self._draws.randrange(kinds) for _ in range(openings.numel())]
            openings.copy_(torch.tensor(drawn).view(openings.shape))

    def _holds_in_a_graph(self) -> bool:
        return getattr(self.model.model.rotary_emb, "rope_type", "default") not in _CHANGES_WITH_LENGTH
