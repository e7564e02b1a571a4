"""The plan as a value: what `convert` will do, and its form in plan.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hybridize.errors import CheckpointError, RecipeError
from hybridize.families import AttentionGeometry
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.mixers.registry import config_from_dict
from hybridize.plan.bill import Bill

VERSION = 1
_AGAIN = "`hybridize convert` writes one beside the model; `hybridize plan --out FILE` writes one alone."

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ConversionPlan:
    """What `convert` will do.

    Attributes:
        model: the teacher as the recipe gives it.
        revision: its Hub commit, or None.
        fingerprint: SHA-256 over its configuration and tensor headers.
        family: its model type.
        teacher_config: its config.json.
        geometry: its sizes.
        layers: the mixer of every layer; `FullAttentionConfig` where the teacher's layer stays.
        dtype: type of the converted weights.
        seed: of the recipe.
        bill: what it costs.
        warnings: things that work but may surprise.
    """

    model: str
    revision: str | None
    fingerprint: str
    family: str
    teacher_config: Mapping[str, Any]
    geometry: AttentionGeometry
    layers: tuple[MixerConfig, ...]
    dtype: Dtype
    seed: int
    bill: Bill
    warnings: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[int, ...]:
        """Indices of the layers that get a mixer."""
        return tuple(index for index, config in enumerate(self.layers) if config.name != FullAttentionConfig.name)

    @property
    def teacher(self) -> str:
        """The model, pinned to the revision that was planned for."""
        return f"{self.model.split('@')[0]}@{self.revision}" if self.revision else self.model

    def to_json(self) -> dict[str, Any]:
        """Plain data; the inverse of `from_json`."""
        values = {name: getattr(self, name) for name in ("model", "revision", "fingerprint", "family", "dtype", "seed")}
        return {
            "format": "hybridize-plan",
            "version": VERSION,
            **values,
            "teacher_config": dict(self.teacher_config),
            "geometry": asdict(self.geometry),
            "layers": [config.to_dict() for config in self.layers],
            "bill": self.bill.to_json(),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ConversionPlan:
        """Reads what `to_json` gives.

        Raises:
            CheckpointError: it is not a plan, or one of another version.
        """
        if values.get("format") != "hybridize-plan" or values.get("version") != VERSION:
            raise CheckpointError("is not a plan of this version of hybridize.", where="plan.json", hint=_AGAIN)
        try:
            geometry = dict(values["geometry"])
            geometry["projection_bias"] = tuple(geometry["projection_bias"])
            geometry["windows"] = tuple(geometry["windows"])
            return cls(
                **{name: values[name] for name in ("model", "revision", "fingerprint", "family", "dtype", "seed")},
                teacher_config=dict(values["teacher_config"]),
                geometry=AttentionGeometry(**geometry),
                layers=tuple(config_from_dict(layer) for layer in values["layers"]),
                bill=Bill.from_json(values["bill"]),
                warnings=tuple(values["warnings"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
            raise CheckpointError(f"is damaged ({error!r}).", where="plan.json", hint=_AGAIN) from error

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        text = json.dumps(self.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ConversionPlan:
        """Reads a plan file.

        Raises:
            CheckpointError: it is missing or is not a plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be read ({error}).", where=str(path), hint=_AGAIN) from error
        if not isinstance(values, dict):
            raise CheckpointError("is not a plan.", where=str(path), hint=_AGAIN)
        return cls.from_json(values)
