"""The gradient of a gate: every form against the whole matrix of weights, and that matrix against a loop by hand."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import gate_gradient, use_implementation
from tests.kernels.tolerances import GRADIENT, assert_close

kernel = import_module("hybridize_kernels.gate_gradient.kernel")
tiles = import_module("hybridize_kernels.gate_gradient.tiles")

SMALL_TILES = "16,32,4,1"
FORMS = ["eager", "triton"]
GATES = [("value", False), ("logit", False), ("value", True), ("logit", True)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter's texts are short: several tiles of each kind only with small ones."""
    if not torch.cuda.is_available():
        monkeypatch.setenv(tiles.VARIABLE, SMALL_TILES)


def make_inputs(time, heads=2, group=3, size=8, *, batch=2, dtype=torch.float32, device="cpu", shown=0.5):
    """q, k, v, do, log-sum-exp, delta and exits; log-sum-exps above the logits, as those of what is seen."""
    rows, keys = (batch, time, heads * group), (batch, time, heads)
    q, d_output = (torch.randn(*rows, size) for _ in range(2))
    k, v = (torch.randn(*keys, size) for _ in range(2))
    exits = torch.randint(0, time + 1, keys) * (torch.rand(keys) < shown)
    exact = [torch.randn(rows) + math.log(time + 1), torch.randn(rows), exits]
    return [x.to(device, dtype) for x in (q, k, v, d_output)] + [x.to(device) for x in exact]


def positions_of(time, *padding, device="cpu"):
    return torch.stack([(torch.arange(time) - missing).clamp(min=-1) for missing in padding]).to(device)


def run(form, inputs, **options):
    with use_implementation(form):
        return gate_gradient(*inputs, **options)


def assert_agrees(form, inputs, *, looser=1.0, gates=GATES, **options):
    exact = [x.double() for x in inputs[:-1]] + inputs[-1:]
    for on, hidden in gates:
        result = run(form, inputs, on=on, hidden=hidden, **options)
        assert result.dtype == torch.float32
        expected = run("reference", exact, on=on, hidden=hidden, **options)
        # The inputs are taken as they are, whatever their dtype.
        assert_close(f"{on}, hidden {hidden}", result, expected, looser * GRADIENT[torch.float32])


@pytest.mark.parametrize(("on", "hidden"), GATES)
@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_equals_a_loop_by_hand(form, on, hidden):
    time, window, scale = 9, 3, 0.4
    inputs = make_inputs(time, heads=1, group=2, size=4, batch=1)
    q, k, v, d_output, log_sum_exp, delta, exits = (x[0] for x in inputs)
    result = run(form, inputs, window=window, scale=scale, on=on, hidden=hidden)
    for j in range(time):
        total = 0.0
        for i in range(j + window, time):
            for member in range(2):
                weight = math.exp(scale * float(q[i, member] @ k[j, 0]) - float(log_sum_exp[i, member]))
                if i >= exits[j, 0]:
                    weight = weight / (1 + weight) if hidden else 0.0
                moved = float(d_output[i, member] @ v[j, 0]) - (float(delta[i, member]) if on == "logit" else 0.0)
                total += weight * moved
        assert float(result[0, j, 0]) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("sharp", [0.5, 4.0])
def test_a_hidden_key_that_is_shown_to_one_query_moves_the_loss_so_much(sharp):
    """Exactly: the loss is linear in the output, and one more key moves a softmax's output by sigmoid(s) (v − o)."""
    time, window, query, size = 12, 4, 10, 5
    q, k, v, direction = (torch.randn(1, time, 1, size, dtype=torch.float64) for _ in range(4))
    q *= sharp
    d_output = torch.zeros_like(q)
    d_output[:, query] = direction[:, query]

    def attend(keys):
        logits = (k[0, keys, 0] @ q[0, query, 0]) * size**-0.5
        return logits.softmax(0) @ v[0, keys, 0], logits.logsumexp(0)

    seen = list(range(query - window + 1, query + 1))
    output, log_sum = attend(seen)
    delta = torch.zeros(1, time, 1, dtype=torch.float64)
    delta[0, query] = output @ direction[0, query, 0]
    exits = torch.zeros(1, time, 1, dtype=torch.int64)
    log_sum_exp = torch.full_like(delta, log_sum.item())
    found = run("reference", (q, k, v, d_output, log_sum_exp, delta, exits), window=window, on="logit", hidden=True)
    for j in range(time):
        shown = (attend([j, *seen])[0] - output) @ direction[0, query, 0] if j <= query - window else torch.tensor(0.0)
        assert found[0, j, 0].item() == pytest.approx(shown.item(), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("time", "window", "heads", "group", "size"),
    [(0, 3, 1, 1, 8), (1, 1, 2, 2, 16), (63, 64, 1, 4, 16), (64, 1, 1, 2, 20), (65, 7, 2, 3, 33), (130, 40, 1, 1, 16)],
)
def test_awkward_shapes(form, time, window, heads, group, size, device):
    assert_agrees(form, make_inputs(time, heads, group, size, device=device), window=window)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shown", [0.0, 1.0])
