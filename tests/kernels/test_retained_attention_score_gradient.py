"""The gradients that a retention score may have: against differences of the loss, and every form against the others."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridize_kernels import retained_attention, use_implementation
from hybridize_kernels.launch import Launch
from tests.kernels.gate_cases import assert_near
from tests.kernels.retained_cases import DEVICE, PACKAGE, Case, op_of, shrink
from tests.kernels.tolerances import GRADIENT, outputs_and_gradients

reference = import_module(f"{PACKAGE}.reference")
eager = import_module(f"{PACKAGE}.eager")
gate_tiles = import_module("hybridize_kernels.gate_gradient.tiles")

OUTSIDE = ["outside", "logit", "counterfactual"]
FORMS = ["reference", "eager", *(["triton"] if DEVICE == "cpu" else [])]
OPTIONS = {"window": 4, "sinks": 2, "budget": 5}


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        shrink(monkeypatch)
        monkeypatch.setenv(gate_tiles.VARIABLE, "16,16,4,1")


def make_inputs(time: int = 18, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q, k, v = (torch.randn(1, time, heads, 5, dtype=dtype) for heads in (4, 2, 2))
    return [q, k, v, torch.rand(1, time, 2, dtype=dtype) - 0.4]


def score_gradient(form: str, inputs: list[Tensor], direction: Tensor, name: str, **options: object) -> Tensor:
    score = inputs[3].detach().requires_grad_()
    with use_implementation(form):
        output = retained_attention(*inputs[:3], score, score_gradient=name, **options)
        return torch.autograd.grad((output * direction).sum(), score)[0]


def gated_output(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, gate: Tensor, *, on: str) -> Tensor:
    """By loops, with a gate `[T, H]` on each key outside the window."""
    output = torch.zeros_like(q)
    time, query_heads = q.shape[1:3]
    for head in range(query_heads):
        of_key = head // (query_heads // k.shape[2])
        for i in range(time):
            keys = visible[0, of_key, i].nonzero().flatten()
            far = i - keys >= OPTIONS["window"]
            gates = torch.where(far, gate[keys, of_key], 1.0)
            logits = (k[0, keys, of_key] @ q[0, i, head]) * q.shape[-1] ** -0.5
            values = v[0, keys, of_key]
            if on == "logit":
                output[0, i, head] = (logits + gates.log()).softmax(0) @ values
            else:
                output[0, i, head] = logits.softmax(0) @ (gates[:, None] * values)
    return output


@pytest.mark.parametrize("form", ["reference", "eager"])
@pytest.mark.parametrize(("name", "on"), [("outside", "value"), ("logit", "logit")])
def test_equals_a_difference_by_an_explicit_gate_outside_the_window(form: str, name: str, on: str) -> None:
    inputs = make_inputs()
    direction = torch.randn_like(inputs[0])
    found = score_gradient(form, inputs, direction, name, **OPTIONS)
    positions = torch.arange(18)[None]
    visible = reference.visible_keys(inputs[3], positions, positions[..., None].expand(1, 18, 2), **OPTIONS)
    assert (found[0, 2:] != 0).any()
    for j in range(2, 18):  # the others are sinks
        for head in range(2):
            step = torch.zeros(18, 2, dtype=torch.float64)
            step[j, head] = 1e-5
            up, down = (gated_output(*inputs[:3], visible, 1 + sign * step, on=on) for sign in (1, -1))
            difference = ((up - down) * direction).sum().item() / 2e-5
            assert found[0, j, head].item() == pytest.approx(difference, abs=1e-8)


@pytest.mark.parametrize("form", ["reference", "eager"])
def test_counterfactual_is_what_a_linear_loss_changes_when_a_token_is_retained(form: str) -> None:
    inputs, options = make_inputs(), OPTIONS | {"budget": None}
    direction = torch.randn_like(inputs[0])
    found = score_gradient(form, inputs, direction, "counterfactual", **options)
    loss = (retained_attention(*inputs, **options) * direction).sum()
    hidden = [(j, head) for j in range(2, 18) for head in range(2) if inputs[3][0, j, head] <= 0]
    assert hidden
    for j, head in hidden:
        shown = inputs[3].clone()
        shown[0, j, head] = 1.0
        change = (retained_attention(*inputs[:3], shown, **options) * direction).sum() - loss
        assert found[0, j, head].item() == pytest.approx(change.item(), abs=1e-12)


CASES = {
    "no cap": Case(50, group=3),
    "capped": Case(50, group=3, size=20, budget=6),
    "one token": Case(1),
    "window beyond the text": Case(20, window=100, budget=4),
    "budget of zero": Case(40, budget=0),
    "nothing retained": Case(40, sinks=0, positive=0.0),
    "all retained, capped": Case(60, heads=1, group=1, positive=1.0, budget=9),
    "padded": Case(50, layout="padded"),
    "padded, capped": Case(50, layout="padded", budget=6, group=1),
    "documents": Case(60, layout="documents"),
    "documents, capped": Case(75, layout="documents", budget=4),
    "halves, capped": Case(50, group=3, budget=6, dtype=torch.float16),
}


def assert_score_gradients_agree(form: str, case: Case) -> None:
    """Of every name with the reference; outputs and the other gradients are the bits of the straight-through ones."""
    inputs, options = case.arguments()
    wanted = outputs_and_gradients(form, op_of(case, options), inputs)
    for name in OUTSIDE:
        op = op_of(case, {**options, "score_gradient": name})
        outputs, gradients = outputs_and_gradients(form, op, inputs)
        for found, straight in zip(outputs + gradients[:3], wanted[0] + wanted[1][:3], strict=True):
            assert torch.equal(found, straight), f"{name}, {case}: other bits than with straight_through"
        _, expected = outputs_and_gradients("reference", op, [x.double() for x in inputs])
        assert_near(f"{name} by {form}, {case}", gradients[3], expected[3], GRADIENT[case.dtype])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("form", ["eager", "triton"])
def test_every_form_equals_the_reference(form: str, case: Case) -> None:
    assert_score_gradients_agree(form, case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_influence_by_the_kernel_is_that_of_plain_pytorch(case: Case) -> None:
    """Whose `gate_gradient` is compared with its definition; a sum of positive and negative parts is not it."""
    inputs, options = case.arguments()
    op = op_of(case, {**options, "score_gradient": "influence"})
    outputs, gradients = outputs_and_gradients("triton", op, inputs)
    wanted = outputs_and_gradients("triton", op_of(case, options), inputs)
    for found, straight in zip(outputs + gradients[:3], wanted[0] + wanted[1][:3], strict=True):
        assert torch.equal(found, straight)
    _, expected = outputs_and_gradients("eager", op, [x.double() for x in inputs])
    assert (gradients[3] >= 0).all()
    assert_near(f"influence, {case}", gradients[3], expected[3], GRADIENT[case.dtype])


@pytest.mark.parametrize("form", FORMS)
def test_the_other_gradients_are_the_same_bits_for_every_name(form: str) -> None:
    case = Case(30, budget=4, layout="padded", dtype=torch.float32)
    inputs, options = case.arguments()
    _, straight = outputs_and_gradients(form, op_of(case, options), inputs)
    for name in OUTSIDE:
        _, gradients = outputs_and_gradients(form, op_of(case, {**options, "score_gradient": name}), inputs)
        assert all(torch.equal(x, y) for x, y in zip(gradients[:3], straight[:3], strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OUTSIDE)
def test_sinks_infinite_scores_and_the_last_window_get_none(form: str, name: str) -> None:
    inputs = make_inputs(dtype=torch.float32)
    inputs[3][0, 7], inputs[3][0, 8] = torch.inf, -torch.inf
    options = OPTIONS | {"budget": None}
    found = score_gradient(form, inputs, torch.randn_like(inputs[0]), name, **options)
    assert (found[0, :2] == 0).all()
    assert (found[0, 7:9] == 0).all()
    assert (found[0, -4:] == 0).all()
    hidden = inputs[3][0, 2:7] <= 0
    assert ((found[0, 2:7] != 0) == (~hidden | (name == "counterfactual"))).all()


@pytest.mark.parametrize("form", FORMS)
def test_straight_through_reaches_sinks_too(form: str) -> None:
    inputs = make_inputs(dtype=torch.float32)
    found = score_gradient(form, inputs, torch.randn_like(inputs[0]), "straight_through", **OPTIONS)
    assert (found != 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_has_the_dtype_of_its_score(form: str) -> None:
    inputs = [x.float() for x in make_inputs()]
    direction = torch.randn_like(inputs[0])
    inputs[3] = inputs[3].half()
    found = score_gradient(form, inputs, direction, "counterfactual", **OPTIONS)
    inputs[3] = inputs[3].float()
    expected = score_gradient("reference", inputs, direction, "counterfactual", **OPTIONS)
    assert found.dtype == torch.float16
    assert_near(form, found, expected, GRADIENT[torch.float16])


class Operations(TorchDispatchMode):
    """The names of what PyTorch does, but for memory that it takes and views that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.__name__.startswith("empty"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(("time", "joined"), [(900, []), (2048, ["sum.dim_IntList"])])
def test_a_step_launches_the_sums_and_what_joins_their_parts(
    time: int, joined: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *pointers: launched.append(self._kernel.fn.__name__))
    inputs, options = Case(time, heads=3, group=3).arguments()

    def step(score_gradient: str) -> tuple[list[str], list[str]]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with use_implementation("triton"):
            output = retained_attention(*leaves, score_gradient=score_gradient, **options)
        direction = torch.ones(output.shape, device=DEVICE)
        launched.clear()
        with Operations() as operations:
            torch.autograd.grad(output, leaves, direction)
        return operations.names, list(launched)

    operations, kernels = step("straight_through")
    assert step(name) == (operations + joined, [*kernels, "sums_kernel"])


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_keys_of_a_cache_have_the_straight_through_gradient_alone(name: str) -> None:
    inputs, options = Case(9, layout="continued", prefix=3).arguments()
    options["score_gradient"] = name
    retained_attention(*inputs, **options)
    inputs[3].requires_grad_()
    with torch.no_grad():
        retained_attention(*inputs, **options)
    with pytest.raises(ValueError, match=f"score_gradient '{name}' needs whole texts"):
        retained_attention(*inputs, **options)


def test_mistakes_are_named() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="score_gradient is 'soft', expected one of straight_through, outside"):
        retained_attention(*inputs, window=3, score_gradient="soft")  # type: ignore[call-overload]


def test_the_form_of_exports_leaves_scores_as_they_are() -> None:
    inputs = make_inputs()
    expected = eager.retained_attention(*inputs, window=3)
    inputs[3].requires_grad_()
    with pytest.warns(UserWarning, match="logit needs the package hybridize_kernels"):
        out = eager.retained_attention(*inputs, window=3, score_gradient="logit")
    assert torch.equal(out, expected)
    assert not out.requires_grad or torch.autograd.grad(out.sum(), inputs[3], allow_unused=True) == (None,)


SHORT = {"window": 40, "sinks": 4, "batch": 2}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(1500, heads=1, batch=1, group=3, size=64, window=128, sinks=4, budget=128, dtype=torch.bfloat16),
        Case(300, group=3, size=60, layout="padded", budget=50, **SHORT),
        Case(300, group=1, size=128, layout="documents", dtype=torch.float16, **SHORT),
        Case(300, group=4, size=128, layout="padded", budget=50, dtype=torch.bfloat16, **SHORT),
    ],
    ids=lambda case: f"{case.layout}, {case.dtype}",
)
def test_every_layout_on_the_gpu(case: Case) -> None:
    assert_score_gradients_agree("triton", case)
