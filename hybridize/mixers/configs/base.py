"""The torch-free half of a mixer: its recipe keys, their ranges, and what it costs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from hybridize.errors import RecipeError
from hybridize.families.base import AttentionGeometry


@dataclass(frozen=True)
class MixerConfig:
    """Base of the mixers' configurations. The fields of a subclass are the keys of the recipe.

    A subclass checks ranges in `__post_init__` with `require`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `hybridize recipes` and the README."""
    keeps_projections: ClassVar[bool] = True
    """The mixer uses q, k, v, o as the teacher does: LoRA suffices. False: they are trained in full."""

    def require(self, condition: bool, key: str, message: str) -> None:
        """Raises RecipeError `<mixer>.<key>: <message>` unless `condition` holds."""
        if not condition:
            raise RecipeError(message, where=f"{self.name}.{key}")

    @property
    def shared_over_layers(self) -> Hashable | None:
        """What layers that share parts of their mixers must agree in; None: this mixer shares nothing."""
        return None

    def misfits(self, geometry: AttentionGeometry, layer_index: int) -> list[str]:
        """Reasons why this configuration cannot replace that layer of that model; empty when it can."""
        return []

    def warnings(self, geometry: AttentionGeometry, context: int) -> list[str]:
        """Things that work but that the user may not expect at `context` tokens."""
        return []

    def state_bytes(self, geometry: AttentionGeometry, context: int, element_bytes: int) -> int:
        """Bytes of decoding state of one layer for one sequence after `context` tokens.

        `element_bytes` is the size of a key or value element (2 for bf16); what is kept in another type is counted in
        that type.
        """
        raise NotImplementedError

    def new_parameters(self, geometry: AttentionGeometry) -> int:
        """Parameters of one layer that the teacher does not have."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The `{"mixer": name, **fields}` form used in plans and in config.json."""
        return {"mixer": self.name, **asdict(self)}
