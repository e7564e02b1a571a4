"""The operations of hybridize, each in up to three forms (reference, eager, Triton).

Knows nothing of models: tensors in, tensors out, laid out `[batch, time, heads, head size]`.
"""

from .column_statistics import attention_log_sum_exp, column_statistics
from .dispatch import use_implementation
from .distillation_loss import distillation_loss
from .gated_delta_rule import gated_delta_rule
from .native_sparse_attention import native_sparse_attention
from .retained_attention import eviction_position, retained_attention
from .retained_decode import retained_decode
from .token_scorer import token_scorer, token_scorer_step

__all__ = [
    "attention_log_sum_exp",
    "column_statistics",
    "distillation_loss",
    "eviction_position",
    "gated_delta_rule",
    "native_sparse_attention",
    "retained_attention",
    "retained_decode",
    "token_scorer",
    "token_scorer_step",
    "use_implementation",
]
