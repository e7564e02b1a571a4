"""Token eviction: the rule of what is seen, the state that follows it, and the scores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from hybridize.errors import RecipeError
from hybridize.families.base import AttentionGeometry
from hybridize.mixers.base import MixerState, Rope
from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from hybridize.mixers.parts.retention_mixer import on_grid
from hybridize.mixers.token_eviction import TokenEviction
from tests.mixers.one_layer import LAYER, OneLayer

WINDOW, BUDGET, SINKS, MARGIN = 8, 6, 2, 6
SHARINGS = ("head", "layer", "model")
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def eviction(dtype: torch.dtype = torch.float32, **changes: Any) -> OneLayer:
    """A layer in eval mode whose scorer keeps some tokens and drops others."""
    config = TokenEvictionConfig(
        **{"window_tokens": WINDOW, "budget_tokens": BUDGET, "sink_tokens": SINKS, "scorer_dropout": 0.0, **changes}
    )
    layer = OneLayer(config, dtype=dtype)
    layer.mixer.eval()
    layer.disturb()
    return layer


def keys_values(layer: OneLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    size = layer.geometry.head_size
    return layer.mixer.k_proj(x).unflatten(-1, (-1, size)), layer.mixer.v_proj(x).unflatten(-1, (-1, size))


def logits(layer: OneLayer, x: Tensor) -> Tensor:
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    return layer.mixer.new.scorer(*keys_values(layer, x), real)


def held_scores(state: MixerState, head: int, window: int = WINDOW) -> dict[int, float]:
    """Position and score of every token in the first row's ring and retained slots."""
    last, scores = int(state["last_position"][0]), state["scores"][0, head].tolist()
    held = {position: scores[position % window] for position in range(max(0, last - window + 1), last + 1)}
    retained = state["retained_positions"][0, head].tolist()
    count = int(state["num_retained"][0, head])
    assert min(retained[:count], default=0) >= 0
    assert set(retained[count:]) <= {-1}, "retained slots are filled from the first"
    assert len({*held, *retained[:count]}) == len(held) + count, "a token lies in one slot"
    return held | {position: scores[window + slot] for slot, position in enumerate(retained[:count])}


def streamed_cache(scores: list[float], window: int, budget: int, sinks: int) -> list[list[int]]:
    """What a cache shows to each query, told as a story: a token that leaves the window applies for a slot."""
    retained: list[int] = []
    shown = []
    for query in range(len(scores)):
        leaving = query - window
        if leaving >= 0 and (leaving < sinks or scores[leaving] > 0):
            retained.append(leaving)
            if len(retained) > budget:
                retained.remove(min(retained, key=lambda j: (float("inf") if j < sinks else scores[j], -j)))
        shown.append(retained + list(range(max(0, query - window + 1), query + 1)))
    return shown


