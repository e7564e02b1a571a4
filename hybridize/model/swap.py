"""Swap the attention of a loaded model for mixers, in place, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridize.errors import UsageError
from hybridize.families import family
from hybridize.mixers.base import Mixer
from hybridize.mixers.configs.base import MixerConfig
from hybridize.model.modeling import hybrid_classes, install_mixers, layer_block

_ORIGINALS = "_hybridize_originals"


def swap(model: Any, configs: Sequence[MixerConfig]) -> Any:
    """Turns a transformers causal language model into a hybrid.

    The projections and norms are taken over by the mixers, not copied. With `full_attention` everywhere the logits
    are bit-equal to the model's own.

    Args:
        model: of a supported family, loaded with its own class.
        configs: one mixer configuration a layer.

    Returns:
        the same object, now of the hybrid class.

    Raises:
        FamilyError: the family is not supported.
        UsageError: the number of configurations is not the number of layers.
    """
    adapter = family(model.config.model_type)
    num_layers = len(adapter.layers(model.model))
    if len(configs) != num_layers:
        raise UsageError(f"{len(configs)} mixer configurations for {num_layers} layers.", hint="Give one a layer.")
    classes = hybrid_classes(adapter)
    base_config, base_model_class, base_class = model.config, type(model.model), type(model)
    values = base_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    config = classes.config(**values, hybridize=layer_block(configs))
    config._attn_implementation = base_config._attn_implementation
    config.architectures = [classes.causal_lm.__name__]
    replaced = install_mixers(model, adapter, dict(enumerate(configs)))
    model.__class__ = classes.causal_lm
    _set_config(model, base_config, config)
    object.__setattr__(model, _ORIGINALS, (base_config, base_class, base_model_class, replaced))
    return model


def undo(model: Any) -> Any:
    """Puts the original attention back into a model that `swap` turned into a hybrid.

    The result is bit-equal to the teacher unless projections were trained in between.

    Raises:
        UsageError: the model was loaded as a hybrid; the originals are not there.
    """
    originals = getattr(model, _ORIGINALS, None)
    if originals is None:
        raise UsageError("this model was not made by `swap`.", hint="Load the teacher's checkpoint instead.")
    base_config, base_class, base_model_class, replaced = originals
    adapter = family(base_config.model_type)
    layers = adapter.layers(model.model)
    for index, attention in replaced.items():
        attention.train(model.training)
        adapter.replace(layers[index], attention)
    hybrid_config = model.config
    model.model.__class__ = base_model_class
    model.__class__ = base_class
    _set_config(model, hybrid_config, base_config)
    object.__delattr__(model, _ORIGINALS)
    return model


def mixers(model: Any) -> list[tuple[int, Mixer]]:
    """The mixers of a hybrid with their layer index, lowest first (adapters around the model are looked through)."""
    found = [(module.layer_idx, module) for module in model.modules() if isinstance(module, Mixer)]
    return sorted(found, key=lambda pair: pair[0])


def _set_config(model: Any, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
