"""What a model family tells the rest of hybridize about its attention.

A family adapter is the only place that knows the attribute names of one transformers model. Nothing here imports torch
or transformers when it is loaded: a plan is made from `config.json` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hybridize.errors import FamilyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionGeometry:
    """The sizes of a model's attention layers.

    Attributes:
        num_layers: L, decoder layers.
        hidden_size: width of the residual stream.
        num_query_heads: HQ.
        num_key_heads: H, key and value heads; divides HQ.
        head_size: D.
        vocab_size: rows of the embedding.
        intermediate_size: width of the MLP.
        max_positions: longest context the teacher was trained for, in tokens.
        tied_embeddings: the head is the embedding.
        projection_bias: (q, k, v, o) have a bias.
        qk_norm: q and k pass an RMSNorm over the head before RoPE.
        windows: per layer, the teacher's own sliding window in tokens, or None for full attention.
    """

    num_layers: int
    hidden_size: int
    num_query_heads: int
    num_key_heads: int
    head_size: int
    vocab_size: int
    intermediate_size: int
    max_positions: int
    tied_embeddings: bool
    projection_bias: tuple[bool, bool, bool, bool]
    qk_norm: bool
    windows: tuple[int | None, ...]

    @property
    def group_size(self) -> int:
        """G = HQ / H, the query heads that share a key head."""
        return self.num_query_heads // self.num_key_heads


@dataclass(frozen=True)
class AttentionView:
    """One attention layer of the teacher, by parts.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: the linear projections; q [hidden_size -> HQ*D], k and v [hidden_size -> H*D].
        q_norm, k_norm: norms over D after the split into heads, or None.
        scale: factor on q·k before the softmax.
        layer_index: position in the stack.
        geometry: the model's sizes.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    scale: float
    layer_index: int
    geometry: AttentionGeometry