def test_nothing_shown_and_everything_kept_for_a_while(form, shown, device):
    inputs = make_inputs(70, shown=shown, device=device)
    assert_agrees(form, inputs, window=6)
    if shown == 0.0:
        assert (run(form, inputs, window=6, on="logit", hidden=False) == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 6.0])
def test_any_scale(form, scale, device):
    inputs = make_inputs(50, device=device)
    keys = inputs[1].repeat_interleave(3, dim=2)
    inputs[4] = (scale * torch.einsum("bthd,bshd->bths", inputs[0], keys)).logsumexp(-1)
    # A weight's relative error is its logit's absolute one, which grows with the logit.
    assert_agrees(form, inputs, looser=max(1.0, abs(scale)), window=9, scale=scale)


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_hidden_keys_of_any_logit_have_a_weight_of_at_most_one(form):
    inputs = make_inputs(40, shown=0.0)
    inputs[4] -= 1e4
    inputs[4][:, ::2] += 2e4
    result = run(form, inputs, window=3, on="value", hidden=True)
    moved = torch.einsum("bthgd,bshd->bhgts", inputs[3].unflatten(2, (2, 3)), inputs[2])
    far = (torch.ones(40, 40).tril(-3) * (torch.arange(40) % 2)[:, None]).bool()
    assert_close("all of it", result, torch.where(far, moved, 0.0).sum((2, 3)).transpose(1, 2), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_anywhere(form, device):
    real = torch.rand(70) > 0.3
    between = torch.where(real, real.cumsum(0) - 1, -1)
    positions = torch.cat([positions_of(70, 0, 41), between[None]]).to(device)
    inputs = make_inputs(70, batch=3, device=device)
    inputs[4] = inputs[4].masked_fill((positions < 0)[..., None], -torch.inf)
    inputs[5] = inputs[5].masked_fill((positions < 0)[..., None], torch.nan)  # whatever is asked of a blind row
    assert_agrees(form, inputs, window=6, positions=positions)
    result = run(form, inputs, window=6, positions=torch.full_like(positions, -1), on="logit", hidden=True)
    assert (result == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bounds", [[0, 70], [0, 1, 33, 33, 64, 70], [0, 20, 51]])
@pytest.mark.parametrize("group", [1, 3])
def test_packed_documents_do_not_see_each_other(form, bounds, group, device):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    assert_agrees(form, make_inputs(70, group=group, batch=1, device=device), window=5, cu_seqlens=cu_seqlens)


def test_queries_split_among_programs_equal_the_whole(monkeypatch):
    monkeypatch.setattr(kernel, "MIN_QUERIES", 10)
    inputs = make_inputs(100, heads=1)
    assert_agrees("triton", inputs, window=8)
    assert_agrees("triton", inputs, window=8, positions=positions_of(100, 0, 33))


@settings(max_examples=10)
@given(st.data())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of a pair of two documents, which does not count
def test_property_rows_padded_and_packed_equal_rows_alone(form, data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=2, max_size=3))
    options = {"window": data.draw(st.integers(1, 12)), "hidden": data.draw(st.booleans()), "on": "logit"}
    rows = [make_inputs(length, heads=1, group=2, batch=1) for length in lengths]
    alone = [run(form, row, **options) for row in rows]
    longest = max(lengths)

    def padded(x: Tensor, n: int) -> Tensor:
        missing = longest - x.shape[1]
        filler = torch.randint(0, 9, (1, missing, *x.shape[2:])).to(x.dtype)
        return torch.cat([filler, x + missing if n == 6 else x], dim=1)

    inputs = [torch.cat([padded(row[n], n) for row in rows]) for n in range(7)]
    positions = positions_of(longest, *(longest - length for length in lengths))
    batched = run(form, inputs, positions=positions, **options)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = [torch.cat([row[n] for row in rows], dim=1) for n in range(6)]
    inputs.append(torch.cat([row[6] + start for row, start in zip(rows, bounds[:-1], strict=True)], dim=1))
    packed = run(form, inputs, cu_seqlens=bounds, **options)
    for row, (length, expected) in enumerate(zip(lengths, alone, strict=True)):
        assert_close("padded", batched[row, longest - length :], expected[0], GRADIENT[torch.float32])
        assert_close("packed", packed[0, bounds[row] : bounds[row + 1]], expected[0], GRADIENT[torch.float32])


def test_values_of_another_size_have_no_kernel():
    inputs = make_inputs(30)
    inputs[2], inputs[3] = torch.randn(2, 30, 2, 5), torch.randn(2, 30, 6, 5)
    assert_agrees("eager", inputs, window=4)
    with pytest.raises(ValueError, match="does not cover this call"):
        run("triton", inputs, window=4, on="value", hidden=False)


def test_carries_no_gradient_and_keeps_autocast_out():
    inputs = make_inputs(40)
    leaves = [x.requires_grad_() for x in inputs[:6]] + inputs[6:]
    expected = gate_gradient(*leaves, window=3, on="logit", hidden=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gate_gradient(*leaves, window=3, on="logit", hidden=True)
    assert not actual.requires_grad
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("form", ["eager", "triton"])
def test_half_precision_inputs_compute_in_fp32(form):
    assert_agrees(form, make_inputs(70, dtype=torch.float16), window=9)


def test_mistakes_are_named():
    inputs = make_inputs(5)
    options = {"window": 2, "on": "value", "hidden": False}
    for change, message in [
        ({"window": 0}, "window is 0"),
        ({"on": "key"}, "on is 'key'"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "one row"),
        ({"cu_seqlens": torch.tensor([0, 5]), "positions": positions_of(5, 0, 0)}, "give one of them"),
    ]:
        with pytest.raises(ValueError, match=message):
            gate_gradient(*inputs, **(options | change))
    names = ("k", "v", "output_gradient", "log_sum_exp", "delta", "exit_row")
    for n, name in enumerate(names, start=1):
        wrong = [*inputs[:n], inputs[n][:, 1:], *inputs[n + 1 :]]
        with pytest.raises(ValueError, match=f"{name} has shape"):
            gate_gradient(*wrong, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 60, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_every_tile_on_the_gpu(dtype, size, group):
    for time, window in ((1, 1), (65, 1), (1000, 129), (4096, 500)):
        inputs = make_inputs(time, 2, group, size, dtype=dtype, device="cuda")
        positions = positions_of(time, 0, time // 3, device="cuda")
        assert_agrees("triton", inputs, window=window, gates=GATES[::3])
        assert_agrees("triton", inputs, window=window, positions=positions, gates=GATES[::3])
        bounds = torch.tensor([0, time // 7, time // 2, time], device="cuda")
        assert_agrees("triton", [x[:1] for x in inputs], window=window, cu_seqlens=bounds, gates=GATES[::3])


@pytest.mark.gpu
def test_same_bits_twice_and_memory_that_grows_with_the_text():
    peaks = []
    for time in (16384, 32768):
        inputs = make_inputs(time, 2, 4, 64, batch=1, dtype=torch.bfloat16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first = gate_gradient(*inputs, window=512, on="logit", hidden=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.equal(first, gate_gradient(*inputs, window=512, on="logit", hidden=True))
    assert peaks[1] < 2.5 * peaks[0] < 32768 * 1000


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """600,000 tokens of 32 heads of 128 are more than 2**31 elements."""
    inputs = make_inputs(100, 32, 1, 128, batch=1, dtype=torch.bfloat16, device="cuda")
    options = {"window": 3, "on": "logit", "hidden": True}
    alone = run("triton", inputs, **options)
    long = [torch.zeros(1, 600_000, *x.shape[2:], dtype=x.dtype, device="cuda") for x in inputs]
    for whole, part in zip(long, inputs, strict=True):
        whole[:, -100:] = part
    long[-1][:, -100:] += 599_900
    bounds = torch.arange(0, 600_001, 100, device="cuda")
    assert_close(
        "last document", run("triton", long, cu_seqlens=bounds, **options)[:, -100:], alone, GRADIENT[torch.float32]
    )
