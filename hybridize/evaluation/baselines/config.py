"""How a training-free policy is set."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.families.base import AttentionGeometry
from hybridize.mixers.configs.base import MixerConfig
from hybridize.recipe.probes import PolicyName

DYNAMIC = ("accumulated_attention", "recent_attention", "last_attention")
"""Policies that go by attention, so that what a token is worth changes as the text goes on."""
BLOCK_TOKENS = 64


@dataclass(frozen=True)
class PolicyConfig(MixerConfig):
    """A window, and at most `budget_tokens` older tokens that a policy chooses.

    Attributes:
        policy: which.
        window_tokens: W, the query itself included. sink_tokens: first tokens of the text, which stay.
        budget_tokens: C, sinks included.
        block_tokens: E, positions between two choices of a policy that goes by attention; 1 is the policy as published.
        seed: of `random`.
    """

    name = "training_free_eviction"
    summary = "a window, and older tokens that stay by a rule nobody trained; for comparison"

    policy: PolicyName = "recency"
    window_tokens: int = 256
    sink_tokens: int = 4
    budget_tokens: int = 256
    block_tokens: int = BLOCK_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(self.window_tokens >= 1, "window_tokens", f"must be at least 1, is {self.window_tokens}.")
        self.require(self.sink_tokens >= 0, "sink_tokens", f"must be zero or positive, is {self.sink_tokens}.")
        least = max(1, self.sink_tokens)
        self.require(
            self.budget_tokens >= least, "budget_tokens", f"must be at least {least}, is {self.budget_tokens}."
        )
        self.require(self.block_tokens >= 1, "block_tokens", f"must be at least 1, is {self.block_tokens}.")

    @property
    def dynamic(self) -> bool:
        """Whether the policy goes by attention."""
        return self.policy in DYNAMIC

    @property
    def window(self) -> int:
        """Tokens of the window: `recency` spends its budget on a longer one."""
        extra = self.budget_tokens - self.sink_tokens if self.policy == "recency" else 0
        return self.window_tokens + extra

    @property
    def budget(self) -> int:
        """Tokens that stay outside the window."""
        return self.sink_tokens if self.policy == "recency" else self.budget_tokens

    @property
    def step(self) -> int:
        """Positions between two choices: at most the window, which no token may leave before it has competed."""
        return min(self.block_tokens, self.window) if self.dynamic else 1

    def state_bytes(self, geometry: AttentionGeometry, context: int, element_bytes: int) -> int:
        slots = min(context, self.window_tokens + self.budget_tokens)
        return 2 * slots * geometry.num_key_heads * geometry.head_size * element_bytes

    def new_parameters(self, geometry: AttentionGeometry) -> int:
        return 0
