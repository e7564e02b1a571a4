"""The hybrid as a transformers model.

For each family three small subclasses are made: a configuration with its own `model_type` ("hybridize_llama") and a
`hybridize` block that says which layer has which mixer, the inner model, and the causal language model. Parameter
names stay those of the base; only `self_attn` of the swapped layers is another module.

An exported folder carries a flattened copy of this file, so it imports nothing but what such a copy needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hybridize.errors import CheckpointError, UsageError
from hybridize.families.base import FamilyAdapter
from hybridize.mixers.base import Mixer, refuse_packing_with
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.parts.documents import document_positions
from hybridize.mixers.parts.preallocated import preallocate
from hybridize.mixers.registry import config_from_dict, mixer_class

BLOCK_VERSION = 1


class HybridClasses(NamedTuple):
    """The transformers classes of one family's hybrids."""

    config: type
    model: type
    causal_lm: type


def layer_block(configs: Sequence[MixerConfig]) -> dict[str, Any]:
    """The `hybridize` block of config.json: the layers that do not keep full attention."""
    layers = [
        {"index": index, **config.to_dict()} for index, config in enumerate(configs) if config.name != "full_attention"
    ]
    return {"version": BLOCK_VERSION, "layers": layers}


def mixer_configs(block: Mapping[str, Any] | None) -> dict[int, MixerConfig]:
    """The inverse of `layer_block`: layer index -> mixer configuration.

    Raises:
        CheckpointError: the block is missing or of another version.
    """
    if not isinstance(block, Mapping) or "layers" not in block:
        raise CheckpointError(
            "the configuration has no `hybridize` block.",
            where="config.json",
            hint="This folder was not written by hybridize, or its config.json was changed.",
        )
    if block.get("version") != BLOCK_VERSION:
        raise CheckpointError(
            f"the `hybridize` block has version {block.get('version')!r}; this release reads {BLOCK_VERSION}.",
            where="config.json",
            hint="Use the hybridize release that wrote it.",
        )
    return {
        int(layer["index"]): config_from_dict({key: value for key, value in layer.items() if key != "index"})
        for layer in block["layers"]
    }


