"""Decoding steps of the gated delta rule: outputs, states in place, slots and padding, in every form."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st

from hybridize_kernels import gated_delta_rule, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from hybridize_kernels.gated_delta_rule import step_kernel
from hybridize_kernels.gated_delta_rule.step import gated_delta_rule_step
from hybridize_kernels.gated_delta_rule.step_kernel import Tile
from tests.kernels.step_cases import Steps, check, copied
from tests.kernels.tolerances import OUTPUT, assert_close

HEADS = [(1, 1, 1, 1), (2, 2, 2, 2), (4, 2, 2, 4), (6, 2, 3, 6), (1, 2, 4, 4)]
SWITCHES = ("raw", "normalize", "padding", "norm", "scale", "gate", "strided")

any_steps = st.builds(
    Steps,
    batch=st.integers(1, 4),
    time=st.sampled_from([1, 1, 2, 7]),
    heads=st.sampled_from(HEADS),
    key=st.sampled_from([1, 5, 16, 12]),
    value=st.sampled_from([1, 7, 16, 12]),
    slots=st.sampled_from([None, torch.int32, torch.int64]),
    state_dtype=st.sampled_from([torch.float32, torch.float16]),
    **{name: st.booleans() for name in SWITCHES},
)


@drawn(any_steps, st.integers(0, 99))
def test_property_eager_equals_the_reference(steps: Steps, seed: int) -> None:
    torch.manual_seed(seed)
    check(steps, "eager")
    check(replace(steps, dtype=torch.float64, state_dtype=torch.float64), "eager")


@drawn(any_steps, st.integers(0, 99))
def test_property_the_kernel_equals_the_reference(steps: Steps, seed: int) -> None:
    torch.manual_seed(seed)
    check(replace(steps, device="cuda" if torch.cuda.is_available() else "cpu"), "triton")


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_autograd_is_told_that_the_state_has_changed(form: Implementation, kernel_device: str) -> None:
    weight = torch.ones(4, 4, device=kernel_device, requires_grad=True)
    state = torch.ones(1, 1, 4, 4, device=kernel_device)
    before = (weight * state).sum()
    token, gate = torch.ones(1, 1, 1, 4, device=kernel_device), torch.zeros(1, 1, 1, device=kernel_device)
    with use_implementation(form):
        gated_delta_rule_step(token, token, token, gate, gate + 0.5, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("time", [1, 2, 7, 16])
def test_every_option_at_once(form: Implementation, dtype: torch.dtype, time: int, kernel_device: str) -> None:
    switches: dict[str, Any] = dict.fromkeys(SWITCHES, True)
    options = {"slots": torch.int64, "dtype": dtype, "device": kernel_device, **switches}
    check(Steps(batch=2, time=time, heads=(4, 2, 2, 4), key=16, value=16, **options), form)
    check(Steps(batch=2, time=time, heads=(2, 1, 2, 4), key=20, value=33, **options), form)


@pytest.mark.parametrize("key_last", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("key", "value", "tile"), [(12, 40, Tile(16, 1)), (60, 60, Tile(64, 2)), (8, 33, Tile(32, 4))])
def test_tiles_and_layouts(key: int, value: int, tile: Tile, norm: bool, key_last: bool, kernel_device: str) -> None:
    def step(**given: Any) -> torch.Tensor:
        state = given["state"]
        if not key_last:
            return step_kernel.gated_delta_rule_step(**given, tile=tile)
        turned = state.transpose(2, 3).contiguous()
        out = step_kernel.gated_delta_rule_step(**{**given, "state": turned}, tile=tile, key_last=True)
        state.copy_(turned.transpose(2, 3))
        return out

    for time in (1, 3):
        steps = Steps(time=time, key=key, value=value, norm=norm, gate=norm, padding=True, device=kernel_device)
        check(replace(steps, slots=torch.int32), "triton", step)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_tokens_one_by_one_are_the_same_as_at_once(form: Implementation, kernel_device: str) -> None:
    steps = Steps(time=6, heads=(4, 2, 2, 4), raw=True, padding=True, norm=True, gate=True, device=kernel_device)
    given = steps.arguments()
    single = copied(given)
    with use_implementation(form):
        whole = gated_delta_rule_step(**given)
        parts = []
        for t in range(steps.time):
            of_token = {
                name: single[name][:, t : t + 1] for name in ("q", "k", "v", "log_decay", "beta", "real", "gate")
            }
            parts.append(gated_delta_rule_step(**{**single, **of_token}))
    assert_close("output", torch.cat(parts, dim=1), whole, OUTPUT[torch.float32])
    assert_close("state", single["state"], given["state"], OUTPUT[torch.float32])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", [[-1, -1, -1], [0, -1, -1], [-1, 4, 0], [2, 0, 1]], ids=str)
def test_rows_without_a_slot_touch_no_state(form: Implementation, slots: list[int], kernel_device: str) -> None:
    given = Steps(time=2, device=kernel_device).arguments()
    given["slots"] = torch.tensor(slots, device=kernel_device)
    before = given["state"].clone()
    with use_implementation(form):
        out = gated_delta_rule_step(**given)
    for row, slot in enumerate(slots):
        assert bool(out[row].any()) == (slot >= 0)
    for slot in range(len(before)):
        assert torch.equal(given["state"][slot], before[slot]) == (slot not in slots)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_padding_alone_leaves_the_state_bit_for_bit(form: Implementation, kernel_device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        given = Steps(time=3, raw=True, state_dtype=dtype, device=kernel_device).arguments()
        given["real"] = torch.zeros(3, 3, dtype=torch.bool, device=kernel_device)
        before = given["state"].clone()
        with use_implementation(form):
            assert not gated_delta_rule_step(**given).any()
        assert torch.equal(given["state"], before)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("batch", "time"), [(0, 1), (2, 0)])
def test_nothing_to_do(form: Implementation, batch: int, time: int, kernel_device: str) -> None:
    given = Steps(batch=batch, time=time, device=kernel_device).arguments()
    before = given["state"].clone()
    with use_implementation(form):
        assert gated_delta_rule_step(**given).shape == (batch, time, 2, 10)
    assert torch.equal(given["state"], before)


def test_extreme_gates_stay_finite(kernel_device: str) -> None:
    for raw in (-80.0, -20.0, 0.0, 20.0, 80.0):
        given = Steps(raw=True, device=kernel_device).arguments()
        given["log_decay"].fill_(raw)
        given["beta"].fill_(raw)
        results = []
        for form in ("triton", "eager"):
            own = copied(given)
            with use_implementation(form):
                results.append((gated_delta_rule_step(**own), own["state"]))
        for ours, expected in zip(*results, strict=True):
            assert_close(f"raw {raw}", ours, expected, OUTPUT[torch.float32])


def test_it_goes_on_where_the_training_form_ended() -> None:
    steps = Steps(batch=2, time=9, heads=(2, 2, 4, 4), dtype=torch.float64, state_dtype=torch.float64)
    given = steps.arguments()
    given["state"] = given["state"][:2].clone()
    q, k, v, log_decay, beta, state = (given[name] for name in ("q", "k", "v", "log_decay", "beta", "state"))
    whole, final = gated_delta_rule(
        q, k, v, log_decay, beta, initial_state=state, output_final_state=True, normalize_qk=True
    )
    out = gated_delta_rule_step(q, k, v, log_decay, beta, state, normalize_qk=True)
    assert final is not None
    assert_close("output", out, whole, OUTPUT[torch.float64])
    assert_close("state", state, final, OUTPUT[torch.float64])


@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize("time", [0, 1, 5])
def test_out_of_place_it_is_the_rule_itself(time: int, has_state: bool, kernel_device: str) -> None:
    given = Steps(batch=2, time=time, heads=(2, 2, 4, 4), key=12, value=40, device=kernel_device).arguments()
    initial = given["state"][:2].transpose(2, 3).contiguous().transpose(2, 3) if has_state else None
    inputs = [given[name] for name in ("q", "k", "v", "log_decay", "beta")]
    out, final = step_kernel.gated_delta_rule(
        *inputs, initial_state=initial, output_final_state=True, normalize_qk=True
    )
    exact = None if initial is None else initial.double()
    with use_implementation("reference"):
        expected, expected_final = gated_delta_rule(
            *(x.double() for x in inputs), initial_state=exact, output_final_state=True, normalize_qk=True
        )
    assert final is not None
    assert expected_final is not None
    assert_close("output", out, expected, OUTPUT[torch.float32])
    assert_close("state", final, expected_final, OUTPUT[torch.float32])
    assert step_kernel.gated_delta_rule(*inputs, initial_state=initial)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_picks_the_kernel_where_there_is_a_gpu(dtype: torch.dtype, device: str) -> None:
    given = Steps(key=60, value=60, dtype=dtype, raw=True, device=device).arguments()
    for name in ("q", "decay_rate"):  # as parameters of a model are
        given[name].requires_grad_()
    named = copied(given)
    chosen = gated_delta_rule_step(**given)
    assert not chosen.requires_grad
    with use_implementation("triton" if device == "cuda" else "eager"):
        assert torch.equal(chosen, gated_delta_rule_step(**named))
    assert torch.equal(given["state"], named["state"])


def test_more_tokens_than_a_step_of_the_kernel_has() -> None:
    check(Steps(batch=1, time=17), "eager")
    with use_implementation("triton"), pytest.raises(ValueError, match="does not cover this call"):
        gated_delta_rule_step(**Steps(time=17).arguments())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 1, 2, 11)}, "k has shape"),
        ({"v": torch.zeros(3, 1, 3, 10)}, "2 state heads are not a multiple of the 3 heads of v"),
        ({"q": torch.zeros(3, 2, 12)}, "q has shape"),
        ({"log_decay": torch.zeros(3, 1, 1)}, "log_decay has shape"),
        ({"beta": torch.zeros(3, 2, 2)}, "beta has shape"),
        ({"state": torch.zeros(3, 12, 10)}, "state has shape"),
        ({"state": torch.zeros(2, 2, 12, 10)}, "2 states for 3 rows"),
        ({"state": torch.zeros(3, 2, 10, 12).transpose(2, 3)}, "contiguous"),
        ({"state": torch.zeros(3, 2, 12, 10, dtype=torch.int32)}, "floating"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots has shape"),
        ({"slots": torch.zeros(3)}, "int32 or int64"),
        ({"decay_rate": torch.zeros(2)}, "together"),
        ({"real": torch.zeros(3, dtype=torch.bool)}, "real has shape"),
        ({"output_scale": torch.zeros(10)}, "output_scale has shape"),
        ({"gate": torch.zeros(3, 1, 20)}, "gate has shape"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_delta_rule_step(**{**Steps().arguments(), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("key", "value"), [(60, 60), (64, 64), (64, 128), (96, 96), (128, 128), (256, 256)])
def test_the_kernel_on_a_gpu(key: int, value: int, dtype: torch.dtype) -> None:
    options = itertools.product((1, 3, 16), (False, True), (torch.float32, torch.bfloat16, torch.float16))
    for time, finish, state_dtype in options:
        switches: dict[str, Any] = dict.fromkeys(("raw", "padding", "norm", "scale", "gate"), finish)
        slots = torch.int32 if finish else None
        of = {"dtype": dtype, "state_dtype": state_dtype, "slots": slots, "device": "cuda", **switches}
        check(Steps(batch=5, time=time, heads=(4, 2, 2, 4), key=key, value=value, strided=finish, **of), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize("batch", [1, 40])
def test_a_captured_graph_replays_what_the_steps_do(form: Implementation, batch: int) -> None:
    steps = Steps(
        batch=batch, heads=(16, 4, 4, 16), key=128, value=128, dtype=torch.bfloat16, raw=True, padding=True, norm=True,
        gate=True, slots=torch.int64, device="cuda",
    )  # fmt: skip
    given = steps.arguments()
    plain, before, slots = copied(given), given["state"].clone(), given["slots"].clone()
    with use_implementation(form):
        gated_delta_rule_step(**copied(given))  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = [gated_delta_rule_step(**given) for _ in range(3)]
        for moved in (slots, slots.roll(1)):
            plain["slots"].copy_(moved)
            plain["state"].copy_(before)
            expected = [gated_delta_rule_step(**plain) for _ in range(3)]
            state = plain["state"].clone()
            given["state"].copy_(before)
            given["slots"].copy_(moved)
            graph.replay()
            for out, wanted in zip(replayed, expected, strict=True):
                assert torch.equal(out, wanted)
            assert torch.equal(given["state"], state)
