"""The token scorer: eager and Triton against the loop, and streaming against the whole text."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize_kernels import token_scorer, token_scorer_step, use_implementation
from hybridize_kernels.token_scorer.tiles import VARIABLE, hashed_rows, is_kept
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

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


@pytest.mark.parametrize(("time", "scorers"), [(1, 2), (2, 1), (13, 2), (65, 1)])
def test_the_kernels_equal_the_loop(time, scorers, device):
    parameters = make_parameters(6, 3, scorers, dtype=torch.float32, device=device)
    assert_form_agrees(score, make_inputs(time, 6, dtype=torch.float32, device=device) + parameters, form="triton")


@pytest.mark.parametrize(("kernel", "dilation", "layers"), [(1, 1, 1), (5, 1, 2), (3, 3, 4)])
def test_other_convolutions(kernel, dilation, layers):
    inputs = make_inputs(17) + make_parameters(4, layers, kernel=kernel)
    assert_form_agrees(partial(score, dilation=dilation), inputs)


@pytest.mark.parametrize(
    ("form", "dtype"), [("reference", torch.float64), ("eager", torch.float64), ("triton", torch.float32)]
)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 5), (2, 4)])
def test_a_padded_text_scores_like_the_text_alone(form, dtype, left, right, device):
    k, v = make_inputs(left + 9 + right, batch=1, dtype=dtype, device=device)
    parameters = make_parameters(4, dtype=dtype, device=device)
    real = torch.tensor([[False] * left + [True] * 9 + [False] * right], device=device)
    text = slice(left, left + 9)
    k[:, ~real[0]] = torch.nan  # padding is not read
    with use_implementation(form):
        padded = score(k, v, *parameters, real=real)
        alone = score(k[:, text], v[:, text], *parameters)
    assert_close("logits", padded[:, text], alone, OUTPUT[dtype])


def packed(*lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def test_no_mask_is_a_mask_of_real_tokens(kernel_device):
    k, v = make_inputs(9, dtype=torch.float32, device=kernel_device)
    parameters = make_parameters(4, dtype=torch.float32, device=kernel_device)
    real = torch.ones(2, 9, dtype=torch.bool, device=kernel_device)
    for form in ("eager", "triton"):
        with use_implementation(form):
            assert torch.equal(score(k, v, *parameters), score(k, v, *parameters, real=real))


@pytest.mark.parametrize("lengths", [(1, 2, 9, 3, 1, 17), (3, 0, 20, 10), (33,)], ids=str)
@pytest.mark.parametrize("scorers", [1, 2])
def test_packed_documents_equal_the_loop(lengths, scorers, device):
    inputs = make_inputs(33, batch=1, device=device) + make_parameters(4, 3, scorers, device=device)
    assert_form_agrees(partial(score, cu_seqlens=packed(*lengths, device=device)), inputs)


@pytest.mark.parametrize(("lengths", "scorers"), [((1, 2, 9, 3, 1, 24), 2), ((3, 0, 27, 10), 1)], ids=str)
def test_the_kernels_keep_packed_documents_apart(lengths, scorers, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, "convolution=16,16,4,2;inputs=16,16,4,2;weights=16,16,4,2")
    inputs = make_inputs(40, 6, batch=1, dtype=torch.float32, device=kernel_device)
    inputs += make_parameters(6, 3, scorers, dtype=torch.float32, device=kernel_device)
    bounds = packed(*lengths, device=kernel_device)
    assert_form_agrees(partial(score, cu_seqlens=bounds), inputs, form="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_on_the_gpu(dtype):
    lengths = torch.randint(1, 300, (20,)).tolist()
    k, v = make_inputs(sum(lengths), 64, batch=1, heads=4, dtype=dtype, device="cuda")
    parameters = make_parameters(64, 3, 4, dtype=torch.float32, device="cuda")
    leaves = [x.requires_grad_() for x in (k, v, *parameters)]
    direction = torch.randn(1, k.shape[1], 4, device="cuda", dtype=torch.float64)
    results = {}
    for form in ("eager", "triton"):
        inputs = [x.double() for x in leaves] if form == "eager" else leaves
        with use_implementation(form):
            logits = score(*inputs, cu_seqlens=packed(*lengths, device="cuda"))
        results[form] = [logits, *torch.autograd.grad((logits * direction).sum(), leaves)]
    for n, (actual, expected) in enumerate(zip(results["triton"], results["eager"], strict=True)):
        half = actual.dtype == torch.bfloat16
        table = GRADIENT if n else OUTPUT
        tolerance = 2 * table[torch.bfloat16] if half else EXACT_SUM * table[torch.float32]
        assert_close(f"tensor {n}", actual, expected, tolerance)


@pytest.mark.parametrize("shape", [(1, 6), (2, 21), (1, 35)])
def test_padded_gradients_of_the_kernels(shape, device, monkeypatch):
    """Also over several tiles and splits, and with a row that is all padding."""
    monkeypatch.setenv(VARIABLE, "convolution=16,16,4,2;inputs=16,16,4,2;weights=16,16,4,2")
    batch, time = shape
    k, v = make_inputs(time, 12, batch=batch + 1, dtype=torch.float32, device=device)
    parameters = make_parameters(12, 2, dtype=torch.float32, device=device)
    real = torch.zeros(batch + 1, time, dtype=torch.bool, device=device)
    for row in range(batch):
        real[row, 3 * row + 1 : time - 2] = True
    assert_form_agrees(partial(score, real=real), [k, v, *parameters], form="triton")


def test_frozen_inputs_and_parameters_get_no_gradient(device):
    k, v = make_inputs(3, batch=1, dtype=torch.float32, device=device)
    parameters = make_parameters(4, 2, dtype=torch.float32, device=device)
    gradients = []
    for trained in ([k], [v], parameters, [k, v, *parameters]):
        for x in (k, v, *parameters):
            x.requires_grad_(any(x is y for y in trained))
        with use_implementation("triton"):
            total = score(k, v, *parameters).square().sum()
        gradients.append(torch.autograd.grad(total, trained))
    assert all(
        torch.equal(x, y) for x, y in zip([g for some in gradients[:3] for g in some], gradients[3], strict=True)
    )


def test_inputs_need_not_be_contiguous(device):
    k, v = make_inputs(9, dtype=torch.float32, device=device)
    parameters = make_parameters(4, dtype=torch.float32, device=device)
    both = torch.cat((v, k), dim=-1)
    apart = (both[..., 4:], both.transpose(-1, -2).contiguous().transpose(-1, -2)[..., :4])
    with use_implementation("triton"), torch.no_grad():
        assert torch.equal(score(*apart, *parameters), score(k, v, *parameters))


def test_half_precision_products(device):
    """Only the factors of the convolutions' products are rounded; the projection and the logits stay fp32."""
    k, v = make_inputs(40, 8, dtype=torch.float32, device=device)
    parameters = make_parameters(8, dtype=torch.float32, device=device)
    exact = score(k, v, *parameters)
    rounded = score(k, v, *parameters, compute_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float())
    assert_close("logits", rounded, exact, 2 * OUTPUT[torch.bfloat16])


