"""Retained attention by its Triton kernels: every case that the layout can be in."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import retained_attention, use_implementation
from tests.kernels.retained_cases import DEVICE, PACKAGE, Case, assert_kernels_agree, op_of, shrink
from tests.kernels.tolerances import assert_close, outputs_and_gradients

forward = import_module(f"{PACKAGE}.forward")
backward = import_module(f"{PACKAGE}.backward")
flags = forward.flags


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


CASES = {
    "one token": Case(1),
    "no group": Case(33, group=1, heads=3),
    "group of three": Case(50, group=3, size=20),
    "capped": Case(50, group=3, budget=6),
    "capped, many chunks": Case(90, heads=1, group=4, sinks=0, budget=3),
    "capped, sinks only fit": Case(50, budget=2),
    "nothing retained": Case(40, sinks=0, positive=0.0),
    "nothing retained, capped": Case(40, sinks=0, positive=0.0, budget=4),
    "all retained": Case(40, positive=1.0),
    "all retained, capped": Case(60, positive=1.0, budget=9),
    "sinks without scores": Case(40, scored=False),
    "window alone": Case(40, scored=False, sinks=0),
    "window of one": Case(40, window=1, budget=4),
    "window beyond the text": Case(40, window=100, budget=4),
    "budget of zero": Case(40, budget=0),
    "padded": Case(50, layout="padded"),
    "padded, capped": Case(50, layout="padded", budget=6, group=1),
    "rows of padding": Case(20, layout="padded", batch=1, budget=6),
    "documents": Case(60, layout="documents"),
    "documents, capped": Case(75, layout="documents", budget=4),
    "continued": Case(30, layout="continued", prefix=5),
    "continued, capped": Case(40, layout="continued", prefix=5, budget=5),
    "continued without sinks": Case(30, layout="continued", prefix=4, sinks=0, budget=4, scored=True),
    "continued without slots": Case(30, layout="continued", prefix=0, sinks=2),
    "continued after a short text": Case(30, layout="continued short", prefix=4, sinks=2),
    "continued after a short text, capped": Case(30, layout="continued short", prefix=4, budget=4),
    "continued, sinks alone": Case(30, layout="continued", prefix=2, scored=False),
    # Half precision keeps the parts of a row's sum and pivot apart; bf16 has no products in the interpreter.
    "halves": Case(50, group=3, dtype=torch.float16),
    "halves, capped and padded": Case(50, layout="padded", budget=6, dtype=torch.float16),
    "halves, documents": Case(60, layout="documents", dtype=torch.float16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("small")
def test_outputs_and_gradients_equal_the_reference(case: Case) -> None:
    assert_kernels_agree(case)


@settings(max_examples=20)
@given(
    st.builds(
        Case,
        time=st.integers(1, 60),
        heads=st.integers(1, 2),
        group=st.integers(1, 5),
        size=st.integers(1, 20),
        window=st.integers(1, 40),
        sinks=st.integers(0, 4),
        budget=st.one_of(st.none(), st.integers(0, 12)),
        layout=st.sampled_from(["plain", "padded", "documents", "continued"]),
        positive=st.floats(0, 1),
        prefix=st.integers(0, 6),
        scored=st.booleans(),
    ),
    st.integers(0, 999),
)
def test_any_call_equals_the_reference_property(case: Case, seed: int) -> None:
    if case.layout == "continued" and case.budget is not None:
        # A cache holds no more than its budget.
        case = replace(case, budget=max(case.budget, case.prefix))
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert_kernels_agree(case)


def test_default_tiles_run_in_the_interpreter() -> None:
    assert_kernels_agree(Case(130, heads=1, window=40, budget=30, batch=1))


def test_head_sizes_with_room_to_the_next_power_of_two(small: None) -> None:
    assert_kernels_agree(Case(33, size=24))


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"scale": -1.0}, {"ordered_from": 3}, {"query_positions": None}])
def test_bad_arguments_are_refused(change: dict[str, object]) -> None:
    inputs, options = Case(9, layout="padded").arguments()
    with pytest.raises(ValueError, match="retained_attention: "):
        retained_attention(*inputs, **(options | change))


def test_documents_need_one_row() -> None:
    inputs, options = Case(9).arguments()
    with pytest.raises(ValueError, match="cu_seqlens needs one row"):
        retained_attention(*inputs, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32, device=DEVICE), **options)


def test_keys_in_any_order_have_no_kernel() -> None:
    inputs, options = Case(9, layout="padded").arguments()
    options["key_positions"] = options["key_positions"].flip(1)
    with use_implementation("triton"), pytest.raises(ValueError, match="does not cover this call"):
        retained_attention(*inputs, **options)


@pytest.mark.parametrize("layout", ["plain", "padded", "documents", "continued"])
def test_offsets_of_64_bits(layout: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "flags", lambda *given: {**flags(*given), "LONG": True})
    assert_kernels_agree(Case(30, group=3, layout=layout, budget=5, prefix=4))


def test_a_plan_is_not_used_for_other_strides(small: None) -> None:
    case = Case(40, budget=6)
    inputs, options = case.arguments()
    op = op_of(case, options)
    outputs, gradients = outputs_and_gradients("triton", op, inputs)

    def turned(*given: Tensor) -> tuple[Tensor, Tensor]:
        # As transformers has them: heads before time.
        return op(*[x.transpose(1, 2).contiguous().transpose(1, 2) for x in given])

    def padded(*given: Tensor) -> tuple[Tensor, Tensor]:
        # Every second head of a larger tensor; the gradient of the output lies with its features apart.
        output, log_sum_exp = op(*[torch.stack((x, x + 1), dim=3).flatten(2, 3)[:, :, ::2] for x in given])
        return output.mT.contiguous().mT, log_sum_exp

    for other in (turned, padded, op):
        found, found_gradients = outputs_and_gradients("triton", other, inputs)
        for x, y in zip(found + found_gradients, outputs + gradients, strict=True):
            assert_close("the same", x, y, 1e-6)


def test_what_is_asked_of_a_blind_row_reaches_no_gradient(small: None) -> None:
    inputs, options = Case(24, layout="padded").arguments()
    leaves = [x.requires_grad_() for x in inputs]
    with use_implementation("triton"):
        output, log_sum_exp = retained_attention(*leaves, return_log_sum_exp=True, **options)
    assert log_sum_exp.isneginf().any()
    (output.sum() + log_sum_exp.exp().log().clamp(min=-9).sum()).backward()
    direction = torch.where(log_sum_exp.isneginf(), torch.nan, 1.0)
    with use_implementation("triton"):
        again = retained_attention(*leaves, return_log_sum_exp=True, **options)[1]
    gradients = torch.autograd.grad(again, leaves, direction)
    assert all(gradient.isfinite().all() for gradient in gradients)
