"""The chunked kernels of the gated delta rule on short texts, compiled where there is a GPU or else interpreted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize_kernels import gated_delta_rule, use_implementation
from hybridize_kernels.dispatch import Implementation
from hybridize_kernels.gated_delta_rule import chunked, step_kernel
from tests.kernels.gated_delta_cases import (
    Case,
    assert_same,
    check,
    error_of,
    exactly,
    kernel_results,
    results,
    rounded_chunks,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE = (1, 1, 1, 1)
CUT = Case(130, batch=1, heads=ONE)
"""Three chunks, the last of them short."""


@pytest.mark.parametrize("time", [0, 1, 15, 63, 64, 65, 130])
@pytest.mark.parametrize(("key", "value"), [(8, 40), (12, 10), (16, 16), (40, 24)])
def test_everything_equals_the_loop(time: int, key: int, value: int, kernel_device: str) -> None:
    check(Case(time, batch=1, heads=ONE, key=key, value=value, device=kernel_device))


@pytest.mark.parametrize("heads", [(4, 2, 1, 4), (1, 2, 4, 4), (2, 3, 6, 6), (3, 1, 2, 6), (2, 1, 1, 2), (1, 1, 3, 3)])
def test_heads_in_any_grouping(heads: tuple[int, int, int, int], kernel_device: str) -> None:
    check(Case(65, batch=1, heads=heads, device=kernel_device))


HARD: dict[str, dict[str, Any]] = {
    "steep decays": {"decay": "steep"},
    "steep decays at the end of a chunk": {"decay": "steep", "time": 64},
    "weak decays": {"decay": "weak"},
    "no decay": {"decay": "none"},
    "beta 0": {"beta": 0.0},
    "beta 1": {"beta": 1.0},
    "beta 2": {"beta": 2.0},
    "parallel keys": {"parallel": True},
    "parallel keys, beta 1": {"parallel": True, "beta": 1.0},
    "parallel keys, beta 2": {"parallel": True, "beta": 2.0},
    "parallel keys, no decay": {"parallel": True, "decay": "none"},
    "normalised before": {"normalize": False},
    "no state": {"state": False},
    "a token without a state": {"state": False, "time": 1},
    "nothing left to decay": {"state": False, "parallel": True, "beta": 1.0},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("change", HARD.values(), ids=HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hard_numbers(dtype: torch.dtype, change: dict[str, Any], kernel_device: str) -> None:
    check(replace(Case(100, batch=1, heads=ONE, dtype=dtype, device=kernel_device), **change))


def test_what_the_yardstick_rounds_is_all_that_keeps_it_from_the_rule() -> None:
    case = Case(130, heads=(1, 2, 2, 4), dtype=torch.float64, scale=0.3)
    inputs, directions = case.inputs(), case.directions()
    with use_implementation("reference"):
        expected = results(partial(gated_delta_rule, **case.options()), inputs, directions)
    exact = partial(rounded_chunks, dtype=torch.float64, **case.options())
    assert_same(results(exact, inputs, directions), expected, torch.float64)
    rounded = results(partial(exact, dtype=torch.bfloat16), inputs, directions)
    assert all(1e-4 < error_of(x, expected[name], torch.bfloat16) < 1e-2 for name, x in rounded.items())


@pytest.mark.parametrize("time", [1, 65])
def test_halves(time: int, kernel_device: str) -> None:
    # bf16 is for a GPU: Triton's interpreter has no products of it.
    check(Case(time, heads=(1, 1, 2, 2), key=12, value=10, dtype=torch.float16, device=kernel_device))


@pytest.mark.parametrize("segment_chunks", [1, 2])
@pytest.mark.parametrize(("key", "value", "state"), [(16, 16, True), (16, 16, False), (12, 10, True), (8, 40, True)])
def test_segments_change_nothing(segment_chunks: int, key: int, value: int, state: bool, kernel_device: str) -> None:
    case = replace(CUT, state=state, key=key, value=value, device=kernel_device)
    inputs = case.inputs()
    whole, cut = (kernel_results(case, inputs, segment_chunks=n) for n in (None, segment_chunks))
    assert_same(cut, whole, case.dtype)


def test_segments_equal_the_eager_form(kernel_device: str) -> None:
    check(replace(CUT, decay="weak", time=150, device=kernel_device), segment_chunks=1)
    check(replace(CUT, heads=(1, 1, 2, 2), dtype=torch.float16, device=kernel_device), segment_chunks=1)


@pytest.mark.parametrize("segment_chunks", [None, 1])
def test_states_that_are_not_kept_are_made_again(segment_chunks: int | None, kernel_device: str) -> None:
    case = replace(CUT, device=kernel_device)
    inputs = case.inputs()
    kept, again = (
        kernel_results(case, inputs, store_states=store, segment_chunks=segment_chunks) for store in (True, False)
    )
    assert all(torch.equal(x, again[name]) for name, x in kept.items())


@pytest.mark.parametrize(("segment_chunks", "state"), [(None, True), (None, False), (1, True)])
def test_packed_sequences_are_what_each_is_alone(segment_chunks: int | None, state: bool, kernel_device: str) -> None:
    case = Case(lengths=(1, 0, 65, 64), heads=(1, 1, 2, 2), state=state, device=kernel_device)
    inputs, directions = case.inputs(), case.directions()
    options = {**case.options(), "segment_chunks": segment_chunks}
    packed = results(partial(chunked.gated_delta_rule, **options), inputs, directions)
    ends = options.pop("cu_seqlens").tolist()

    def part(x: torch.Tensor, name: str, n: int) -> torch.Tensor:
        # A copy: what begins in the middle of a tensor may be aligned otherwise, which is compiled anew.
        by_sequence = name in ("state", "initial_state", "d_initial_state")
        return (x[n : n + 1] if by_sequence else x[:, ends[n] : ends[n + 1]]).clone()

    for n in range(len(ends) - 1):
        own, asked = ({name: part(x, name, n) for name, x in given.items()} for given in (inputs, directions))
        alone = results(partial(chunked.gated_delta_rule, **options), own, asked)
        assert_same({name: part(x, name, n) for name, x in packed.items()}, alone, case.dtype)


@pytest.mark.parametrize("segment_chunks", [None, 1])
def test_packed_sequences_equal_the_loop(segment_chunks: int | None, kernel_device: str) -> None:
    case = Case(lengths=(64, 0, 1, 65), heads=(1, 1, 2, 2), device=kernel_device)
    check(case, segment_chunks=segment_chunks)


def test_lengths_that_change_in_place(kernel_device: str) -> None:
    case = Case(lengths=(5, 65), heads=ONE, device=kernel_device)
    inputs, options = case.inputs(), case.options()
    ends = options["cu_seqlens"]
    first = chunked.gated_delta_rule(**inputs, **options)
    ends[1] = 40
    moved = chunked.gated_delta_rule(**inputs, **options)
    afresh = chunked.gated_delta_rule(**inputs, **{**options, "cu_seqlens": ends.clone()})
    assert not torch.equal(first[0], moved[0])
    assert all(torch.equal(x, y) for x, y in zip(moved, afresh, strict=True))


@pytest.mark.parametrize("form", ["reference", "eager", "triton"])
def test_what_lies_behind_the_last_sequence_is_zero(form: Implementation, kernel_device: str) -> None:
    case = Case(lengths=(5, 65), heads=(1, 1, 2, 2), device=kernel_device)
    inputs, options = case.inputs(), case.options()
    options["cu_seqlens"] = torch.tensor([0, 5, 60], device=kernel_device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    with use_implementation(form):
        output, _ = gated_delta_rule(**leaves, **options)
    assert output.shape[1] == 70
    assert not output[:, 60:].any()
    assert output[:, :60].isfinite().all()
    gradients = torch.autograd.grad(output.sum(), list(leaves.values())[:5])
    assert all(not x[:, 60:].any() and x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("segment_chunks", [None, 1])
def test_keys_in_several_tiles(
    normalize: bool, segment_chunks: int | None, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("hybridize_kernels.gated_delta_rule.plan")
    key_tile, key = (16, 40) if kernel_device == "cpu" else (64, 128)
    monkeypatch.setattr(module, "KEY_TILE", key_tile)
    module.plan_of.cache_clear()  # the tile is no part of a plan's key
    case = Case(100, batch=1, heads=(1, 2, 1, 2), key=key, value=24, normalize=normalize, device=kernel_device)
    try:
        check(case, segment_chunks=segment_chunks)
    finally:
        module.plan_of.cache_clear()


@settings(max_examples=8)
@given(st.integers(1, 90), st.integers(0, 90), st.sampled_from([None, 1]), st.integers(0, 99))
def test_property_a_text_in_two_parts_equals_it_in_one(
    first: int, second: int, segment_chunks: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    case = Case(first + second, batch=1, heads=ONE, device=DEVICE)
    inputs = case.inputs()
    state = inputs.pop("initial_state")
    rule = partial(chunked.gated_delta_rule, **case.options(), segment_chunks=segment_chunks)
    whole, final = rule(**inputs, initial_state=state)
    head, between = rule(**{name: x[:, :first].clone() for name, x in inputs.items()}, initial_state=state)
    tail, last = rule(**{name: x[:, first:].clone() for name, x in inputs.items()}, initial_state=between)
    assert_same(
        {"output": torch.cat([head, tail], dim=1), "state": last}, {"output": whole, "state": final}, case.dtype
    )


def test_padding_leaves_the_state_alone(kernel_device: str) -> None:
    case = Case(70, heads=(1, 1, 2, 2), device=kernel_device)
    inputs = case.inputs()
    padding = torch.rand(2, 70, device=kernel_device) < 0.4
    padding[1] = True
    for name in ("log_decay", "beta"):
        inputs[name] = inputs[name].masked_fill(padding[..., None], 0.0)
    output, final = chunked.gated_delta_rule(**inputs, **case.options())
    assert torch.equal(final[1], inputs["initial_state"][1])
    real = {name: (x[:1] if name == "initial_state" else x[:1, ~padding[0]]) for name, x in inputs.items()}
    expected, expected_final = chunked.gated_delta_rule(**real, **case.options())
    found = {"output": output[:1, ~padding[0]], "state": final[:1]}
    assert_same(found, {"output": expected, "state": expected_final}, case.dtype)


def test_a_second_derivative_is_refused(kernel_device: str) -> None:
    case = Case(5, heads=ONE, device=kernel_device)
    leaves = {name: x.requires_grad_() for name, x in case.inputs().items()}
    output, _ = chunked.gated_delta_rule(**leaves, **case.options())
    (gradient,) = torch.autograd.grad(output.square().sum(), [leaves["v"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tensors_that_are_not_contiguous(kernel_device: str) -> None:
    case = Case(70, heads=(2, 2, 2, 2), device=kernel_device)
    inputs = case.inputs()
    # Heads before time, as transformers has them; the features of a state apart.
    turned = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    turned["q"] = torch.stack((inputs["q"], inputs["k"]), dim=3).flatten(2, 3)[:, :, ::2]
    turned["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    expected = kernel_results(case, inputs)
    leaves = {name: x.requires_grad_() for name, x in turned.items()}
    output, state = chunked.gated_delta_rule(**leaves, **case.options())
    directions = [x.mT.contiguous().mT for x in case.directions().values()]
    gradients = torch.autograd.grad([output, state], list(leaves.values()), directions)
    assert torch.equal(output, expected["output"])
    assert torch.equal(state, expected["state"])
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, expected[f"d_{name}"]), name


def test_dtypes_that_differ(kernel_device: str) -> None:
    case = Case(70, batch=1, heads=ONE, device=kernel_device)
    inputs = case.inputs()
    for name in ("q", "log_decay", "beta"):
        inputs[name] = inputs[name].half()
    inputs["initial_state"] = inputs["initial_state"].half()
    found = kernel_results(case, inputs)
    assert found["output"].dtype == found["state"].dtype == torch.float32
    with use_implementation("reference"):
        rule = partial(gated_delta_rule, **case.options())
        expected = results(rule, exactly(inputs), exactly(case.directions()))
    for name, x in found.items():
        dtype = inputs[name[2:]].dtype if name[:2] == "d_" else torch.float32
        assert x.dtype == dtype, name
        # fp16 leaves are rounded to their dtype at the end, and no earlier.
        assert_same({name: x}, {name: expected[name]}, dtype)


@pytest.mark.parametrize("names", [["v"], ["initial_state"], ["q"], ["log_decay"], ["k", "beta"]], ids="-".join)
@pytest.mark.parametrize("segment_chunks", [None, 1])
def test_gradients_of_some_inputs(names: list[str], segment_chunks: int | None, kernel_device: str) -> None:
    case = Case(70, batch=1, heads=ONE, device=kernel_device)
    inputs = case.inputs()
    rule = partial(chunked.gated_delta_rule, **case.options(), segment_chunks=segment_chunks)
    everything = results(rule, inputs, case.directions())
    for name, x in results(rule, inputs, case.directions(), of=names).items():
        assert torch.equal(x, everything[name]), name


@pytest.mark.parametrize("asked", ["output", "state"])
@pytest.mark.parametrize("segment_chunks", [None, 1])
def test_a_loss_of_one_of_the_two(asked: str, segment_chunks: int | None, kernel_device: str) -> None:
    case = Case(70, batch=1, heads=ONE, device=kernel_device)
    inputs, directions = case.inputs(), {asked: case.directions()[asked]}
    rule = partial(chunked.gated_delta_rule, **case.options(), segment_chunks=segment_chunks)
    found = results(rule, inputs, directions)
    with use_implementation("reference"):
        expected = results(partial(gated_delta_rule, **case.options()), exactly(inputs), exactly(directions))
    assert_same(found, expected, case.dtype)


def test_which_kernel_takes_the_call(kernel_device: str) -> None:
    def same(x: tuple[Any, ...], y: tuple[Any, ...]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))

    with use_implementation("triton"):
        for time, recurrent in ((16, True), (17, False)):
            case = Case(time, batch=1, heads=ONE, device=kernel_device)
            inputs, options = case.inputs(), case.options()
            steps, chunks = (
                rule(**inputs, **options) for rule in (step_kernel.gated_delta_rule, chunked.gated_delta_rule)
            )
            assert not same(steps, chunks), "the two kernels cannot be told apart"
            assert same(gated_delta_rule(**inputs, **options), steps if recurrent else chunks)
            leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
            assert same(gated_delta_rule(**leaves, **options), chunks)
            with torch.no_grad():
                assert same(gated_delta_rule(**leaves, **options), steps if recurrent else chunks)
        case = Case(lengths=(3, 2), heads=ONE, device=kernel_device)
        inputs, options = case.inputs(), case.options()
        assert same(gated_delta_rule(**inputs, **options), chunked.gated_delta_rule(**inputs, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens has shape \[1\]"),
        ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, r"cu_seqlens has shape \[2, 2\]"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 5])},
            r"initial_state has shape \[1, 2, 16, 16\], expected \[2, 2, 16, 16\]",
        ),
        ({"batch": 2}, "q a batch of 2, expected .* one row"),
    ],
    ids=str,
)
def test_lengths_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    case = Case(5, batch=change.pop("batch", 1)) if "batch" in change else Case(5, batch=1)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**case.inputs(), **{**case.options(), "cu_seqlens": torch.tensor([0, 5]), **change})


def test_a_call_with_nothing_in_it(kernel_device: str) -> None:
    for case in (Case(0, heads=(1, 1, 2, 2)), Case(lengths=(0, 0)), Case(0, state=False)):
        check(replace(case, device=kernel_device))
    case = Case(5, batch=0, device=kernel_device)
    assert {name: x.shape[0] for name, x in kernel_results(case).items()} == dict.fromkeys(kernel_results(case), 0)