def token_positions(attention_mask: Tensor | None, num_tokens: int, seen_tokens: int) -> Tensor | None:
    """Index of each new token among the real tokens of its row, -1 for padding.

    Args:
        attention_mask: [B, seen_tokens + num_tokens], non-zero for real tokens, or None.
        num_tokens: T, the new columns.
        seen_tokens: columns already in the cache.

    Returns:
        [B, T] int64, or None where no mask was given.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise UsageError(
            "a hybrid takes a 2-D attention mask (batch, tokens).",
            hint="Masks with a row for each query cannot be expressed in a recurrent state or an evicting cache.",
        )
    if attention_mask.shape[1] != seen_tokens + num_tokens:
        raise UsageError(
            f"the attention mask has {attention_mask.shape[1]} columns for {seen_tokens} cached and {num_tokens} new "
            "tokens.",
            hint="Pass one column for every token so far, cached ones included.",
        )
    real = attention_mask != 0
    positions = real.long().cumsum(dim=-1) - 1
    return positions.masked_fill(~real, -1)[:, seen_tokens:]


class HybridModelMixin:
    """What the inner model (`model.model`) of a hybrid adds to its base."""

    cache_argument: str
    """What the base's forward calls its cache: `cache`, or `past_key_values` before transformers 5.24."""
    hybrid_adapter: FamilyAdapter

    @property
    def full_attention_layers(self) -> list[int]:
        """Indices of the layers that keep the teacher's attention."""
        layers = self.hybrid_adapter.layers(self)  # type: ignore[arg-type]
        return [i for i, layer in enumerate(layers) if not isinstance(self.hybrid_adapter.attention(layer), Mixer)]

    def forward(  # type: ignore[no-untyped-def]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ):
        """The base's forward, and what it does not know.

        Args:
            cu_seqlens: [N + 1] int32, the bounds of N documents, from 0 to T, packed into the one row of input_ids
                [1, T]: each gives what it gives alone. Positions count in each document; position_ids follow from
                the bounds unless given. It goes with no mask and no cache. The layers that keep full attention need
                `use_packed_attention` to do this in linear memory; other implementations make a mask [T, T].

        Raises:
            UsageError: arguments that do not go together.
        """
        if cache is not None and past_key_values is not None:
            raise UsageError("`cache` and `past_key_values` are two names of one argument.", hint="Pass `cache` alone.")
        cache = past_key_values if cache is None else cache
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None:
            seen = 0 if cache is None else cache.get_seq_length()
            if attention_mask is None and seen and any(getattr(s, "seen_padding", False) for s in cache.layers):
                raise UsageError(
                    "the cache holds padding, and no attention mask says where.",
                    hint="Pass the mask of all tokens so far with every call, as generate does.",
                )
            kwargs["token_positions"] = token_positions(attention_mask, tokens.shape[1], seen)
            if cu_seqlens is not None:
                if attention_mask is not None:
                    raise UsageError(
                        "packed documents (cu_seqlens) have no padding, but an attention mask came with them.",
                        hint="Leave the mask out.",
                    )
                refuse_packing_with(True if use_cache else cache, tokens.shape[0])
                positions = document_positions(cu_seqlens, tokens.shape[1])
                position_ids = positions if position_ids is None else position_ids
                use_cache = False
                kwargs.update(cu_seqlens=cu_seqlens, token_positions=positions)
        if use_cache is None and cache is None:
            # In training none: a decoding state carries no gradient.
            use_cache = getattr(self.config, "use_cache", False) and not self.training  # type: ignore[attr-defined]
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)  # type: ignore[attr-defined]
        if cache is not None:
            preallocate(cache, self.full_attention_layers)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{self.cache_argument: cache},
            **kwargs,
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers builds on the meta device and calls this for whatever the checkpoint did not hold; what was
        # loaded carries a flag and must stay.
        if not isinstance(module, Mixer):
            super()._init_weights(module)  # type: ignore[misc]
            return
        if module.new is None:
            return
        tensors = [*module.new.parameters(), *module.new.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            return
        loaded = [tensor for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
        if len(loaded) == len(tensors):
            return
        values = [tensor.clone() for tensor in loaded]
        module.initialise_new()
        for tensor, value in zip(loaded, values, strict=True):
            tensor.copy_(value)


class HybridCausalLMMixin:
    """What the causal language model of a hybrid adds to its base."""

    # Its states cannot be rolled back, so transformers refuses assisted decoding and prompt lookup up front.
    _is_stateful = True
    hybrid_adapter: FamilyAdapter

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        install_mixers(self, self.hybrid_adapter, mixer_configs(config.hybridize))
        self.post_init()  # type: ignore[attr-defined]

    @property
    def mixers(self) -> dict[int, Mixer]:
        """The mixers by layer index."""
        return {
            index: attention
            for index, layer in enumerate(self.hybrid_adapter.layers(self.model))  # type: ignore[attr-defined]
            if isinstance(attention := self.hybrid_adapter.attention(layer), Mixer)
        }


def install_mixers(model: Any, adapter: FamilyAdapter, configs: Mapping[int, MixerConfig]) -> dict[int, nn.Module]:
    """Puts mixers into `model` in place and turns its inner model into a hybrid's.

    Returns:
        the replaced attention modules by layer index.

    Raises:
        CheckpointError: a layer index lies outside the model.
    """
    geometry = adapter.geometry(model.config.to_dict())
    layers = adapter.layers(model.model)
    outside = [index for index in configs if not 0 <= index < len(layers)]
    if outside:
        raise CheckpointError(
            f"layer {outside[0]} is outside 0..{len(layers) - 1}.", where="config.json: hybridize.layers"
        )
    replaced: dict[int, nn.Module] = {}
    shared: Mixer | None = None
    for index, config in sorted(configs.items()):
        cls = mixer_class(config.name)
        if cls is None:
            continue
        attention = adapter.attention(layers[index])
        mixer = cls.from_attention(adapter.view(attention, index, geometry), config)
        mixer.train(attention.training)
        if config.shared_over_layers is not None:
            if shared is None:
                shared = mixer
            else:
                mixer.share(shared)
        adapter.replace(layers[index], mixer)
        replaced[index] = attention
    model.model.__class__ = hybrid_classes(adapter).model
    return replaced


_CLASSES: dict[str, HybridClasses] = {}


def hybrid_classes(adapter: FamilyAdapter, module: str = __name__) -> HybridClasses:
    """The hybrid classes of a family, made once.

    Args:
        adapter: the family.
        module: `__module__` of the classes when they are made; an export passes the module that its `auto_map` names.
    """
    if adapter.model_type in _CLASSES:
        return _CLASSES[adapter.model_type]
    base_config, base_model, base_causal_lm = adapter.base_classes()
    takes = signature(base_model.forward).parameters  # type: ignore[attr-defined]
    prefix = adapter.hybrid_prefix
    config = type(
        f"{prefix}Config",
        (base_config,),
        {
            "__module__": module,
            "__annotations__": {"hybridize": dict | None},
            "__doc__": f"Configuration of a {adapter.model_type} hybrid; `hybridize` says which layer has which mixer.",
            "model_type": adapter.hybrid_model_type,
            "hybridize": None,
        },
    )
    model = type(
        f"{prefix}Model",
        (HybridModelMixin, base_model),
        {
            "__module__": module,
            "config_class": config,
            "__annotations__": {"config": config},
            "hybrid_adapter": adapter,
            "cache_argument": "cache" if "cache" in takes else "past_key_values",
        },
    )
    causal_lm = type(
        f"{prefix}ForCausalLM",
        (HybridCausalLMMixin, base_causal_lm),
        {
            "__module__": module,
            "config_class": config,
            "__annotations__": {"config": config},
            "hybrid_adapter": adapter,
        },
    )
    classes = HybridClasses(config, model, causal_lm)
    _CLASSES[adapter.model_type] = classes
    return classes
