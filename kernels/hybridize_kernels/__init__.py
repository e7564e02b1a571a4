"""The operations of hybridize, each in up to three forms (reference, eager, Triton).

Knows nothing of models: tensors in, tensors out, laid out `[batch, time, heads, head size]`.
"""

from .column_statistics import attention_log_sum_exp, column_statistics
from .delta_gates import delta_gates
from .dispatch import early_launches, use_implementation
from .distillation_loss import distillation_loss, top_k_distillation_loss, top_k_targets
from .gate_gradient import gate_gradient
from .gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from .gated_mlp import gated_mlp
from .gated_rms_norm import gated_rms_norm
from .lora_linear import LoraProjection, lora_linear
from .native_sparse_attention import native_sparse_attention
from .native_sparse_decode import native_sparse_decode
from .norm_linear import norm_linear
from .retained_attention import eviction_position, retained_attention
from .retained_decode import retained_decode
from .retention_decision import RetentionDecision, retention_decision
from .retention_scores_step import retention_scores_step
from .rms_norm import rms_norm
from .rotary import rotary
from .short_convolution import short_convolution, short_convolution_step, short_convolutions
from .swiglu import swiglu
from .token_scorer import token_scorer, token_scorer_step

__all__ = [
    "LoraProjection",
    "RetentionDecision",
    "attention_log_sum_exp",
    "column_statistics",
    "delta_gates",
    "distillation_loss",
    "early_launches",
    "eviction_position",
    "gate_gradient",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gated_mlp",
    "gated_rms_norm",
    "lora_linear",
    "native_sparse_attention",
    "native_sparse_decode",
    "norm_linear",
    "retained_attention",
    "retained_decode",
    "retention_decision",
    "retention_scores_step",
    "rms_norm",
    "rotary",
    "short_convolution",
    "short_convolution_step",
    "short_convolutions",
    "swiglu",
    "token_scorer",
    "token_scorer_step",
    "top_k_distillation_loss",
    "top_k_targets",
    "use_implementation",
]
