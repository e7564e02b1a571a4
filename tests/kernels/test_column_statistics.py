"""Column statistics: every form against the whole matrix of probabilities, and that matrix against a loop by hand."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import attention_log_sum_exp, column_statistics, use_implementation
from tests.kernels.tolerances import OUTPUT, assert_close

kernel = import_module("hybridize_kernels.column_statistics.kernel")
tiles = import_module("hybridize_kernels.column_statistics.tiles")

SMALL_TILES = "log_sum_exp=32,16,4,1;statistics=16,32,4,1"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter's texts are short: several tiles of each kind only with small ones."""
    if not torch.cuda.is_available():
        monkeypatch.setenv(tiles.VARIABLE, SMALL_TILES)


def make_inputs(time, heads=2, group=3, size=8, *, batch=2, dtype=torch.float32, device="cpu"):
    shapes = [(batch, time, heads * group, size), (batch, time, heads, size)]
    return [(2 * torch.randn(*shape)).to(dtype).to(device) for shape in shapes]


def positions_of(time, *padding, device="cpu"):
    return torch.stack([(torch.arange(time) - missing).clamp(min=-1) for missing in padding]).to(device)


def run(form, q, k, log_sum_exp=None, **options):
    """Log-sum-exp, largest and summed in a form."""
    bounds = {name: options[name] for name in ("positions", "cu_seqlens", "scale") if name in options}
    with use_implementation(form):
        return attention_log_sum_exp(q, k, **bounds), *column_statistics(q, k, log_sum_exp, **options)


def assert_equal_with_infinities(name: str, actual: Tensor, expected: Tensor, looser: float = 1.0) -> None:
    """As `assert_close` at fp32, whatever the inputs' dtype: they are taken as they are. −inf only where expected."""
    assert torch.equal(actual == -torch.inf, expected == -torch.inf), f"{name}: −inf elsewhere"
    finite = expected.isfinite()
    assert_close(name, actual[finite], expected[finite], looser * OUTPUT[torch.float32])


def assert_agrees(form, q, k, log_sum_exp=None, *, looser=1.0, **options):
    actual = run(form, q, k, log_sum_exp, **options)
    exact = None if log_sum_exp is None else log_sum_exp.double()
    expected = run("reference", q.double(), k.double(), exact, **options)
    for name, result, wanted in zip(("log-sum-exp", "largest", "summed"), actual, expected, strict=True):
        if wanted is None:
            assert result is None
            continue
        assert result.dtype == torch.float32
        assert_equal_with_infinities(name, result, wanted, looser)


@pytest.mark.parametrize("form", ["reference", "eager", "triton"])
def test_equals_a_loop_by_hand(form):
    q, k = make_inputs(7, heads=1, group=2, size=4, batch=1)
    log_sum_exp, largest, summed = run(form, q, k, window=3, scale=0.4)
    for j in range(7):
        given_to_j = []
        for i in range(j, 7):
            for member in range(2):
                weights = [math.exp(0.4 * float(q[0, i, member] @ k[0, seen, 0])) for seen in range(i + 1)]
                assert float(log_sum_exp[0, i, member]) == pytest.approx(math.log(sum(weights)), abs=1e-5)
                if i - j >= 3:
                    given_to_j.append(weights[j] / sum(weights))
        assert float(summed[0, j, 0]) == pytest.approx(sum(given_to_j), abs=1e-5)
        assert float(largest[0, j, 0]) == pytest.approx(
            math.log(max(given_to_j)) if given_to_j else -math.inf, abs=1e-5
        )


FORMS = ["eager", "triton"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("time", "window", "heads", "group", "size"),
    [(0, 3, 1, 1, 8), (1, 1, 2, 2, 16), (63, 64, 1, 4, 16), (64, 1, 1, 2, 20), (65, 7, 2, 3, 33), (130, 40, 1, 1, 16)],
)
def test_awkward_shapes(form, time, window, heads, group, size, device):
    q, k = make_inputs(time, heads, group, size, device=device)
    assert_agrees(form, q, k, window=window)


@pytest.mark.parametrize("form", FORMS)
def test_takes_a_log_sum_exp_and_leaves_out_the_sum(form, device):
    q, k = make_inputs(70, device=device)
    log_sum_exp = torch.randn(2, 70, 6, device=device)  # that of another softmax: it must be used as it is
    assert_agrees(form, q, k, log_sum_exp, window=9, scale=-0.3)
    assert_agrees(form, q, k, log_sum_exp, window=9, scale=-0.3, need_sum=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 8.0])
def test_any_scale(form, scale, device):
    q, k = make_inputs(50, device=device)
    # A probability's relative error is its logit's absolute one, which grows with the logit.
    looser = max(1.0, abs(scale))
    assert_agrees(form, q, k, looser=looser, window=9, scale=scale, positions=positions_of(50, 0, 20, device=device))