EXACT_SUM = 2
"""The matrix units cut off, where others round, each time they add 16 products to a sum: of the 1536 products in three
parts of the widest layer here that is 288 times up to 2**-24 of the sum, and 7e-6 was seen."""


@pytest.mark.gpu
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_kernels_on_the_gpu(dtype, compute_dtype, head_size):
    """Real sizes: every tile of the table, several tiles and splits, left padding."""
    k, v = make_inputs(700, head_size, heads=4, dtype=dtype, device="cuda")
    parameters = make_parameters(head_size, 3, 4, dtype=torch.float32, device="cuda")
    real = torch.ones(2, 700, dtype=torch.bool, device="cuda")
    real[0, :37] = False
    leaves = [x.requires_grad_() for x in (k, v, *parameters)]
    direction = torch.randn(2, 700, 4, device="cuda", dtype=torch.float64)
    results = {}
    for form in ("eager", "triton"):
        exact = form == "eager"
        inputs = [x.double() for x in leaves] if exact else leaves
        with use_implementation(form):
            logits = score(*inputs, real=real, compute_dtype=None if exact else compute_dtype)
        results[form] = [logits, *torch.autograd.grad((logits * direction).sum(), leaves)]
    rounded = compute_dtype is not None
    for n, (actual, expected) in enumerate(zip(results["triton"], results["eager"], strict=True)):
        half = rounded or actual.dtype == torch.bfloat16
        table = OUTPUT if n == 0 else GRADIENT
        tolerance = 2 * table[torch.bfloat16] if half else EXACT_SUM * table[torch.float32]
        assert_close(f"tensor {n}", actual, expected, tolerance)


