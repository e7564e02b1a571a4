"""Training-free eviction against its definition, and what holds for every policy."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.errors import RecipeError
from hybridize.evaluation.baselines.attention import PolicyAttention
from hybridize.evaluation.baselines.config import PolicyConfig
from hybridize.evaluation.baselines.policies import fixed_worth, num_queries, smoothed
from hybridize.evaluation.inside.layers import layers_of
from hybridize.mixers.base import Rope
from hybridize.recipe.probes import PolicyName
from tests.evaluation.baselines.reference import reference
from tests.tiny import tiny_teacher

POLICIES = get_args(PolicyName)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_teacher()


def attention(teacher: Any, config: PolicyConfig) -> PolicyAttention:
    return PolicyAttention.from_attention(layers_of(teacher)[1].view, config).eval()


def inputs(batch: int, tokens: int, mixer: PolicyAttention, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = mixer.geometry
    q = torch.randn(batch, tokens, sizes.num_query_heads, sizes.head_size, generator=generator)
    k, v = (torch.randn(batch, tokens, sizes.num_key_heads, sizes.head_size, generator=generator) for _ in range(2))
    angle = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(sizes.head_size // 2)
    embedding = (torch.cat((f(angle), f(angle)), dim=-1)[None] for f in (torch.cos, torch.sin))
    return q, k, v, *embedding


def run(mixer: PolicyAttention, q: Any, k: Any, v: Any, cos: Any, sin: Any, state: Any = None) -> torch.Tensor:
    start = 0 if state is None else state.seen_tokens
    rope = Rope(cos[:, start : start + q.shape[1]], sin[:, start : start + q.shape[1]])
    mixer.padded = False
    with torch.no_grad():
        out, _ = mixer.mix(q, k, v, q, rope, state, torch.arange(q.shape[1]).expand(q.shape[0], -1))
    if state is not None:
        state.seen_tokens += q.shape[1]
    return out


def expected(mixer: PolicyAttention, q: Any, k: Any, v: Any, cos: Any, sin: Any) -> torch.Tensor:
    rotated_q, rotated_k = Rope(cos, sin)(q, k)
    return reference(rotated_q, rotated_k, v, k, mixer.config, mixer.scale, mixer.layer_idx)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("block_tokens", [1, 4, 64])
@pytest.mark.parametrize(("window", "sinks", "budget"), [(7, 2, 5), (5, 0, 3), (6, 3, 3)])
def test_the_definition(teacher: Any, policy: Any, block_tokens: int, window: int, sinks: int, budget: int) -> None:
    mixer = attention(teacher, PolicyConfig(policy, window, sinks, budget, block_tokens))
    given_inputs = inputs(2, 41, mixer)
    torch.testing.assert_close(run(mixer, *given_inputs), expected(mixer, *given_inputs), rtol=1e-4, atol=1e-5)


@given(
    policy=st.sampled_from(POLICIES),
    tokens=st.integers(1, 24),
    window=st.integers(1, 9),
    sinks=st.integers(0, 3),
    more=st.integers(0, 5),
    block_tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_the_definition_property(
    policy: Any, tokens: int, window: int, sinks: int, more: int, block_tokens: int, seed: int
) -> None:
    config = PolicyConfig(policy, window, sinks, max(1, sinks + more), block_tokens, seed=seed)
    mixer = attention(tiny_teacher(num_hidden_layers=2), config)
    given_inputs = inputs(1, tokens, mixer, seed)
    torch.testing.assert_close(run(mixer, *given_inputs), expected(mixer, *given_inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("parts", [(1,) * 30, (13, 1, 1, 9, 6), (29, 1), (5, 25)], ids=str)
def test_parts_of_a_text_are_read_as_the_whole(teacher: Any, policy: Any, parts: tuple[int, ...]) -> None:
    mixer = attention(teacher, PolicyConfig(policy, 6, 2, 5, block_tokens=4))
    q, k, v, cos, sin = inputs(2, 30, mixer)
    whole = run(mixer, q, k, v, cos, sin)
    state = mixer.new_state(2, q.device, q.dtype)
    pieces = []
    for start, count in zip(torch.tensor((0, *parts)).cumsum(0).tolist(), parts, strict=False):
        span = slice(start, start + count)
        pieces.append(run(mixer, q[:, span], k[:, span], v[:, span], cos, sin, state))
        # The budget; and the window, those that were read since the last choice, and what the asked queries saw.
        assert state.num_kept <= (2 if policy == "recency" else 5)
        assert state.num_near <= mixer.config.window + mixer.config.step + num_queries(policy) + count
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_comes_later_changes_nothing_before(teacher: Any, policy: Any) -> None:
    mixer = attention(teacher, PolicyConfig(policy, 5, 1, 4, block_tokens=4))
    q, k, v, cos, sin = inputs(1, 40, mixer)
    before = run(mixer, q, k, v, cos, sin)[:, :27]
    k[:, 27:], v[:, 27:], q[:, 27:] = -k[:, 27:], 3.0, 1.0
    torch.testing.assert_close(run(mixer, q, k, v, cos, sin)[:, :27], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_batch_do_not_know_each_other(teacher: Any, policy: Any) -> None:
    mixer = attention(teacher, PolicyConfig(policy, 5, 1, 4, block_tokens=4))
    q, k, v, cos, sin = inputs(3, 30, mixer)
    together = run(mixer, q, k, v, cos, sin)
    for row in range(3):
        one = run(mixer, q[row, None], k[row, None], v[row, None], cos, sin)
        torch.testing.assert_close(one, together[row, None], rtol=1e-5, atol=1e-6)


def test_random_scores_depend_on_seed_layer_and_head_and_not_on_the_length(teacher: Any) -> None:
    def worth(tokens: int, **changes: Any) -> torch.Tensor:
        options = {"layer": 0, "seed": 0} | changes
        return fixed_worth("random", torch.zeros(1, tokens, 3, 4), torch.arange(tokens), **options)

    long = worth(4096)
    assert torch.equal(long[:, :100], worth(100))
    assert not torch.equal(worth(100, seed=1), worth(100))
    assert not torch.equal(worth(100, layer=1), worth(100))
    assert (long > 0).all()
    assert long.mean() == pytest.approx(0.5, abs=0.02)
    assert abs(torch.corrcoef(long[0].T)[0, 1]) < 0.06


def test_evicted_tokens_between_two_make_them_no_neighbours() -> None:
    worth = torch.tensor([[[0.5, 0.1, 0.2, 0.9, 0.3]]])
    positions = torch.tensor([[[0, 3, 7, 20, 22]]])
    assert torch.equal(smoothed("recent_attention", worth, positions), torch.tensor([[[0.5, 0.5, 0.2, 0.9, 0.9]]]))
    for count in range(3):
        few = smoothed("recent_attention", worth[:, :, :count], positions[:, :, :count])
        assert few.shape == (1, 1, count)
    assert smoothed("last_attention", worth, positions) is worth


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_prompt_is_not_kept_in_memory(teacher: Any, policy: Any) -> None:
    mixer = attention(teacher, PolicyConfig(policy, 16, 2, 8, block_tokens=8))
    q, k, v, cos, sin = inputs(1, 600, mixer)
    state = mixer.new_state(1, q.device, q.dtype)
    run(mixer, q, k, v, cos, sin, state)
    for name, tensor in state.tensors.items():
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        assert held <= 2 * tensor.numel(), f"{name} holds {held} numbers for {tensor.numel()}"


@pytest.mark.parametrize("policy", ["accumulated_attention", "recent_attention", "last_attention"])
def test_logits_are_not_rounded_to_bf16(teacher: Any, policy: Any) -> None:
    """With a budget for everything it is full attention; what is left is the rounding of probabilities and outputs."""
    mixer = attention(teacher, PolicyConfig(policy, 32, 2, 200))
    q, k, v, cos, sin = (x.bfloat16() for x in inputs(1, 120, mixer))
    q, k = 4 * q, 4 * k
    exact = run(mixer, *(x.float() for x in (*Rope(cos, sin)(q, k), v, torch.ones_like(cos), torch.zeros_like(sin))))
    error = (run(mixer, q, k, v, cos, sin).float() - exact).norm() / exact.norm()
    assert error < 5e-3


@pytest.mark.parametrize(
    "changes", [{"window_tokens": 0}, {"budget_tokens": 1}, {"block_tokens": 0}, {"sink_tokens": -1}], ids=str
)
def test_bad_sizes_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="must be"):
        PolicyConfig("random", **({"window_tokens": 6, "sink_tokens": 2, "budget_tokens": 5} | changes))
