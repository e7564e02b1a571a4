"""One question of the grid, before it is made."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hybridize.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """What is to be made.

    Attributes:
        tokens: length of the prompt.
        depth: 0 (beginning) to 1 (end), for tasks that have a place.
        rng: of this question alone.
    """

    task: str
    tokens: int
    depth: float
    rng: random.Random

    def no_room(self) -> UsageError:
        """The error of a length that cannot hold the question."""
        return UsageError(
            f"a prompt of {self.tokens} tokens has no room for a haystack ({self.task}).",
            where="evaluate.recall.lengths",
            hint="Give longer prompts: 1024 tokens hold every task with most tokenizers.",
        )
