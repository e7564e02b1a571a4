"""The token scorer: eager and Triton against the loop, and streaming against the whole text."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize_kernels import token_scorer, token_scorer_step, use_implementation
from tests.kernels.tolerances import OUTPUT, assert_close, assert_form_agrees

KERNEL = 3


def make_parameters(head_size, layers=3, scorers=2, *, kernel=KERNEL, dtype=torch.float64, device="cpu"):
    """[weight, bias] a layer, then the projection's; values of size 1 so that every term counts."""
    widths = [max(1, (2 * head_size) >> layer) for layer in range(layers + 1)]
    parameters = []
    for a, b in pairwise(widths):
        parameters += [(2.0 / (kernel * a)) ** 0.5 * torch.randn(scorers, kernel * a, b, dtype=torch.float64)]
        parameters += [torch.randn(scorers, b, dtype=torch.float64)]
    parameters += [torch.randn(scorers, widths[-1], 1, dtype=torch.float64), torch.randn(scorers, 1).double()]
    return [x.to(device, dtype) for x in parameters]


def make_inputs(time, head_size=4, *, batch=2, heads=2, dtype=torch.float64, device="cpu"):
    return [torch.randn(batch, time, heads, head_size, dtype=torch.float64).to(device, dtype) for _ in range(2)]


def score(k, v, *parameters, real=None, **options):
    real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if real is None else real
    options = {"dilation": 2, **options}
    return token_scorer(k, v, parameters[:-2:2], parameters[1:-2:2], *parameters[-2:], real, **options)


def step(k, v, history, num_new, num_before, parameters, dilation=2):
    weights, biases = parameters[:-2:2], parameters[1:-2:2]
    return token_scorer_step(k, v, history, num_new, num_before, weights, biases, *parameters[-2:], dilation=dilation)


def empty_history(k, parameters, dilation=2, kernel=KERNEL):
    inputs = sum(weight.shape[1] // kernel for weight in parameters[:-2:2])
    batch, _, heads, _ = k.shape
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    return torch.zeros(batch, heads, (kernel - 1) * dilation * inputs, dtype=dtype, device=k.device)


@pytest.mark.parametrize("time", [0, 1, 2, 13, 65])
@pytest.mark.parametrize("scorers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_the_loop(time, scorers, dtype, device):
    inputs = make_inputs(time, dtype=dtype, device=device) + make_parameters(4, 3, scorers, dtype=dtype, device=device)
    assert_form_agrees(score, inputs)


@pytest.mark.parametrize("time", [1, 2, 13, 65])
@pytest.mark.parametrize("scorers", [1, 2])
def test_the_kernels_equal_the_loop(time, scorers, device):
    parameters = make_parameters(6, 3, scorers, dtype=torch.float32, device=device)
    assert_form_agrees(score, make_inputs(time, 6, dtype=torch.float32, device=device) + parameters, form="triton")


@pytest.mark.parametrize(("kernel", "dilation", "layers"), [(1, 1, 1), (5, 1, 2), (3, 3, 4)])
def test_other_convolutions(kernel, dilation, layers):
    inputs = make_inputs(17) + make_parameters(4, layers, kernel=kernel)
    assert_form_agrees(partial(score, dilation=dilation), inputs)


@pytest.mark.parametrize("form", ["reference", "eager"])
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 5), (2, 4)])
def test_a_padded_text_scores_like_the_text_alone(form, left, right):
    k, v = make_inputs(left + 9 + right, batch=1)
    parameters = make_parameters(4)
    real = torch.tensor([[False] * left + [True] * 9 + [False] * right])
    text = slice(left, left + 9)
    k[:, ~real[0]] = torch.nan  # padding is not read
    with use_implementation(form):
        padded = score(k, v, *parameters, real=real)
        alone = score(k[:, text], v[:, text], *parameters)
    assert_close("logits", padded[:, text], alone, OUTPUT[torch.float64])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.sampled_from(["reference", "eager"]), st.integers(0, 99))
def test_a_text_in_any_chunks_scores_like_the_whole(chunks, form, seed):
    torch.manual_seed(seed)
    parameters = make_parameters(3)
    k, v = make_inputs(sum(chunks), 3, batch=2)
    # The second row gets fewer tokens of each chunk; what it does not take comes with the next one.
    history, seen = empty_history(k, parameters), torch.zeros(2, dtype=torch.int32)
    margin = 6
    with use_implementation("reference"):
        whole = score(k, v, *parameters)
    with use_implementation(form):
        for number, chunk in enumerate(chunks):
            taken = torch.tensor([min(chunk, k.shape[1] - int(seen[0])), max(0, chunk - number % 3)])
            columns = seen[:, None].long() + torch.arange(chunk)
            rows = torch.arange(2)[:, None]
            chunk_k, chunk_v = (x[rows, columns.clamp(max=x.shape[1] - 1)] for x in (k, v))
            ignored = torch.arange(chunk) >= taken[:, None]
            chunk_k[ignored] = 1e3
            logits = step(chunk_k, chunk_v, history, taken, seen, parameters)
            for row in range(2):
                for t in range(int(taken[row])):
                    token = int(seen[row]) + t - margin
                    if token >= 0:
                        assert_close("logit", logits[row, t], whole[row, token], OUTPUT[torch.float64])
            seen = seen + taken