@pytest.mark.parametrize("form", FORMS)
def test_padding_anywhere(form, device):
    q, k = make_inputs(70, batch=3, device=device)
    real = torch.rand(70) > 0.3
    between = torch.where(real, real.cumsum(0) - 1, -1)
    positions = torch.cat([positions_of(70, 0, 41), between[None]]).to(device)
    assert_agrees(form, q, k, window=6, positions=positions)
    assert_agrees(form, q, k, torch.randn(3, 70, 6, device=device), window=6, positions=positions)
    assert_agrees(form, q, k, window=6, positions=torch.full_like(positions, -1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounds", [[0, 70], [0, 1, 33, 33, 64, 70], [0, 20, 51]])
@pytest.mark.parametrize("group", [1, 3])
def test_packed_documents_do_not_see_each_other(form, bounds, group, device):
    q, k = make_inputs(70, group=group, batch=1, device=device)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    assert_agrees(form, q, k, window=5, cu_seqlens=cu_seqlens)


def test_queries_split_among_programs_equal_the_whole(monkeypatch):
    monkeypatch.setattr(kernel, "MIN_QUERIES", 10)
    q, k = make_inputs(100, heads=1, group=3)
    assert_agrees("triton", q, k, window=8)
    assert_agrees("triton", q, k, window=8, positions=positions_of(100, 0, 33))


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("form", FORMS)
def test_property_rows_padded_and_packed_equal_rows_alone(form, data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=3))
    window = data.draw(st.integers(1, 12))
    rows = [make_inputs(length, heads=1, group=2, batch=1) for length in lengths]
    alone = [run(form, q, k, window=window) for q, k in rows]
    longest = max(lengths)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([torch.randn(1, longest - x.shape[1], *x.shape[2:]), x], dim=1)

    q, k = (torch.cat([padded(row[n]) for row in rows]) for n in range(2))
    positions = positions_of(longest, *(longest - length for length in lengths))
    batched = run(form, q, k, window=window, positions=positions)
    q, k = (torch.cat([row[n] for row in rows], dim=1) for n in range(2))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = run(form, q, k, window=window, cu_seqlens=bounds)
    for row, (length, results) in enumerate(zip(lengths, alone, strict=True)):
        for n, name in enumerate(("log-sum-exp", "largest", "summed")):
            expected = results[n][0]
            assert_equal_with_infinities(f"{name} padded", batched[n][row, longest - length :], expected)
            assert_equal_with_infinities(f"{name} packed", packed[n][0, bounds[row] : bounds[row + 1]], expected)


def test_probabilities_near_and_far_sum_to_one_a_query():
    q, k = make_inputs(40, heads=1, group=3)
    _, summed = column_statistics(q, k, window=1)
    near = (q * k).sum(-1) * 8**-0.5 - attention_log_sum_exp(q, k)  # of each query to its own token
    assert summed.sum((1, 2)) + near.exp().sum((1, 2)) == pytest.approx(3 * 40, rel=1e-5)


def test_carries_no_gradient_and_keeps_autocast_out():
    q, k = (x.requires_grad_() for x in make_inputs(40))
    expected = column_statistics(q, k, window=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = column_statistics(q, k, window=3)
    for result, wanted in zip(actual, expected, strict=True):
        assert not result.requires_grad
        assert torch.equal(result, wanted)


def test_mistakes_are_named():
    q, k = make_inputs(5)
    with pytest.raises(ValueError, match="window is 0"):
        column_statistics(q, k, window=0)
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4"):
        column_statistics(q, torch.randn(2, 5, 4, 8), window=1)
    with pytest.raises(ValueError, match=r"k has shape \[2, 4, 2, 8\]"):
        attention_log_sum_exp(q, k[:, 1:])
    with pytest.raises(ValueError, match="log_sum_exp has shape"):
        column_statistics(q, k, torch.zeros(2, 5, 2), window=1)
    with pytest.raises(ValueError, match="give one of them"):
        column_statistics(q, k, window=1, positions=positions_of(5, 0, 0), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="one row"):
        column_statistics(q, k, window=1, cu_seqlens=torch.tensor([0, 5]))


def test_half_precision_inputs_compute_in_fp32():
    q, k = make_inputs(70, dtype=torch.bfloat16)
    assert_agrees("eager", q, k, window=9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_every_tile_on_the_gpu(dtype, size, group):
    for time, window in ((1, 1), (65, 1), (1000, 129), (4097, 500)):
        q, k = make_inputs(time, 2, group, size, dtype=dtype, device="cuda")
        q = q * size**-0.25
        assert_agrees("triton", q, k, window=window, positions=positions_of(time, 0, time // 3, device="cuda"))
        packed = [x[:1] for x in (q, k)]
        bounds = torch.tensor([0, time // 7, time // 2, time], device="cuda")
        assert_agrees("triton", *packed, window=window, cu_seqlens=bounds)


@pytest.mark.gpu
def test_same_bits_twice_and_memory_that_grows_with_the_text():
    peaks = []
    for time in (16384, 32768):
        q, k = make_inputs(time, 2, 4, 64, batch=1, dtype=torch.bfloat16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first = column_statistics(q, k, window=512)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        for one, other in zip(first, column_statistics(q, k, window=512), strict=True):
            assert torch.equal(one, other)
    assert peaks[1] < 2.5 * peaks[0] < 32768 * 1000


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """600,000 tokens of 32 heads of 128 are more than 2**31 elements."""
    q, k = make_inputs(100, 32, 1, 128, batch=1, dtype=torch.bfloat16, device="cuda")
    alone = run("triton", q, k, window=3)
    long_q, long_k = (torch.zeros(1, 600_000, 32, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    long_q[:, -100:], long_k[:, -100:] = q, k
    bounds = torch.arange(0, 600_001, 100, device="cuda")
    for name, actual, expected in zip(
        ("log-sum-exp", "largest", "summed"),
        run("triton", long_q, long_k, window=3, cu_seqlens=bounds),
        alone,
        strict=True,
    ):
        assert_equal_with_infinities(name, actual[:, -100:], expected)