class FamilyAdapter:
    """Base of the adapters; the defaults fit every Llama-like model.

    A new family sets `model_type` and the class names, and overrides what differs.
    """

    model_type: ClassVar[str]
    transformers_module: ClassVar[str]
    """Module below `transformers.models` that holds the classes."""
    config_class: ClassVar[str]
    model_class: ClassVar[str]
    causal_lm_class: ClassVar[str]
    qk_norm: ClassVar[bool] = False
    attention_attribute: ClassVar[str] = "self_attn"

    @property
    def hybrid_prefix(self) -> str:
        """Class names of the hybrid start with this: HybridizeLlama..."""
        return "Hybridize" + self.causal_lm_class.removesuffix("ForCausalLM")

    @property
    def hybrid_model_type(self) -> str:
        return f"hybridize_{self.model_type}"

    # From the configuration alone (no torch).

    def projection_bias(self, config: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
        """Which of q, k, v, o have a bias."""
        bias = bool(config.get("attention_bias", False))
        return (bias, bias, bias, bias)

    def windows(self, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
        """The teacher's own sliding window of each layer, in tokens; None is full attention."""
        return (None,) * num_layers

    def refusals(self, config: Mapping[str, Any]) -> Sequence[str]:
        """Features of this checkpoint that would be converted wrongly."""
        return ()

    def geometry(self, config: Mapping[str, Any]) -> AttentionGeometry:
        """Reads the sizes.

        Args:
            config: the parsed config.json.

        Raises:
            FamilyError: a size is missing or contradicts another.
        """
        try:
            num_layers = int(config["num_hidden_layers"])
            num_query_heads = int(config["num_attention_heads"])
            num_key_heads = int(config.get("num_key_value_heads") or num_query_heads)
            hidden_size = int(config["hidden_size"])
            geometry = AttentionGeometry(
                num_layers=num_layers,
                hidden_size=hidden_size,
                num_query_heads=num_query_heads,
                num_key_heads=num_key_heads,
                head_size=int(config.get("head_dim") or hidden_size // num_query_heads),
                vocab_size=int(config["vocab_size"]),
                intermediate_size=int(config["intermediate_size"]),
                max_positions=int(config.get("max_position_embeddings") or 0),
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
                projection_bias=self.projection_bias(config),
                qk_norm=self.qk_norm,
                windows=self.windows(config, num_layers),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FamilyError(
                f"cannot read the attention sizes: {error!r}.",
                where="config.json",
                hint="Check that the file is the one published with the model.",
            ) from error
        sizes = (num_layers, hidden_size, num_query_heads, num_key_heads, geometry.head_size, geometry.vocab_size)
        if min(sizes) <= 0 or num_query_heads % num_key_heads:
            raise FamilyError(
                f"{num_query_heads} query heads, {num_key_heads} key heads, {num_layers} layers, "
                f"hidden size {hidden_size} do not make a model.",
                where="config.json",
                hint="Sizes must be positive and key heads must divide query heads.",
            )
        return geometry

    def tensor_shapes(self, geometry: AttentionGeometry) -> dict[str, tuple[int, ...]]:
        """Names and shapes of every tensor that a checkpoint of this family holds (`lm_head` apart when tied)."""
        width, head_size = geometry.hidden_size, geometry.head_size
        query_width, key_width = geometry.num_query_heads * head_size, geometry.num_key_heads * head_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (geometry.vocab_size, width),
            "model.norm.weight": (width,),
        }
        if not geometry.tied_embeddings:
            shapes["lm_head.weight"] = (geometry.vocab_size, width)
        projections = {
            "q_proj": (query_width, width),
            "k_proj": (key_width, width),
            "v_proj": (key_width, width),
            "o_proj": (width, query_width),
        }
        for index in range(geometry.num_layers):
            layer = f"model.layers.{index}."
            for (name, shape), bias in zip(projections.items(), geometry.projection_bias, strict=True):
                shapes[f"{layer}self_attn.{name}.weight"] = shape
                if bias:
                    shapes[f"{layer}self_attn.{name}.bias"] = (shape[0],)
            if geometry.qk_norm:
                shapes[f"{layer}self_attn.q_norm.weight"] = (head_size,)
                shapes[f"{layer}self_attn.k_norm.weight"] = (head_size,)
            shapes[f"{layer}mlp.gate_proj.weight"] = (geometry.intermediate_size, width)
            shapes[f"{layer}mlp.up_proj.weight"] = (geometry.intermediate_size, width)
            shapes[f"{layer}mlp.down_proj.weight"] = (width, geometry.intermediate_size)
            shapes[f"{layer}input_layernorm.weight"] = (width,)
            shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
        return shapes

    # From the model (torch).

    def base_classes(self) -> tuple[type, type, type]:
        """The transformers classes: configuration, inner model, causal language model."""
        import importlib

        package = f"transformers.models.{self.transformers_module}"
        configuration = importlib.import_module(f"{package}.configuration_{self.transformers_module}")
        modeling = importlib.import_module(f"{package}.modeling_{self.transformers_module}")
        return (
            getattr(configuration, self.config_class),
            getattr(modeling, self.model_class),
            getattr(modeling, self.causal_lm_class),
        )

    def layers(self, inner_model: nn.Module) -> nn.ModuleList:
        """The decoder layers of the inner model (`model.model`)."""
        return inner_model.layers  # type: ignore[return-value]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention, or the mixer in its place, of a decoder layer."""
        return getattr(layer, self.attention_attribute)  # type: ignore[no-any-return]

    def replace(self, layer: nn.Module, mixer: nn.Module) -> None:
        """Puts `mixer` where the attention of `layer` was."""
        setattr(layer, self.attention_attribute, mixer)

    def attention_inputs(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states and (cos, sin) of the rotary embedding, from the arguments of an attention module."""
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        return hidden_states, (cos, sin)

    def view(self, attention: nn.Module, layer_index: int, geometry: AttentionGeometry) -> AttentionView:
        """The parts of the teacher's attention module."""
        parts: Any = attention
        return AttentionView(
            q_proj=parts.q_proj,
            k_proj=parts.k_proj,
            v_proj=parts.v_proj,
            o_proj=parts.o_proj,
            q_norm=parts.q_norm if self.qk_norm else None,
            k_norm=parts.k_norm if self.qk_norm else None,
            scale=float(parts.scaling),
            layer_index=layer_index,
            geometry=geometry,
        )