@triton.jit
def draw_kernel(seed_ptr, kept_ptr, dropped, LAYER: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    channels = tl.arange(0, CHANNELS)
    kept = is_kept(hashed_rows(seed_ptr, LAYER, rows.to(tl.int64))[:, None], channels[None, :], dropped)
    tl.store(kept_ptr + rows[:, None] * CHANNELS + channels[None, :], kept.to(tl.int8))


def test_dropout_drops_independently(device):
    def draw(seed, layer):
        kept = torch.empty(512, 256, dtype=torch.int8, device=device)
        draw_kernel[(1,)](torch.tensor([seed], device=device), kept, round(0.1 * 2**24), layer, 512, 256)
        return kept.double() - 0.9

    first = draw(1, 0)
    spread = (0.09 / first.numel()) ** 0.5
    assert abs(first.mean()) < 4 * spread
    assert (first.mean(0).abs().max() < 5 * (0.09 / 512) ** 0.5) & (first.mean(1).abs().max() < 5 * (0.09 / 256) ** 0.5)
    others = [draw(1, 1), draw(2, 0), first.roll(1, 0), first.roll(2, 0), first.roll(1, 1), first.roll((1, 1), (0, 1))]
    for other in others:
        assert abs((first * other).mean()) < 4 * 0.09 / first.numel() ** 0.5


def test_dropout_of_the_kernels_is_the_same_forward_and_back(device):
    inputs = make_inputs(11, dtype=torch.float32, device=device)
    inputs = [x.requires_grad_() for x in inputs + make_parameters(4, 2, dtype=torch.float32, device=device)]

    def total(inputs):
        torch.manual_seed(5)
        with use_implementation("triton"):
            return score(*inputs, dropout=0.3).double().sum()

    gradients = torch.autograd.grad(total(inputs), inputs)
    directions = [torch.randn_like(x) for x in inputs]
    slope = sum((g.double() * d).sum() for g, d in zip(gradients, directions, strict=True))
    with torch.no_grad():
        step_size = 2e-3
        ends = [total([x + sign * step_size * d for x, d in zip(inputs, directions, strict=True)]) for sign in (1, -1)]
        assert torch.equal(total(inputs), total(inputs))
        torch.manual_seed(6)
        with use_implementation("triton"):
            assert score(*inputs, dropout=0.3).double().sum() != total(inputs)
    assert_close("slope", (ends[0] - ends[1]) / (2 * step_size), slope, 2e-3)


def assert_streams(k, v, parameters, chunks, *, tolerance, kernel=KERNEL, dilation=2):
    """Two rows in chunks; the second takes fewer tokens of each, and what it leaves comes with the next one."""
    history = empty_history(k, parameters, dilation, kernel)
    seen = torch.zeros(2, dtype=torch.int32, device=k.device)
    margin = len(parameters[:-2:2]) * (kernel - 1) * dilation // 2
    with use_implementation("reference"):
        whole = score(*(x.double() for x in (k, v, *parameters)), dilation=dilation)
    rows = torch.arange(2, device=k.device)[:, None]
    streamed, expected = [], []
    for number, chunk in enumerate(chunks):
        taken = torch.tensor([chunk, max(0, chunk - number % 3)], dtype=torch.int32, device=k.device)
        columns = torch.arange(chunk, device=k.device)
        tokens = (seen[:, None] + columns).clamp(max=k.shape[1] - 1)
        ignored = columns >= taken[:, None]
        new_k, new_v = (torch.where(ignored[..., None, None], 9.0, x[rows, tokens]) for x in (k, v))
        logits = step(new_k, new_v, history, taken, seen, parameters, dilation)
        for row in range(2):
            for t in range(int(taken[row])):
                token = int(seen[row]) + t - margin
                if token >= 0:
                    streamed.append(logits[row, t])
                    expected.append(whole[row, token])
        seen = seen + taken
    assert len(streamed) >= max(0, sum(chunks) - margin)
    if streamed:
        assert_close("logits", torch.stack(streamed), torch.stack(expected), tolerance)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=7), st.sampled_from(["reference", "eager"]), st.integers(0, 99))
