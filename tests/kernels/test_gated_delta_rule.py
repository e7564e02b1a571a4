"""The gated delta rule: eager, chunked and recurrent, and the kernel for a few tokens, against the token loop."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize_kernels import gated_delta_rule, use_implementation
from tests.kernels import decode_cases
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

op = partial(gated_delta_rule, output_final_state=True, normalize_qk=True)


def with_state(q, k, v, log_decay, beta, state, **options):
    return op(q, k, v, log_decay, beta, initial_state=state, **options)


def make_inputs(
    time, heads=2, value_heads=2, key=12, value=10, *, batch=2, lowest=-3.0, dtype=torch.float64, device="cpu"
):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return [
        x.to(dtype).to(device)
        for x in (
            draw(batch, time, heads, key),
            draw(batch, time, heads, key),
            draw(batch, time, value_heads, value),
            lowest * torch.rand(batch, time, value_heads, dtype=torch.float64),
            2 * torch.rand(batch, time, value_heads, dtype=torch.float64),
            draw(batch, value_heads, key, value),
        )
    ]


@pytest.mark.parametrize("time", [0, 1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize(("heads", "value_heads", "key", "value"), [(1, 1, 60, 60), (2, 6, 8, 12), (3, 3, 16, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_states_and_gradients_equal_the_loop(time, heads, value_heads, key, value, dtype, device):
    inputs = make_inputs(time, heads, value_heads, key, value, dtype=dtype, device=device)
    assert_form_agrees(with_state, inputs)


@pytest.mark.parametrize("time", [5, 70])
def test_without_state_scale_or_normalisation(time):
    q, k, v, log_decay, beta, _ = make_inputs(time)
    # Keys of length above 1 make the transition grow; short ones keep the comparison about the code.
    assert_form_agrees(partial(gated_delta_rule, scale=0.3), [q, 0.2 * k, v, log_decay, beta])


@pytest.mark.parametrize("lowest", [-20.0, -1e-4])
def test_extreme_decays_stay_exact_in_fp32(lowest, device):
    inputs = make_inputs(130, lowest=lowest, dtype=torch.float32, device=device)
    inputs[3][:, 100:] *= 1e-3  # weak decays after a sum of about −1000
    assert_form_agrees(with_state, inputs)


def test_eager_computes_half_precision_inputs_in_fp32(device):
    q, k, v, log_decay, beta, state = make_inputs(70, dtype=torch.bfloat16, device=device)
    with use_implementation("eager"):
        output, final = with_state(q, k, v, log_decay, beta, state)
    assert output.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    with use_implementation("reference"):
        expected, expected_final = with_state(*(x.double() for x in (q, k, v, log_decay, beta, state)))
    assert_close("output", output, expected, OUTPUT[torch.bfloat16])
    assert_close("state", final, expected_final, OUTPUT[torch.float32])


def test_autocast_does_not_reach_the_solve():
    inputs = make_inputs(70, dtype=torch.float32)
    expected, expected_final = with_state(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, final = with_state(*inputs)
    assert torch.equal(output, expected)
    assert torch.equal(final, expected_final)


@pytest.mark.parametrize("time", [1, 3, 8])
def test_few_tokens_without_gradient_take_the_recurrent_form(time):
    inputs = make_inputs(time, 2, 4)
    with use_implementation("reference"):
        expected, expected_final = with_state(*inputs)
    with torch.no_grad():
        output, final = with_state(*inputs)
    assert_close("output", output, expected, OUTPUT[torch.float64])
    assert_close("state", final, expected_final, OUTPUT[torch.float64])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(0, 140),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_a_text_in_two_parts_equals_it_in_one(first, second, heads, group, size, seed):
    torch.manual_seed(seed)
    q, k, v, log_decay, beta, state = make_inputs(first + second, heads, heads * group, size, size, batch=1)
    with torch.no_grad():
        whole, whole_state = with_state(q, k, v, log_decay, beta, state)
        head, between = with_state(*(x[:, :first] for x in (q, k, v, log_decay, beta)), state)
        tail, last_state = with_state(*(x[:, first:] for x in (q, k, v, log_decay, beta)), between)
    assert_close("output", torch.cat([head, tail], dim=1), whole, GRADIENT[torch.float64])
    assert_close("state", last_state, whole_state, GRADIENT[torch.float64])


@pytest.mark.parametrize("padding", [3, 40, 64])
def test_zero_decay_and_beta_leave_the_state_untouched(padding):
    q, k, v, log_decay, beta, state = make_inputs(padding)
    _, final = with_state(q, k, v, 0 * log_decay, 0 * beta, state)
    assert_close("state", final, state, OUTPUT[torch.float64])
    token = make_inputs(1)
    with torch.no_grad():
        _, final = with_state(*token[:3], 0 * token[3], 0 * token[4], state)
    assert torch.equal(final, state)


def test_value_head_n_reads_key_head_n_over_the_group():
    q, k, v, log_decay, beta, state = make_inputs(70, 2, 6)
    shared = with_state(q, k, v, log_decay, beta, state)
    order = torch.tensor([0, 0, 0, 1, 1, 1])
    apart = with_state(q[:, :, order], k[:, :, order], v, log_decay, beta, state)
    assert torch.equal(shared[0], apart[0])
    assert torch.equal(shared[1], apart[1])


def test_a_full_step_writes_the_value_under_its_key():
    key = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8, dtype=torch.float64), dim=-1)
    value, state = torch.randn(1, 1, 1, 5, dtype=torch.float64), torch.randn(1, 1, 8, 5, dtype=torch.float64)
    zero, one = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    output, _ = gated_delta_rule(key, key, value, zero, one, scale=1.0, initial_state=state)
    assert_close("read back", output, value, OUTPUT[torch.float64])


def test_reference_gradient_equals_finite_differences():
    inputs = [x.requires_grad_() for x in make_inputs(3, 1, 2, 3, 2, batch=1)]
    with use_implementation("reference"):
        assert torch.autograd.gradcheck(with_state, inputs)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (1, (2, 4, 2, 11), "k has shape"),
        (1, (2, 4, 4, 12), "2 state heads are not a multiple of 4 key heads"),
        (0, (2, 4, 3, 12), "2 state heads are not a multiple of 3 query heads"),
        (2, (2, 4, 3, 10), "2 state heads are not a multiple of 3 value heads"),
        (3, (2, 4, 1), "1 state heads are not a multiple of 2 query heads"),
        (3, (3, 4, 2), "log_decay has shape"),
        (3, (2, 4), "log_decay has shape"),
        (4, (2, 5, 2), "beta has shape"),
        (5, (2, 2, 10, 12), "initial_state has shape"),
        (0, (4, 2, 12), "q has shape"),
    ],
)
def test_misshapen_inputs_are_named(index, shape, message):
    inputs = make_inputs(4)
    inputs[index] = torch.zeros(*shape)
    with pytest.raises(ValueError, match=message):
        with_state(*inputs)


def test_unknown_form_and_missing_kernel_are_named():
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"), use_implementation("cuda"):
        pass
    for size in ({"key": 257}, {"value": 257}):
        with use_implementation("triton"), pytest.raises(ValueError, match="does not cover this call"):
            with_state(*make_inputs(2, batch=1, **size))


def test_decode_kernel_equals_the_loop(kernel_device):
    assert decode_cases.compare_all(kernel_device, torch.float32) >= 50


@pytest.mark.gpu
def test_decode_kernel_equals_the_loop_in_bfloat16():
    # Triton's interpreter knows no products of bfloat16.
    assert decode_cases.compare_all("cuda", torch.bfloat16) >= 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_picks_the_kernel_where_there_is_a_gpu(dtype, device):
    inputs = [x.to(dtype) for x in make_inputs(1, 2, 4, 60, 60, device=device)]
    with torch.no_grad():
        chosen = with_state(*inputs)
        with use_implementation("triton" if device == "cuda" else "eager"):
            named = with_state(*inputs)
    assert torch.equal(chosen[0], named[0])
    assert torch.equal(chosen[1], named[1])
