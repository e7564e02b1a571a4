"""Retained attention: what each query sees, against definitions by hand and a streaming cache, and every gradient."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize_kernels import eviction_position, retained_attention, use_implementation
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

eager = import_module("hybridize_kernels.retained_attention.eager")
FORMS = ["reference", "eager"]
NEVER = torch.iinfo(torch.int64).max


def positions_of(time, *padding, device="cpu"):
    """One row an entry of `padding`, left-padded by so many tokens."""
    return torch.stack([(torch.arange(time) - missing).clamp(min=-1) for missing in padding]).to(device)


def make_inputs(time, heads=2, group=3, size=8, *, keys=None, dtype=torch.float64, device="cpu"):
    keys = time if keys is None else keys
    shapes = [(2, time, heads * group, size), (2, keys, heads, size), (2, keys, heads, size), (2, keys, heads)]
    return [torch.randn(*shape, dtype=torch.float64).to(dtype).to(device) for shape in shapes]


def seen_by(query_positions, key_positions, score, **options):
    """Which keys each query sees, read off the output: uniform weights over one-hot values. Bool `[B, H, T, S]`."""
    batch, time = query_positions.shape
    keys = key_positions.shape[1]
    heads = 1 if score is None else score.shape[2]
    one_hot = torch.eye(keys, dtype=torch.float64)[None, :, None].expand(batch, keys, heads, keys)
    zeros = torch.zeros(batch, time, heads, keys, dtype=torch.float64)
    output = retained_attention(
        zeros,
        torch.zeros_like(one_hot),
        one_hot,
        score,
        query_positions=query_positions,
        key_positions=key_positions,
        **options,
    )
    return output.transpose(1, 2) > 0


def simulate_cache(score, *, window, sinks, budget):
    """What a cache of `budget` slots shows query 0, 1, ... of one head: sets of positions."""
    slots, shown = [], []
    for i in range(len(score)):
        leaving = i - window
        if leaving >= 0 and (leaving < sinks or score[leaving] > 0):
            slots.append((-math.inf if leaving < sinks else -score[leaving], leaving))
            if budget is not None and len(slots) > budget:
                slots.remove(max(slots))
        shown.append({position for _, position in slots} | set(range(max(0, i - window + 1), i + 1)))
    return shown


def as_sets(seen):
    return [set(row.nonzero().flatten().tolist()) for row in seen]


@pytest.mark.parametrize("form", FORMS)
def test_window_counts_the_query_and_sinks_stay(form):
    positions = positions_of(7, 0)
    with use_implementation(form):
        seen = seen_by(positions, positions, None, window=3, sinks=1)
    assert as_sets(seen[0, 0]) == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 2, 3, 4}, {0, 3, 4, 5}, {0, 4, 5, 6}]


@pytest.mark.parametrize("form", FORMS)
def test_left_padding_is_never_seen_and_sees_nothing(form):
    positions = positions_of(6, 2)
    score = torch.ones(1, 6, 1)
    score[0, 3] = -1
    with use_implementation(form):
        seen = seen_by(positions, positions, score, window=1, sinks=1)
    # Key 3 is position 1 and not retained; key 2 is position 0, the sink.
    assert as_sets(seen[0, 0]) == [set(), set(), {2}, {2, 3}, {2, 4}, {2, 4, 5}]


@st.composite
def cache_cases(draw):
    time = draw(st.integers(1, 24))
    sinks = draw(st.integers(0, 3))
    budget = draw(st.one_of(st.none(), st.integers(sinks, 8)))
    values = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.5, 0.75, 1.0, math.inf])  # few values, many ties
    score = draw(st.lists(values, min_size=time, max_size=time))
    return (
        score,
        draw(st.integers(1, 9)),
        sinks,
        budget,
        draw(st.integers(0, 5)),
        draw(st.randoms(use_true_random=False)),
    )


@settings(max_examples=150, deadline=None)
@given(cache_cases())
@pytest.mark.parametrize("form", FORMS)
def test_every_query_sees_what_a_streaming_cache_holds(form, case):
    score, window, sinks, budget, padding, random = case
    expected = simulate_cache(score, window=window, sinks=sinks, budget=budget)
    slot_of = list(range(padding, padding + len(score)))
    random.shuffle(slot_of)  # keys come in any order
    slot_of += sorted(set(range(padding + len(score))) - set(slot_of))
    key_positions = torch.full((1, padding + len(score)), -1)
    scores = torch.ones(1, padding + len(score), 1, dtype=torch.float64)
    for position, value in enumerate(score):
        key_positions[0, slot_of[position]] = position
        scores[0, slot_of[position], 0] = value
    with use_implementation(form):
        seen = seen_by(positions_of(len(score), 0), key_positions, scores, window=window, sinks=sinks, budget=budget)
    shown = [{int(key_positions[0, slot]) for slot in row} for row in as_sets(seen[0, 0])]
    assert shown == expected


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(0, 4),
    st.integers(0, 12),
    st.integers(2, 40),
    st.integers(0, 9),
    st.integers(0, 999),
)
def test_eviction_positions_equal_brute_force(keys, sinks, budget, levels, padding, seed):
    torch.manual_seed(seed)
    score = torch.randint(-2, levels, (2, keys, 3)).double()
    order = torch.rand(2, keys, 3).argsort(1)
    positions = (order - padding).clamp(min=-1)
    results = []
    for form in FORMS:
        with use_implementation(form):
            results.append(eviction_position(score, positions, sinks=sinks, budget=budget, window=5))
    assert results[0].dtype == torch.int64
    assert torch.equal(*results)


def test_eviction_positions_by_hand():
    score = torch.tensor([9.0, 0.5, -1.0, 0.7, 0.5, 0.6])[None, :, None]
    evicted = eviction_position(score, torch.arange(6)[None], sinks=1, budget=2, window=3)
    # Slot one is the sink's. 1 holds the other until 3 beats it; 4 and 5 never get in; 2 is not kept.
    assert evicted[0, :, 0].tolist() == [NEVER, 3, 2, NEVER, 4, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [1, 3, 5, 60])
def test_sinks_are_never_evicted(dtype, time):
    score = torch.full((1, time, 2), torch.finfo(dtype).max, dtype=dtype)
    evicted = eviction_position(score, torch.arange(time)[None], sinks=4, budget=4, window=2)
    assert (evicted[:, :4] == NEVER).all()
    assert (evicted[:, 4:] < NEVER).all()


@pytest.mark.parametrize("time", [0, 1, 7, 40])
@pytest.mark.parametrize(("heads", "group", "size"), [(2, 1, 60), (1, 3, 8), (2, 4, 5)])
@pytest.mark.parametrize("budget", [None, 5, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_the_reference(time, heads, group, size, budget, dtype, device, monkeypatch):
    monkeypatch.setattr(eager, "QUERY_CHUNK", 16)
    positions = positions_of(time, 0, 3, device=device)
    options = {"window": 6, "sinks": 2, "query_positions": positions, "key_positions": positions}
    inputs = make_inputs(time, heads, group, size, dtype=dtype, device=device)
    assert_form_agrees(partial(retained_attention, budget=budget, **options), inputs)
    assert_form_agrees(partial(retained_attention, budget=budget and 1, scale=0.2, **options), inputs[:3])


def test_bfloat16_agrees_within_its_digits(device):
    positions = positions_of(40, 0, 3, device=device)
    inputs = make_inputs(40, dtype=torch.bfloat16, device=device)
    op = partial(retained_attention, window=6, sinks=2, budget=8, query_positions=positions, key_positions=positions)
    assert op(*inputs).dtype == torch.bfloat16
    assert_form_agrees(op, inputs)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(0, 30), st.integers(1, 8), st.integers(0, 999))
def test_order_of_the_keys_is_irrelevant_in_each_head(time, past, budget, seed):
    torch.manual_seed(seed)
    keys = past + time
    q, k, v, score = make_inputs(time, keys=keys)
    query_positions = torch.arange(past, keys).expand(2, -1)
    key_positions = torch.arange(keys)[None, :, None].expand(2, keys, 2)
    options = {"window": 4, "sinks": 1, "budget": budget, "query_positions": query_positions}
    expected = retained_attention(q, k, v, score, key_positions=key_positions, **options)
    order = torch.rand(2, keys, 2).argsort(1)
    k, v = (x.gather(1, order[..., None].expand_as(x)) for x in (k, v))
    shuffled = retained_attention(
        q, k, v, score.gather(1, order), key_positions=key_positions.gather(1, order), **options
    )
    assert_close("output", shuffled, expected, OUTPUT[torch.float64])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(2, 7), st.integers(1, 6), st.integers(0, 999))
def test_what_a_cache_has_dropped_is_not_missed(past, window, budget, time, seed):
    torch.manual_seed(seed)
    keys = past + time
    q, k, v, score = make_inputs(time, keys=keys)
    query_positions = torch.arange(past, keys).expand(2, -1)
    positions = torch.arange(keys)[None, :, None].expand(2, keys, 2)
    options = {"window": window, "sinks": 2, "budget": budget, "query_positions": query_positions}
    expected = retained_attention(q, k, v, score, key_positions=positions, **options)
    evicted = eviction_position(score, positions, sinks=2, budget=budget, window=window)
    held = evicted > past - window  # what the first new query can still see, and so all that a cache has kept
    compact = positions.masked_fill(~held, -1)
    k, v = (x.masked_fill(~held[..., None], float("nan")).nan_to_num(7.0) for x in (k, v))
    output = retained_attention(q, k, v, score, key_positions=compact, **options)
    assert_close("output", output, expected, OUTPUT[torch.float64])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_score_gradient_is_that_of_a_gate_on_the_value(form, dtype):
    positions = positions_of(30, 0, 4)
    op = partial(retained_attention, window=5, sinks=1, budget=6, query_positions=positions, key_positions=positions)
    q, k, v, score = (x.requires_grad_() for x in make_inputs(30, dtype=dtype))
    with use_implementation(form):
        output = op(q, k, v, score)
        assert torch.equal(output, op(q, k, v, score.detach()))
        direction = torch.randn_like(output)
        d_value, d_score = torch.autograd.grad((output * direction).sum(), (v, score))
        assert_close("score gradient", d_score, (d_value * v).sum(-1), GRADIENT[dtype])
        for b, j, h in [(0, 0, 0), (0, 17, 1), (1, 6, 0), (1, 29, 1), (1, 2, 1)]:
            gate = torch.zeros_like(score)
            gate[b, j, h] = 0.5
            # The output is linear in the gate, so that the difference has no error of its own.
            up, down = (op(q, k, v * (1 + sign * gate[..., None]), score.detach()) for sign in (1, -1))
            difference = ((up - down) * direction).sum()
            assert abs(difference - d_score[b, j, h]) <= 100 * GRADIENT[dtype] * d_score.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_infinite_scores_and_blind_queries_give_no_nan(form):
    positions = positions_of(9, 0, 5)
    q, k, v, score = make_inputs(9)
    score[:, 3], score[:, 4] = math.inf, -math.inf
    leaves = [x.requires_grad_() for x in (q, k, v, score)]
    with use_implementation(form):
        output = retained_attention(*leaves, window=2, query_positions=positions, key_positions=positions)
    output.square().sum().backward()
    assert (output[1, :5] == 0).all()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[0].grad[1, :5] == 0).all()
    assert (score.grad[:, 3:5] == 0).all()


@pytest.mark.parametrize("options", [{"window": 50}, {"window": 1}, {"window": 7, "sinks": 3, "budget": 41}])
def test_a_long_window_or_full_retention_is_full_attention(options):
    q, k, v, score = make_inputs(41)
    positions = positions_of(41, 0, 0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    output = retained_attention(
        q, k, v, score.abs() + 0.1, query_positions=positions, key_positions=positions, **options
    )
    assert_close("output", output, expected, OUTPUT[torch.float64])


def test_keys_without_any_visible_give_zeros():
    q, k, v, score = make_inputs(3, keys=0)
    empty = torch.zeros(2, 0, dtype=torch.int64)
    for form in FORMS:
        with use_implementation(form):
            output = retained_attention(
                q, k, v, score, window=4, budget=2, query_positions=positions_of(3, 0, 0), key_positions=empty
            )
        assert torch.equal(output, torch.zeros_like(q))


def test_reference_gradient_equals_finite_differences():
    positions = positions_of(6, 0, 2)
    q, k, v, score = make_inputs(6, 1, 2, 3)
    op = partial(retained_attention, window=2, sinks=1, budget=2, query_positions=positions, key_positions=positions)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with use_implementation("reference"):
        assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, score), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"sinks": -1}, "sinks is -1"),
        ({"budget": -2}, "budget is -2"),
        ({"key_positions": torch.zeros(2, 5, dtype=torch.int64)}, "key_positions has shape"),
        ({"query_positions": torch.zeros(1, 4, dtype=torch.int64)}, "query_positions has shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    positions = positions_of(4, 0, 0)
    options = {"window": 2, "query_positions": positions, "key_positions": positions} | change
    with pytest.raises(ValueError, match=message):
        retained_attention(*make_inputs(4), **options)


def test_misshapen_tensors_are_named():
    positions = positions_of(4, 0, 0)
    q, k, v, score = make_inputs(4)
    op = partial(retained_attention, window=2, query_positions=positions, key_positions=positions)
    with pytest.raises(ValueError, match="v has shape"):
        op(q, k, v[:, :3], score)
    with pytest.raises(ValueError, match="retention_score has shape"):
        op(q, k, v, score[..., :1])
    with pytest.raises(ValueError, match="5 query heads are not a multiple of 2 key heads"):
        op(q[:, :, :5], k, v, score)


@pytest.mark.parametrize("layout", ["positions", "documents", "last"])
@pytest.mark.parametrize("budget", [None, 4])
def test_log_sum_exps_documents_and_no_positions(layout, budget, device):
    q, k, v, score = make_inputs(5 if layout == "last" else 30, keys=30, device=device)
    if layout == "documents":
        q, k, v, score = q[:1], k[:1], v[:1], score[:1]
        order = {"cu_seqlens": torch.tensor([0, 0, 11, 30], dtype=torch.int32, device=device)}
    elif layout == "positions":
        positions = positions_of(30, 0, 6, device=device)
        order = {"query_positions": positions, "key_positions": positions}
    else:
        order = {}
    options = {"window": 6, "sinks": 1, "budget": budget, **order}

    def op(*inputs):
        output, log_sum_exp = retained_attention(*inputs, return_log_sum_exp=True, **options)
        assert log_sum_exp.isneginf().any() == (layout == "positions")
        return output, log_sum_exp.clamp(min=-9)

    assert_form_agrees(op, [q, k, v, score])


def test_documents_are_attended_one_by_one():
    q, k, v, score = (x[:1] for x in make_inputs(20))
    options = {"window": 4, "sinks": 1, "budget": 3}
    packed = retained_attention(q, k, v, score, cu_seqlens=torch.tensor([0, 8, 20]), **options)
    apart = [
        retained_attention(*(x[:, part] for x in (q, k, v, score)), **options) for part in (slice(8), slice(8, 20))
    ]
    assert_close("output", packed, torch.cat(apart, dim=1), OUTPUT[torch.float64])


def test_log_sum_exp_is_the_denominator_of_the_softmax():
    q, k, v, _ = make_inputs(9, heads=1, group=1)
    for form in FORMS:
        with use_implementation(form):
            _, log_sum_exp = retained_attention(q, k, v, window=9, return_log_sum_exp=True)
        logits = torch.einsum("bthd,bshd->bts", q, k) * q.shape[-1] ** -0.5
        expected = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).logsumexp(-1)
        assert_close("log-sum-exp", log_sum_exp[..., 0], expected, OUTPUT[torch.float64])