def test_a_text_in_any_chunks_scores_like_the_whole(chunks, form, seed):
    torch.manual_seed(seed)
    k, v = make_inputs(sum(chunks), 3)
    with use_implementation(form):
        assert_streams(k, v, make_parameters(3), chunks, tolerance=OUTPUT[torch.float64])


@pytest.mark.parametrize("chunks", [(9, 1, 1, 1, 1, 3, 1, 1, 1, 1), (1,) * 12])
@pytest.mark.parametrize(("scorers", "layers"), [(2, 3), (1, 1), (2, 4)])
def test_the_kernels_stream_like_the_loop(chunks, scorers, layers, device):
    k, v = make_inputs(sum(chunks), 6, dtype=torch.float32, device=device)
    parameters = make_parameters(6, layers, scorers, dtype=torch.float32, device=device)
    with use_implementation("triton"):
        assert_streams(k, v, parameters, chunks, tolerance=OUTPUT[torch.float32])


@pytest.mark.parametrize("form", ["reference", "eager"])
@pytest.mark.parametrize(("kernel", "dilation", "layers"), [(1, 1, 2), (5, 1, 2), (3, 3, 4)])
def test_other_convolutions_stream(form, kernel, dilation, layers):
    k, v = make_inputs(20)
    parameters = make_parameters(4, layers, kernel=kernel)
    with use_implementation(form):
        assert_streams(k, v, parameters, (7, 1, 0, 12), tolerance=1e-12, kernel=kernel, dilation=dilation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_streaming_on_the_gpu(dtype, head_size):
    """Real sizes, two tiles of rows, and the decoded tokens replayed from one CUDA graph."""
    tokens, prompt, margin = 340, 300, 6
    k, v = make_inputs(tokens, head_size, batch=20, heads=4, dtype=dtype, device="cuda")
    parameters = make_parameters(head_size, 3, 4, dtype=torch.float32, device="cuda")
    with use_implementation("eager"):
        whole = score(*(x.double() for x in (k, v, *parameters)))
    history = empty_history(k, parameters)
    count = torch.full((20,), prompt, dtype=torch.int32, device="cuda")
    seen = torch.zeros_like(count)
    first = step(k[:, :prompt], v[:, :prompt], history, count, seen, parameters)
    assert_close("prompt", first[:, margin:], whole[:, : prompt - margin], EXACT_SUM * OUTPUT[torch.float32])
    seen += prompt
    one = torch.ones_like(count)
    new_k, new_v = k[:, prompt : prompt + 1].clone(), v[:, prompt : prompt + 1].clone()
    kept = history.clone()
    step(new_k, new_v, history, one, seen, parameters)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(new_k, new_v, history, one, seen, parameters)
    history.copy_(kept)
    streamed = []
    for t in range(prompt, tokens):
        new_k.copy_(k[:, t : t + 1])
        new_v.copy_(v[:, t : t + 1])
        graph.replay()
        streamed.append(logits.clone())
        seen += 1
    expected = whole[:, prompt - margin : tokens - margin]
    assert_close("decoded", torch.cat(streamed, dim=1), expected, EXACT_SUM * OUTPUT[torch.float32])


def test_what_does_not_fit_is_named():
    k, v = make_inputs(5)
    parameters = make_parameters(4)
    with pytest.raises(ValueError, match="real has shape"):
        score(k, v, *parameters, real=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs one row"):
        score(k, v, *parameters, cu_seqlens=packed(2, 3))
    with pytest.raises(ValueError, match="without padding"):
        score(k[:1], v[:1], *parameters, real=torch.ones(1, 5, dtype=torch.bool), cu_seqlens=packed(2, 3))
    with pytest.raises(ValueError, match="bounds of a document"):
        score(k[:1], v[:1], *parameters, cu_seqlens=packed())
    with pytest.raises(ValueError, match="dropout is 1"):
        score(k, v, *parameters, dropout=1.0)
    with pytest.raises(ValueError, match="odd kernel times 8"):
        score(k, v, parameters[0][:, :16], *parameters[1:])
    with pytest.raises(ValueError, match="3 scorers"):
        score(k, v, *make_parameters(4, scorers=3))
    count = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="history has shape"):
        step(k, v, empty_history(k, parameters)[..., 1:], count, count, parameters)
    with use_implementation("triton"), pytest.raises(ValueError, match="does not cover"):
        score(k, v, *parameters)  # fp64
