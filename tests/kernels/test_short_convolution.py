"""Short causal convolutions: eager and Triton against the loop, texts in parts, steps in place."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize_kernels import short_convolution, short_convolution_step, short_convolutions, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS
from hybridize_kernels.short_convolution.tiles import VARIABLE
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees

SMALL_TILES = "forward=512,8,1,8;backward=256,4,1,8"
"""Several tiles a program, and several programs along the longer texts."""

PATTERNS = {
    "none": None,
    "left": lambda t, row: t >= 3 * row + 2,
    "between": lambda t, row: (t % (row + 3) > 0) & (t != 4),
    "all": lambda t, row: (t >= 0) & (row == 1),
}


def make_inputs(time, heads=2, size=5, taps=4, *, batch=2, tail=True, dtype=torch.float64, device="cpu"):
    shapes = [(batch, time, heads, size), (heads * size, taps), (batch, taps - 1, heads * size)]
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes[: 2 + tail]]


def make_real(pattern, time, batch=2, device="cpu"):
    column = torch.arange(time, device=device)
    rule = PATTERNS[pattern]
    return None if rule is None else torch.stack([rule(column, row) for row in range(batch)])


def convolve(x, taps, tail=None, **options):
    return short_convolution(x, taps, tail=tail, output_tail=True, **options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("time", [0, 1, 2, 15, 33])
@pytest.mark.parametrize(("dtype", "tail"), [(torch.float64, True), (torch.float32, False)])
def test_outputs_tails_and_gradients_equal_the_loop(pattern, time, dtype, tail, device):
    inputs = make_inputs(time, dtype=dtype, tail=tail, device=device)
    activation = "silu" if time % 2 else None
    assert_form_agrees(partial(convolve, real=make_real(pattern, time, device=device), activation=activation), inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("time", "heads", "size", "taps", "tail", "activation"),
    [
        (1, 1, 60, 4, True, None),
        (2, 2, 96, 2, False, "silu"),
        (15, 1, 60, 4, True, "silu"),
        (33, 2, 5, 5, True, "silu"),
        (64, 1, 20, 4, False, None),
        (21, 3, 6, 16, True, None),
    ],
)
def test_the_kernels_equal_the_loop(pattern, time, heads, size, taps, tail, activation, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    inputs = make_inputs(time, heads, size, taps, tail=tail, dtype=torch.float32, device=kernel_device)
    real = make_real(pattern, time, device=kernel_device)
    assert_form_agrees(partial(convolve, real=real, activation=activation), inputs, form="triton")


def test_the_kernels_take_halves_and_wide_taps(kernel_device):
    x, taps, tail = make_inputs(20, dtype=torch.float16, device=kernel_device)
    assert_form_agrees(convolve, [x, taps, tail], form="triton")
    for leaf in (x, taps := taps.float(), tail := tail.float()):
        leaf.requires_grad_()
    with use_implementation("triton"):
        y, after = convolve(x, taps, tail)
    assert y.dtype == after.dtype == torch.float16
    gradients = torch.autograd.grad(y.float().sum() + after.float().sum(), (x, taps, tail))
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32, torch.float32]


def packed(*lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


PACKED = [(1, 2, 9, 3, 1, 17), (3, 0, 0, 8, 20, 2), (33,)]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("taps", [2, 4, 16])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_documents_equal_the_loop(lengths, taps, activation, device):
    inputs = make_inputs(33, taps=taps, batch=1, tail=False, device=device)
    options = {"cu_seqlens": packed(*lengths, device=device), "activation": activation}
    assert_form_agrees(partial(short_convolution, **options), inputs)


@pytest.mark.parametrize("lengths", PACKED[:2], ids=str)
@pytest.mark.parametrize(
    ("heads", "size", "taps", "activation"),
    [(1, 60, 4, None), (2, 96, 2, "silu"), (1, 60, 4, "silu"), (2, 5, 5, "silu"), (3, 6, 16, None)],
)
def test_the_kernels_keep_packed_documents_apart(lengths, heads, size, taps, activation, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    inputs = make_inputs(33, heads, size, taps, batch=1, tail=False, dtype=torch.float32, device=kernel_device)
    options = {"cu_seqlens": packed(*lengths, device=kernel_device), "activation": activation}
    assert_form_agrees(partial(short_convolution, **options), inputs, form="triton")


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_nothing_of_another_document_is_read(form, kernel_device):
    x, taps = make_inputs(12, batch=1, tail=False, dtype=torch.float32, device=kernel_device)
    whole = x.clone()
    whole[:, :5] = torch.nan
    whole[:, 9:] = torch.inf
    bounds = packed(5, 4, 3, device=kernel_device)
    with use_implementation(form):
        y, _ = short_convolution(whole, taps, cu_seqlens=bounds)
        assert_close("output", y[:, 5:9], short_convolution(x[:, 5:9], taps)[0], OUTPUT[torch.float32])
        # The same tensor with other numbers: tables of it are not taken from memory.
        bounds.copy_(packed(5, 3, 4, device=kernel_device))
        moved, _ = short_convolution(x, taps, cu_seqlens=bounds)
        assert_close("output", moved[:, 8:], short_convolution(x[:, 8:], taps)[0], OUTPUT[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_packed_documents_on_the_gpu(dtype, activation):
    lengths = torch.randint(1, 700, (40,)).tolist()
    inputs = make_inputs(sum(lengths), 9, 64, batch=1, tail=False, dtype=dtype, device="cuda")
    bounds = packed(*lengths, device="cuda")
    results = {}
    for form in ("eager", "triton"):
        leaves = [(x.double() if form == "eager" else x).detach().requires_grad_() for x in inputs]
        with use_implementation(form):
            y, _ = short_convolution(*leaves, cu_seqlens=bounds, activation=activation)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        results[form] = [y, *torch.autograd.grad((y * direction).sum(), leaves)]
    for n, (actual, expected) in enumerate(zip(results["triton"], results["eager"], strict=True)):
        assert_close(f"tensor {n}", actual, expected, (GRADIENT if n else OUTPUT)[dtype])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_padding_is_stepped_over_and_not_read(form, kernel_device):
    real = make_real("between", 12, device=kernel_device)
    x, taps, tail = make_inputs(12, dtype=torch.float32, device=kernel_device)
    x[~real] = torch.nan
    with use_implementation(form):
        y, after = convolve(x, taps, tail, real=real)
        for row in range(2):
            alone, alone_after = convolve(x[row : row + 1, real[row]], taps, tail[row : row + 1])
            assert_close("output", y[row, real[row]], alone[0], OUTPUT[torch.float32])
            assert torch.equal(after[row], alone_after[0])
    assert not y[~real].any()


def make_several(heads, time, size, taps, *, batch=2, dtype=torch.float64, device="cpu"):
    """Texts, then filters; each text has its own heads."""
    drawn = [
        make_inputs(time, count, size, taps, batch=batch, tail=False, dtype=dtype, device=device) for count in heads
    ]
    return [x for x, _ in drawn] + [weight for _, weight in drawn]


def convolve_several(*tensors, **options):
    half = len(tensors) // 2
    return short_convolutions(tensors[:half], tensors[half:], **options)


@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize("case", ["none", "between", "packed"])
@pytest.mark.parametrize(("heads", "size", "taps"), [((3, 1, 1), 60, 4), ((2, 1), 96, 2), ((2,), 6, 5)])
def test_several_texts_equal_the_loop(form, case, heads, size, taps, kernel_device, monkeypatch):
    monkeypatch.setenv(VARIABLE, SMALL_TILES)
    batch = 1 if case == "packed" else 2
    inputs = make_several(heads, 21, size, taps, batch=batch, dtype=torch.float32, device=kernel_device)
    options = {"activation": "silu" if taps == 5 else None}
    if case == "packed":
        options["cu_seqlens"] = packed(8, 1, 0, 12, device=kernel_device)
    else:
        options["real"] = make_real(case, 21, device=kernel_device)
    assert_form_agrees(partial(convolve_several, **options), inputs, form=form)


def test_of_several_texts_what_is_frozen_gets_no_gradient(kernel_device):
    tensors = make_several((2, 1, 1), 5, 3, 2, dtype=torch.float32, device=kernel_device)
    with use_implementation("triton"):
        leaves = [x.requires_grad_() for x in tensors]
        everything = torch.autograd.grad(sum(y.square().sum() for y in convolve_several(*leaves)), leaves)
        for number, leaf in enumerate(leaves):
            others = [x if x is leaf else x.detach() for x in leaves]
            total = sum(y.square().sum() for y in convolve_several(*others))
            assert torch.equal(torch.autograd.grad(total, leaf)[0], everything[number])
        unused = torch.autograd.grad(convolve_several(*leaves)[1].sum(), leaves[0])[0]  # of another text alone
        assert not unused.any()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(2, 6),
    st.sampled_from(["none", "left", "between", "all"]),
    st.sampled_from(["reference", "eager"]),
    st.sampled_from([None, "silu"]),
    st.integers(0, 99),
)
def test_a_text_in_two_parts_equals_it_in_one(first, second, taps, pattern, form, activation, seed):
    torch.manual_seed(seed)
    x, weights, tail = make_inputs(first + second, 2, 3, taps)
    real = make_real(pattern, first + second)
    head_real, tail_real = (None, None) if real is None else (real[:, :first], real[:, first:])
    with use_implementation(form):
        whole, whole_after = convolve(x, weights, tail, real=real, activation=activation)
        head, between = convolve(x[:, :first], weights, tail, real=head_real, activation=activation)
        rest, after = convolve(x[:, first:], weights, between, real=tail_real, activation=activation)
    assert_close("output", torch.cat((head, rest), dim=1), whole, OUTPUT[torch.float64])
    assert torch.equal(after, whole_after)


@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("time", [1, 2, 7, 16])
@pytest.mark.parametrize(("heads", "size", "taps"), [((3, 1, 1), 60, 4), ((2, 2), 5, 16), ((1,), 96, 2)])
def test_steps_equal_the_loop_and_leave_the_same_tail(form, pattern, time, heads, size, taps, kernel_device):
    dtype = torch.float32
    drawn = [make_inputs(time, count, size, taps, dtype=dtype, device=kernel_device) for count in heads]
    xs, weights, tails = zip(*drawn, strict=True)
    tail, real = torch.cat(tails, dim=2), make_real(pattern, time, device=kernel_device)
    expected_tail, address = tail.clone(), tail.data_ptr()
    activation = None if time % 2 else "silu"
    with use_implementation("reference"):
        expected = short_convolution_step(xs, weights, expected_tail, real, activation=activation)
    with use_implementation(form):
        ys = short_convolution_step(xs, weights, tail, real, activation=activation)
    for y, other in zip(ys, expected, strict=True):
        assert_close("output", y, other, OUTPUT[dtype])
    assert torch.equal(tail, expected_tail)
    assert tail.data_ptr() == address


def test_without_a_tail_asked_for_there_is_none(kernel_device):
    x, taps = make_inputs(5, tail=False, dtype=torch.float32, device=kernel_device)
    for form in IMPLEMENTATIONS:
        with use_implementation(form):
            assert short_convolution(x, taps)[1] is None


def test_inputs_need_not_be_contiguous_and_frozen_ones_get_no_gradient(kernel_device):
    x, taps, tail = (a.requires_grad_() for a in make_inputs(9, dtype=torch.float32, device=kernel_device))
    wide = torch.cat((x, x), dim=-1).detach()[..., :5].requires_grad_()
    apart = torch.cat((tail, tail), dim=-1).detach()[..., :10].requires_grad_()
    with use_implementation("triton"):
        y, _ = convolve(x, taps, tail)
        assert torch.equal(convolve(wide, taps.t().contiguous().t(), apart)[0], y)
        both = torch.autograd.grad(y.square().sum(), (x, taps, tail))
        for leaf, gradient in zip((x, taps, tail), both, strict=True):
            others = [a if a is leaf else a.detach() for a in (x, taps, tail)]
            assert torch.equal(torch.autograd.grad(convolve(*others)[0].square().sum(), leaf)[0], gradient)
        assert torch.autograd.grad(convolve(x, taps, tail)[1].sum(), x)[0].sum() == 2 * 3 * 10  # of the tail alone


@pytest.mark.parametrize("name", ["taps", "tail", "real", "activation", "x", "many taps"])
def test_misshapen_inputs_are_named(name):
    x, taps, tail = make_inputs(4)
    options = {
        "taps": ((x, taps[1:]), {}),
        "tail": ((x, taps), {"tail": tail[:, 1:]}),
        "real": ((x, taps), {"real": torch.ones(2, 5, dtype=torch.bool)}),
        "activation": ((x, taps), {"activation": "relu"}),
        "x": ((x[0], taps), {}),
        "many taps": ((x, taps.repeat(1, 5)), {}),
    }
    arguments, keywords = options[name]
    with pytest.raises(ValueError, match=name.split()[-1]):
        short_convolution(*arguments, **keywords)


@pytest.mark.parametrize("name", ["one row", "tail", "real", "output_tail", "bounds"])
def test_packed_documents_exclude_tails_and_padding(name):
    x, taps, tail = make_inputs(4, batch=2 if name == "one row" else 1)
    options = {
        "tail": {"tail": tail},
        "real": {"real": torch.ones(1, 4, dtype=torch.bool)},
        "output_tail": {"output_tail": True},
        "bounds": {"cu_seqlens": torch.tensor([0])},
    }.get(name, {})
    with pytest.raises(ValueError, match="cu_seqlens"):
        short_convolution(x, taps, **{"cu_seqlens": packed(1, 3), **options})


def test_misshapen_steps_are_named():
    x, taps, tail = make_inputs(4)
    for arguments, message in [
        (((x, x), (taps,), tail), "2 texts and 1 filters"),
        (((), (), tail), "0 texts"),
        (((x, x[:, 1:]), (taps, taps), tail), "x has shape"),
        (((x, x), (taps, taps[:, 1:]), tail), "taps has shape"),
        (((x, x), (taps, taps), tail), "tail has shape"),
        (((x,), (taps,), torch.cat((tail, tail), dim=2)[..., :10]), "must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_convolution_step(*arguments)


def test_misshapen_texts_of_several_are_named():
    x, taps = make_inputs(4, tail=False)
    for arguments, message in [
        (((x, x), (taps,)), "2 texts and 1 filters"),
        (((x, x[:, 1:]), (taps, taps)), "x has shape"),
        (((x, x), (taps, taps[:, 1:])), "taps has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            short_convolutions(*arguments)
    with pytest.raises(ValueError, match="needs one row"):
        short_convolutions((x, x), (taps, taps), cu_seqlens=packed(1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("heads", "size", "taps"), [(9, 64, 4), (4, 128, 4), (3, 96, 3), (1, 60, 16)])
def test_kernels_on_the_gpu(dtype, pattern, heads, size, taps):
    """Real sizes, against eager in fp64; the same bits again."""
    leaves = [x.requires_grad_() for x in make_inputs(1000, heads, size, taps, batch=3, dtype=dtype, device="cuda")]
    real = make_real(pattern, 1000, batch=3, device="cuda")
    direction = torch.randn(3, 1000, heads, size, device="cuda", dtype=torch.float64)
    results = []
    for form in ("eager", "triton", "triton"):
        inputs = [x.double() for x in leaves] if form == "eager" else leaves
        with use_implementation(form):
            y, after = convolve(*inputs, real=real, activation="silu" if taps % 2 else None)
        results.append([y, after, *torch.autograd.grad((y * direction).sum() + after.double().sum(), leaves)])
    exact, first, again = results
    for n, (actual, expected) in enumerate(zip(first, exact, strict=True)):
        assert_close(f"tensor {n}", actual, expected, (OUTPUT if n < 2 else GRADIENT)[dtype])
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "size", "taps"), [((9, 3, 3), 64, 4), ((32, 8, 8), 128, 4), ((2, 1, 1), 60, 16)])
def test_several_texts_on_the_gpu(dtype, heads, size, taps):
    """Real sizes, rows and packed documents; what they are one by one."""
    for batch, bounds in ((2, None), (1, packed(700, 1, 299, device="cuda"))):
        given = make_several(heads, 1000, size, taps, batch=batch, dtype=dtype, device="cuda")
        leaves = [x.requires_grad_() for x in given]
        half = len(leaves) // 2
        with use_implementation("triton"):
            together = convolve_several(*leaves, cu_seqlens=bounds)
            alone = [
                short_convolution(x, weight, cu_seqlens=bounds)[0]
                for x, weight in zip(leaves[:half], leaves[half:], strict=True)
            ]
        directions = [torch.randn_like(y) for y in alone]
        for n, (actual, expected) in enumerate(zip(together, alone, strict=True)):
            assert_close(f"output {n}", actual, expected, OUTPUT[dtype])
        first, second = (torch.autograd.grad(ys, leaves, directions) for ys in (together, alone))
        for n, (actual, expected) in enumerate(zip(first, second, strict=True)):
            assert_close(f"gradient {n}", actual, expected, GRADIENT[dtype])


@pytest.mark.gpu
def test_steps_are_replayed_from_a_graph():
    drawn = [make_inputs(8, count, 64, dtype=torch.bfloat16, device="cuda") for count in (9, 3, 3)]
    texts, taps, tails = zip(*drawn, strict=True)
    start = torch.cat(tails, dim=2)
    xs = [x[:, :1].clone() for x in texts]
    real = torch.ones(2, 1, dtype=torch.bool, device="cuda")
    tail = start.clone()
    short_convolution_step(xs, taps, tail, real)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = short_convolution_step(xs, taps, tail, real)
    tail.copy_(start)
    for t in range(8):
        for x, text in zip(xs, texts, strict=True):
            x.copy_(text[:, t : t + 1])
        graph.replay()
        for y, text, weights, before in zip(ys, texts, taps, tails, strict=True):
            expected, _ = short_convolution(text.double(), weights.double(), tail=before.double())
            assert_close(f"step {t}", y[:, 0], expected[:, t], OUTPUT[torch.bfloat16])
    assert torch.equal(tail, torch.cat([text.flatten(2)[:, -3:] for text in texts], dim=2))