@pytest.mark.parametrize(
    "changes", [{}, {"score": "relu"}, {"budget_tokens": 2}, {"sink_tokens": 0}, {"window_tokens": 7}]
)
@torch.no_grad()
def test_output_is_softmax_over_what_a_streamed_cache_shows(changes: dict[str, Any]) -> None:
    layer = eviction(**changes)
    config, mixer, tokens = layer.mixer.config, layer.mixer, 40
    x = layer.hidden_states(1, tokens)
    k, v = keys_values(layer, x)
    rope = Rope(*layer.rope(x, torch.arange(tokens)[None]))
    q, k = (x[0] for x in rope(mixer.q_proj(x).unflatten(-1, (-1, layer.geometry.head_size)), k))
    v = v[0]
    scores = mixer._score(logits(layer, x))[0]
    expected = torch.zeros_like(q)
    dropped = 0
    for query_head in range(q.shape[1]):
        head = query_head // layer.geometry.group_size
        shown = streamed_cache(scores[:, head].tolist(), config.window_tokens, config.budget_tokens, config.sink_tokens)
        for i, seen in enumerate(shown):
            weights = (k[seen, head] @ q[i, query_head] * mixer.scale).softmax(-1)
            expected[i, query_head] = weights @ v[seen, head]
            dropped += i + 1 - len(seen)
    assert dropped > 0
    torch.testing.assert_close(layer(x)[0], mixer.o_proj(expected.flatten(1)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_everything_retained_is_the_teacher(model_type: str) -> None:
    """As the mixer is made, before any training: the cap does not bind and every logit starts near its bias."""
    layer = OneLayer(TokenEvictionConfig(window_tokens=8, budget_tokens=64), model_type)
    layer.mixer.eval()
    x = layer.hidden_states(2, 50)
    torch.testing.assert_close(layer(x), layer.teacher(x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", CLOSE)
@torch.no_grad()
def test_decoding_equals_one_call_at_every_length(dtype: torch.dtype) -> None:
    layer = eviction(dtype)
    x = layer.hidden_states(2, 2 * WINDOW + 16)
    whole = layer(x)
    assert whole.dtype == dtype
    for prompt in range(1, 2 * WINDOW + 3):
        rest = [1] * (x.shape[1] - prompt)
        torch.testing.assert_close(layer.pieces(x, DynamicCache(), [prompt, *rest]), whole, atol=CLOSE[dtype], rtol=0)


@given(
    st.lists(st.integers(1, 17), min_size=1, max_size=7),
    st.sampled_from(SHARINGS),
    st.sampled_from([2, 3, 6]),
    st.booleans(),
)
def test_any_pieces_equal_one_call(lengths: list[int], sharing: str, budget: int, with_gradient: bool) -> None:
    layer = eviction(scorer_sharing=sharing, budget_tokens=budget)
    x = layer.hidden_states(1, sum(lengths))
    with torch.set_grad_enabled(with_gradient):
        torch.testing.assert_close(layer.pieces(x, DynamicCache(), lengths), layer(x), atol=2e-5, rtol=0)


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 3), st.integers(0, 5))
@torch.no_grad()
def test_state_holds_what_a_streamed_cache_shows(seed: int, window_extra: int, sinks: int, budget_extra: int) -> None:
    window, budget = MARGIN + window_extra, max(1, sinks) + budget_extra
    torch.manual_seed(seed)
    layer = eviction(window_tokens=window, sink_tokens=sinks, budget_tokens=budget)
    x, cache = layer.hidden_states(1, 45), DynamicCache()
    scores = on_grid(layer.mixer._score(logits(layer, x)))[0]
    seen = 0
    for piece in x.split([5, 1, 14] + [1] * 20 + [3, 2], dim=1):
        layer(piece, cache)
        seen += piece.shape[1]
        for head in range(layer.geometry.num_key_heads):
            shown = streamed_cache(scores[:, head].tolist(), window, budget, sinks)[seen - 1]
            assert set(held_scores(cache.layers[LAYER], head, window)) == set(shown)


@pytest.mark.parametrize("dtype", CLOSE)
@torch.no_grad()
def test_sinks_stay_in_every_type_at_positions_that_no_short_type_can_count(dtype: torch.dtype) -> None:
    layer = eviction(dtype)
    tokens, padding = 2100, 301
    x, cache = layer.hidden_states(1, tokens + padding), DynamicCache()
    positions = (torch.arange(tokens + padding) - padding).clamp(min=-1)[None]
    layer(x, cache, positions)
    state = cache.layers[LAYER]
    for head in range(layer.geometry.num_key_heads):
        held = set(held_scores(state, head))
        assert set(range(SINKS)) <= held
        assert set(range(tokens - WINDOW, tokens)) <= held


@pytest.mark.parametrize("sharing", SHARINGS)
@torch.no_grad()
def test_padding_changes_nothing(sharing: str) -> None:
    """On the left, row by row of another length, and between turns."""
    layer = eviction(scorer_sharing=sharing)
    columns = torch.zeros(4, 48, dtype=torch.bool)
    for row, real in enumerate(([(19, 48)], [(8, 48)], [(0, 48)], [(15, 20), (24, 30), (38, 48)])):
        for start, stop in real:
            columns[row, start:stop] = True
    positions = torch.where(columns, columns.cumsum(1) - 1, -1)
    x = layer.hidden_states(4, 48) * torch.where(columns, 1.0, 50.0)[..., None]
    cache = DynamicCache()
    edges = [(0, 20), (20, 23), (23, 24), (24, 31), *((c, c + 1) for c in range(31, 48))]
    for out in (
        layer(x, None, positions),
        torch.cat([layer(x[:, a:b], cache, positions[:, a:b]) for a, b in edges], 1),
    ):
        for row in range(4):
            alone = layer(x[row : row + 1, columns[row]])
            torch.testing.assert_close(out[row : row + 1, columns[row]], alone, atol=2e-5, rtol=0)


@torch.no_grad()
def test_stored_scores_are_those_of_the_whole_sequence() -> None:
    layer = eviction()
    x, cache, seen = layer.hidden_states(1, 60), DynamicCache(), 0
    expected = layer.mixer._score(logits(layer, x))[0]
    for piece in x.split([3, 1, 20] + [1] * 36, dim=1):
        layer(piece, cache)
        seen += piece.shape[1]
        state = cache.layers[LAYER]
        for head in range(layer.geometry.num_key_heads):
            for position, score in held_scores(state, head).items():
                if position < seen - MARGIN:
                    assert score == pytest.approx(float(expected[position, head]), abs=2e-5)
                else:
                    assert score == 0, "a score that waits for its context is not guessed"


@torch.no_grad()
def test_state_made_in_inference_mode_can_be_continued_outside() -> None:
    layer = eviction()
    x, cache = layer.hidden_states(1, 30), DynamicCache()
    with torch.inference_mode():
        layer(x[:, :20], cache)
    rest = torch.cat([layer(piece, cache) for piece in x[:, 20:].split([1, 8, 1], dim=1)], 1)
    torch.testing.assert_close(rest, layer(x)[:, 20:], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_score_depends_on_its_margin_alone() -> None:
    layer = eviction()
    x = layer.hidden_states(1, 30)
    base = logits(layer, x)
    changed = x.clone()
    changed[:, 15] += 1.0
    moved = (logits(layer, changed) != base).any(-1)[0].nonzero().flatten().tolist()
    assert moved == list(range(15 - MARGIN, 15 + MARGIN + 1, 2))  # dilation 2, so every second one


def test_gradient_of_a_score_is_that_of_a_gate_on_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    import hybridize.mixers.token_eviction as module

    # Values have no second gradient, through the scorer.
    layer = eviction(score_gradient="straight_through", score_relaxation="gate", detach_scorer_input=True)
    layer.mixer.train()
    seen: dict[str, Tensor] = {}
    attention = module.retained_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, score: Tensor, **kwargs: Any) -> Tensor:
        seen.update(v=v, score=score)
        return attention(q, k, v, score, **kwargs)

    monkeypatch.setattr(module, "retained_attention", watched)
    made: list[Tensor] = []
    score = layer.mixer._logits
    monkeypatch.setattr(layer.mixer, "_logits", lambda *given: made.append(score(*given)) or made[-1])
    x = layer.hidden_states(2, 40)
    loss = (layer(x) * torch.randn(2, 40, layer.geometry.hidden_size)).sum()
    of_value, of_logit = torch.autograd.grad(loss, [seen["v"], made[0]])
    opened = torch.sigmoid(made[0])
    expected = (of_value * seen["v"]).sum(-1) * opened * (1 - opened)
    expected[:, -MARGIN:] = 0  # their decisions concern no query of this text
    torch.testing.assert_close(of_logit, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_parameters_and_gradients(sharing: str) -> None:
    layer = eviction(scorer_sharing=sharing)
    layer.mixer.train()
    new = dict(layer.mixer.new.named_parameters())
    assert sum(p.numel() for p in new.values()) == layer.mixer.config.new_parameters(layer.geometry)
    loss = layer(layer.hidden_states(2, 40)).square().sum() + sum(layer.mixer.auxiliary.values())
    loss.backward()
    for name, parameter in new.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_parameter_count_of_the_paper() -> None:
    geometry = AttentionGeometry(24, 1024, 16, 16, 64, 32000, 2816, 4096, True, (False,) * 4, False, (None,) * 24)
    assert TokenEvictionConfig().new_parameters(geometry) == 16 * 32385 == 518160
    assert TokenEvictionConfig(scorer_sharing="layer").new_parameters(geometry) == 32385


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@torch.no_grad()
def test_state_is_as_large_as_promised_at_every_length(dtype: torch.dtype, size: int) -> None:
    layer = eviction(dtype)
    for tokens in (1, WINDOW, 70):
        cache = DynamicCache()
        x = layer.hidden_states(3, tokens + 1)
        layer(x[:, :tokens], cache)
        layer(x[:, tokens:], cache)
        promised = layer.mixer.config.state_bytes(layer.geometry, tokens + 1, size)
        state = cache.layers[LAYER]
        assert state.bytes_per_sequence() == promised
        assert sum(tensor.untyped_storage().nbytes() for tensor in state.tensors.values()) == 3 * promised


def test_budget_loss_and_what_the_controller_saw() -> None:
    layer = eviction()
    mixer: TokenEviction = layer.mixer.train()  # type: ignore[assignment]
    mixer.new.controller.l1_weight.copy_(torch.tensor([0.1, 0.3]))
    x = layer.hidden_states(2, 40)
    positions = torch.stack([torch.arange(40), (torch.arange(40) - 9).clamp(min=-1)])
    layer(x, None, positions)
    scores = [mixer._score(logits(layer, row[None]))[0, :-MARGIN] for row in (x[0], x[1, 9:])]
    all_scores = torch.cat(scores)  # the padded row counts by its real tokens
    above = (all_scores + mixer.config.l1_margin).clamp(min=0)
    expected = (above * torch.tensor([0.1, 0.3])).mean()
    torch.testing.assert_close(mixer.auxiliary["eviction_budget"], expected, atol=1e-7, rtol=1e-5)
    mixer.after_step()
    kept = (all_scores > 0).float().mean(0) * (40 - MARGIN)
    rate = 2 / 17
    torch.testing.assert_close(mixer.new.controller.num_kept, (1 - rate) * (40 - MARGIN) + rate * kept)
    assert float(mixer.metrics()["kept_tokens_mean"]) == pytest.approx(float(mixer.new.controller.num_kept.mean()))
    mixer.eval()
    layer(x)
    assert mixer.auxiliary == {}


def test_budget_falls_with_the_schedule_and_binds_in_training() -> None:
    layer = eviction()
    mixer: TokenEviction = layer.mixer  # type: ignore[assignment]
    with torch.no_grad():
        mixer.new.scorer.output_bias.fill_(50.0)  # everything scores alike and above 0
        mixer.new.scorer.output_weight.zero_()
    x = layer.hidden_states(1, 40)
    mixer.train()
    for progress, budget in ((0.0, 40), (0.5, 23), (1.0, BUDGET)):
        mixer.schedule(progress, 40)
        assert mixer.budget_tokens == budget
    with torch.no_grad():
        binding = layer(x)
        mixer.schedule(0.0, 40)
        torch.testing.assert_close(layer(x), layer.teacher(x), atol=2e-5, rtol=0)
        assert mixer.eval().budget_tokens == BUDGET, "outside training the final budget holds"
        assert (layer(x) - layer.teacher(x)).abs().max() > 1e-3
        assert torch.equal(layer(x), binding)


def test_warmup_keeps_everything_and_freeze_trains_nothing() -> None:
    layer = eviction(warmup_steps=1, freeze_steps=2, scorer_bias_init=-5.0)
    mixer = layer.mixer.train()
    x = layer.hidden_states(1, 40)
    torch.testing.assert_close(layer(x), layer.teacher(x), atol=2e-5, rtol=0)
    mixer.after_step()
    out = layer(x)
    assert (out - layer.teacher(x)).abs().max() > 1e-3
    out.sum().backward()
    assert all(p.grad is None for p in mixer.new.parameters())
    mixer.after_step()
    layer(x).sum().backward()
    assert all(p.grad is not None for p in mixer.new.parameters())


@pytest.mark.parametrize("detach", [False, True])
def test_detached_input_spares_keys_and_values(detach: bool) -> None:
    layer = eviction(detach_scorer_input=detach)
    mixer = layer.mixer.train()
    mixer.new.controller.l1_weight.fill_(1.0)
    layer(layer.hidden_states(1, 40))
    mixer.auxiliary["eviction_budget"].backward()
    assert mixer.new.scorer.output_bias.grad.abs().sum() > 0
    assert (mixer.k_proj.weight.grad is None) == (mixer.v_proj.weight.grad is None) == detach


def test_saved_and_loaded_is_the_same() -> None:
    layer, other = eviction(), eviction()
    layer.disturb()
    layer.mixer.new.controller.num_kept.fill_(12.5)
    x = layer.hidden_states(1, 40)
    assert not torch.equal(layer(x), other(x))
    other.mixer.load_state_dict(copy.deepcopy(layer.mixer.state_dict()))
    assert torch.equal(layer(x), other(x))
    assert float(other.mixer.new.controller.num_kept[0]) == 12.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window_tokens", 6),
        ("budget_tokens", 3),
        ("budget_tokens", 0),
        ("sink_tokens", -1),
        ("scorer_kernel", 4),
        ("scorer_layers", 0),
        ("scorer_dropout", 1.0),
        ("scorer_sharing", "all"),
        ("score", "tanh"),
        ("l1_increase", 0.5),
        ("l1_min", 0.0),
        ("l1_max", 1e-12),
    ],
)
def test_ranges_are_checked(key: str, value: Any) -> None:
    with pytest.raises(RecipeError) as raised:
        TokenEvictionConfig(**{key: value})
    assert raised.value.where == f"token_eviction.{key}"
