"""A layer of a cache as it once was, to go back to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Copies, which no later token changes.

    Attributes:
        tensors: the layer's tensors by name.
        seen_tokens: columns passed through until then, padding included.
        seen_padding: some of them were padding.
    """

    tensors: dict[str, Tensor]
    seen_tokens: int
    seen_padding: bool = False

    @classmethod
    def of(cls, tensors: dict[str, Tensor], seen_tokens: int, seen_padding: bool = False) -> Snapshot:
        """Copies the tensors."""
        return cls({name: x.detach().clone() for name, x in tensors.items()}, seen_tokens, seen_padding)
