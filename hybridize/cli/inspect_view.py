"""What can be said of a model, teacher or hybrid, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hybridize.checkpoint import CheckpointSource, TensorHeader, check_folder, read_config, resolve_source
from hybridize.cli.format import bytes_text, count_text
from hybridize.cli.plan_view import layer_parts, state_lines
from hybridize.errors import CheckpointError, RecipeError
from hybridize.families import AttentionGeometry, family_of_config
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.mixers.registry import config_from_dict
from hybridize.plan.bill import state_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        source: where the model is.
        model_type: as in config.json.
        geometry: its sizes.
        layers: the mixer of every layer.
        headers: tensors by name.
        state: decoding state by context length; "teacher" is full attention everywhere.
    """

    source: CheckpointSource
    model_type: str
    geometry: AttentionGeometry
    layers: tuple[MixerConfig, ...]
    headers: Mapping[str, TensorHeader]
    state: Mapping[int, Mapping[str, int]]

    @property
    def parameters(self) -> int:
        """Elements of all tensors in the files."""
        total = 0
        for header in self.headers.values():
            count = 1
            for size in header.shape:
                count *= size
            total += count
        return total

    @property
    def is_hybrid(self) -> bool:
        """Whether any layer has a mixer of ours."""
        return any(config.name != FullAttentionConfig.name for config in self.layers)

    def to_json(self, list_tensors: bool = False) -> dict[str, Any]:
        """Plain data."""
        values: dict[str, Any] = {
            "model": self.source.spec,
            "kind": self.source.kind,
            "revision": self.source.revision,
            "model_type": self.model_type,
            "is_hybrid": self.is_hybrid,
            "geometry": asdict(self.geometry),
            "layers": [config.to_dict() for config in self.layers],
            "tensors": len(self.headers),
            "parameters": self.parameters,
            "size_bytes": sum(header.size_bytes for header in self.headers.values()),
            "dtypes": dict(Counter(header.dtype for header in self.headers.values())),
            "state_bytes": {str(context): dict(by_model) for context, by_model in self.state.items()},
        }
        if list_tensors:
            values["tensor_list"] = [
                {"name": name, "dtype": header.dtype, "shape": list(header.shape), "size_bytes": header.size_bytes}
                for name, header in sorted(self.headers.items())
            ]
        return values


def inspect_model(spec: str, *, offline: bool, contexts: Sequence[int]) -> Inspection:
    """Reads configuration and tensor headers.

    Raises:
        CheckpointError, FamilyError: the model is missing, damaged or of no known family.
    """
    source = resolve_source(spec, offline=offline)
    config = read_config(source)
    _, geometry = family_of_config(config)
    layers = _layers(config, geometry)
    headers = check_folder(source)
    state = {context: state_bytes(layers, geometry, context) for context in contexts}
    return Inspection(source, str(config["model_type"]), geometry, layers, headers, state)


def _layers(config: Mapping[str, Any], geometry: AttentionGeometry) -> tuple[MixerConfig, ...]:
    layers: list[MixerConfig] = [FullAttentionConfig()] * geometry.num_layers
    block = config.get("hybridize")
    try:
        for layer in block["layers"] if block else ():
            options = dict(layer)
            index = int(options.pop("index"))
            layers[index] = config_from_dict(options)
    except (KeyError, TypeError, IndexError, ValueError, RecipeError) as error:
        raise CheckpointError(
            f"the `hybridize` block cannot be read ({error!r}).",
            where="config.json: hybridize.layers",
            hint="Convert the model again, or use the release of hybridize that wrote it.",
        ) from error
    return tuple(layers)


def inspect_parts(found: Inspection, list_tensors: bool) -> list[RenderableType]:
    """For people."""
    sizes = found.geometry
    heads = f"{sizes.num_query_heads} query and {sizes.num_key_heads} key heads of {sizes.head_size}"
    dtypes = ", ".join(
        f"{dtype} × {count}" for dtype, count in Counter(h.dtype for h in found.headers.values()).items()
    )
    size = sum(header.size_bytes for header in found.headers.values())
    parts: list[RenderableType] = [
        f"{found.source.spec}  ({found.model_type}, {'a hybrid' if found.is_hybrid else 'no hybrid'})",
        f"layers       {sizes.num_layers}, width {sizes.hidden_size}, {heads}",
        f"vocabulary   {sizes.vocab_size:,}{' (tied)' if sizes.tied_embeddings else ''}, "
        f"context {sizes.max_positions:,} tokens",
        f"tensors      {len(found.headers)} ({dtypes}), {count_text(found.parameters)} parameters, {bytes_text(size)}",
        "",
        *layer_parts(found.layers),
        "",
        *state_lines(found.state),
    ]
    if list_tensors:
        width = max(map(len, found.headers), default=0)
        parts += [
            f"{name:<{width}}  {header.dtype:<5} {list(header.shape)}" for name, header in sorted(found.headers.items())
        ]
    return parts
