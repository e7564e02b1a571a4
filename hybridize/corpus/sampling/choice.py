"""How the tokens of a written text are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.errors import UsageError
from hybridize.inference.sampling import Sampling as AnySampling
from hybridize.inference.sampling import choose

__all__ = ["Sampling", "choose"]


@dataclass(frozen=True)
class Sampling(AnySampling):
    """As for generation, but always by chance."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0:
            hint = "Give a number above 0: without chance every text would be the same."
            raise UsageError("must be above 0, is 0.", where="--temperature", hint=hint)
