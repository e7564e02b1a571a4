"""The training form of a model: the same layers in fewer launches, with adapters that cost no product of their own.

Decoder layers get another `forward`: norms, rotary positions and the MLP's activation are fused ops, projections that
read one input are one op, LoRA is added to weights instead of to activations, residual sums ride on other kernels. Up
to rounding the numbers are those of transformers and PEFT. Student and teacher take the form while they train; it
changes no parameter and no name, and `leave` takes it off again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridize.families import family
from hybridize.families.base import FamilyAdapter
from hybridize.mixers.base import Mixer
from hybridize_kernels import LoraProjection, gated_mlp, lora_linear, rms_norm, rotary, swiglu

_FORWARD = "forward"
_RECOMPUTED = "hybridize_recomputed"
"""Of a layer. transformers' own `gradient_checkpointing` would act on it, in a way that changed within 5.x."""
_ADAPTER = "default"


def enter(model: Any) -> None:
    """Puts every decoder layer of a causal language model, adapters included, into the training form."""
    adapter = family(model.config.model_type)
    windows = adapter.geometry(model.config.to_dict()).windows
    for layer, window in zip(adapter.layers(model.model), windows, strict=True):
        attention = adapter.attention(layer)
        if isinstance(attention, Mixer):
            attention.project = project  # type: ignore[method-assign]
        else:
            setattr(attention, _FORWARD, partial(_attention, attention, adapter, window))
        setattr(layer, _FORWARD, partial(_layer, layer, attention))
    for module in model.model.modules():
        if hasattr(module, "variance_epsilon"):  # transformers' RMSNorms, the last one and those of queries and keys
            setattr(module, _FORWARD, partial(_norm, module))


def leave(model: Any) -> None:
    """Takes the training form off."""
    for module in model.model.modules():
        for name in (_FORWARD, "project", _RECOMPUTED):
            vars(module).pop(name, None)


def project(x: Tensor, modules: Sequence[nn.Module], residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """What linear layers make of x [..., in], their adapters included; the residual is added to that of a single one.

    Adapters with dropout act on activations, as PEFT has them.
    """
    parts = [_projection(module) for module in modules]
    if None not in parts:
        return lora_linear(x, parts, residual=residual)  # type: ignore[arg-type]
    outputs = tuple(module(x) for module in modules)
    return outputs if residual is None else (outputs[0].to(residual.dtype) + residual,)


def _projection(module: Any) -> LoraProjection | None:
    """A linear layer by parts, as PEFT left it; None if it is not one, or drops out."""
    saved = getattr(module, "modules_to_save", None)
    if saved is not None:
        module = saved[_ADAPTER]
    if isinstance(module, nn.Linear):
        return LoraProjection(module.weight, module.bias)
    if not hasattr(module, "lora_A") or _ADAPTER not in module.lora_A:
        return None
    if not isinstance(module.lora_dropout[_ADAPTER], nn.Identity):
        return None
    base, down, up = module.base_layer, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
    return LoraProjection(base.weight, base.bias, down, up, module.scaling[_ADAPTER])


def _layer(layer: Any, attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A pre-norm decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""
    if args or _has_cache(kwargs):
        return type(layer).forward(layer, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
    run = partial(layer_body, layer, attention, **kwargs)
    if getattr(layer, _RECOMPUTED, False) and layer.training and torch.is_grad_enabled():
        return checkpoint(run, hidden_states, use_reentrant=False)  # type: ignore[no-any-return]
    return run(hidden_states)  # type: ignore[call-arg]


def layer_body(layer: Any, attention: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    mlp, after = layer.mlp, layer.post_attention_layernorm
    # The stream goes on with what the norm returns of it: its two gradients meet in the norm's own backward pass.
    normed, hidden_states = _norm(layer.input_layernorm, hidden_states, return_sum=True)
    out, _ = attention(hidden_states=normed, **kwargs)
    gate, up, down = (_projection(module) for module in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    is_swiglu = mlp.config.hidden_act in ("silu", "swish")
    if is_swiglu and gate is not None and up is not None and down is not None:
        return gated_mlp(out, hidden_states, after.weight, gate, up, down, epsilon=after.variance_epsilon)
    normed, hidden_states = _norm(after, out, hidden_states)
    if not is_swiglu:
        return hidden_states + mlp(normed)  # type: ignore[no-any-return]
    inner = swiglu(*project(normed, (mlp.gate_proj, mlp.up_proj)))
    return project(inner, (mlp.down_proj,), hidden_states)[0]


def _norm(norm: Any, x: Tensor, residual: Tensor | None = None, *, return_sum: bool = False) -> Any:
    """The norm of x; where x is added to a residual, or the sum is asked for, that of their sum, and the sum."""
    return rms_norm(x, norm.weight, epsilon=norm.variance_epsilon, residual=residual, return_sum=return_sum)


def _attention(
    attention: Any,
    adapter: FamilyAdapter,
    window: int | None,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The teacher's own attention as transformers has it, over its window if it has one."""
    if _has_cache(kwargs):
        whole = {"hidden_states": hidden_states, "attention_mask": attention_mask, **kwargs}
        return type(attention).forward(attention, position_embeddings=position_embeddings, **whole)  # type: ignore[no-any-return]
    assert position_embeddings is not None
    shape = (*hidden_states.shape[:-1], -1, attention.head_dim)
    q, k, v = (x.view(shape) for x in project(hidden_states, (attention.q_proj, attention.k_proj, attention.v_proj)))
    if adapter.qk_norm:
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = rotary(q, k, *position_embeddings)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    out, _ = attend(
        attention,
        *(x.transpose(1, 2) for x in (q, k, v)),
        attention_mask,
        dropout=0.0 if not attention.training else attention.attention_dropout,
        scaling=attention.scaling,
        **{"sliding_window": window, **kwargs},
    )
    return project(out.reshape(*hidden_states.shape[:-1], -1), (attention.o_proj,))[0], None


def _has_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a layer is called to decode, which is not what this form is for."""
    return arguments.get("cache") is not None or arguments.get("past_key_values") is not None


def checkpointed(model: Any, layers: Iterable[int]) -> None:
    """Recomputes these decoder layers in the backward pass, and keeps what the others have computed."""
    chosen = set(layers)
    for index, layer in enumerate(family(model.config.model_type).layers(model.model)):
        setattr(layer, _RECOMPUTED, index in chosen)


def recomputed_layers(model: Any) -> tuple[int, ...]:
    """The decoder layers that `checkpointed` chose."""
    layers = family(model.config.model_type).layers(model.model)
    return tuple(index for index, layer in enumerate(layers) if getattr(layer, _RECOMPUTED, False))
