"""The new parameters of a token-eviction layer."""

from __future__ import annotations

from torch import nn

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.budget_controller import BudgetController
from hybridize.mixers.parts.token_scorer import TokenScorer


class RetentionParts(nn.Module):
    """The scorer and the controller of its budget."""

    def __init__(self, config: TokenEvictionConfig, geometry: AttentionGeometry) -> None:
        super().__init__()
        self.scorer = TokenScorer(
            config.scorer_widths(geometry.head_size),
            config.scorer_kernel,
            config.scorer_dilation,
            geometry.num_key_heads if config.scorer_sharing == "head" else 1,
            config.scorer_dropout,
        )
        self.controller = BudgetController(config, geometry.num_key_heads)
