"""The gradient of a gate: every form against the whole matrix of weights, and that matrix against a loop by hand."""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import gate_gradient
from tests.kernels.gate_cases import GATES, assert_agrees, assert_near, make_inputs, positions_of, run
from tests.kernels.tolerances import GRADIENT

kernel = import_module("hybridize_kernels.gate_gradient.kernel")
tiles = import_module("hybridize_kernels.gate_gradient.tiles")

SMALL_TILES = "16,32,4,1"
FORMS = ["eager", "triton"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The interpreter's texts are short: several tiles of each kind only with small ones."""
    if not torch.cuda.is_available():
        monkeypatch.setenv(tiles.VARIABLE, SMALL_TILES)


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


@pytest.mark.parametrize("form", ["reference", *FORMS])
def test_the_largest_summand_is_that_of_the_query_that_a_key_matters_to_most(form):
    time, window = 9, 3
    inputs = make_inputs(time, heads=1, group=2, size=4, batch=1)
    largest = run(form, inputs, window=window, on="logit", hidden=True, largest=True)
    alone = torch.zeros(time)
    for query in range(time):
        for member in range(2):
            one = [x.clone() for x in inputs]
            for x in (one[3], one[5]):  # the gradients of all other rows
                kept = x[:, query, member].clone()
                x.zero_()
                x[:, query, member] = kept
            own = run(form, one, window=window, on="logit", hidden=True)[0, :, 0]
            alone = torch.maximum(alone, own.abs())
    torch.testing.assert_close(largest[0, :, 0], alone, atol=1e-6, rtol=1e-5)


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
    gates = GATES if device == "cpu" else GATES[::3]  # each of them is compiled
    assert_agrees(form, make_inputs(time, heads, group, size, device=device), window=window, gates=gates)


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
def test_hidden_keys_of_any_logit_have_a_weight_of_at_most_one(form, device):
    inputs = make_inputs(40, shown=0.0, device=device)
    inputs[4] -= 1e4
    inputs[4][:, ::2] += 2e4
    result = run(form, inputs, window=3, on="value", hidden=True)
    moved = torch.einsum("bthgd,bshd->bhgts", inputs[3].unflatten(2, (2, 3)), inputs[2])
    far = (torch.ones(40, 40).tril(-3) * (torch.arange(40) % 2)[:, None]).bool().to(device)
    assert_near("all of it", result, torch.where(far, moved, 0.0).sum((2, 3)).transpose(1, 2), 1e-5)


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
        assert_near("padded", batched[row, longest - length :], expected[0], GRADIENT[torch.float32])
        assert_near("packed", packed[0, bounds[row] : bounds[row + 1]], expected[0], GRADIENT[torch.float32])


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


def test_eager_in_fp64_is_exact_enough_to_be_a_standard():
    inputs = [x.double() for x in make_inputs(300, heads=1)[:-1]]
    exits = torch.randint(0, 301, (2, 300, 1))
    for on, hidden in GATES:
        results = [run(form, [*inputs, exits], window=20, on=on, hidden=hidden) for form in ("eager", "reference")]
        assert_near(f"{on}, hidden {hidden}", *results, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form, device):
    inputs = make_inputs(70, size=16, device=device)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    features_first = [x.movedim(-1, 1).contiguous().movedim(1, -1) for x in inputs]
    for moved in (heads_first, features_first):
        assert_agrees(form, moved, window=6, gates=GATES[3:])


LOW = [(torch.bfloat16, size, group) for size, group in ((16, 4), (64, 1), (64, 3), (96, 3), (128, 4), (256, 2))]
SINGLE = [(torch.float32, size, group) for size, group in ((60, 4), (128, 1), (256, 3))]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "size", "group"), [*LOW, *SINGLE, (torch.float16, 60, 3), (torch.float16, 128, 2)])
def test_every_tile_on_the_gpu(dtype, size, group):
    for time, window in ((65, 1), (300, 70)):
        inputs = make_inputs(time, 2, group, size, dtype=dtype, device="cuda")
        positions = positions_of(time, 0, time // 3, device="cuda")
        assert_agrees("triton", inputs, window=window, positions=positions, gates=GATES[::3])
        bounds = torch.tensor([0, time // 7, time // 2, time], device="cuda")
        assert_agrees("triton", [x[:1] for x in inputs], window=window, cu_seqlens=bounds, gates=GATES[::3])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "time", "window"), [(torch.bfloat16, 4096, 500), (torch.float32, 1000, 129)])
def test_a_long_text_on_the_gpu(dtype, time, window):
    inputs = make_inputs(time, 1, 3, 64, batch=1, dtype=dtype, device="cuda")
    assert_agrees("triton", inputs, window=window, standard="eager")


@pytest.mark.gpu
def test_same_bits_twice_and_memory_that_grows_with_the_text():
    peaks = []
    for time in (8192, 16384):
        inputs = make_inputs(time, 2, 3, 64, batch=1, dtype=torch.bfloat16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first = gate_gradient(*inputs, window=512, on="logit", hidden=True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert torch.equal(first, gate_gradient(*inputs, window=512, on="logit", hidden=True))
    assert peaks[1] < 2.5 * peaks[0] < 16384 * 1000, f"peaks of {peaks} bytes"


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """A text whose tokens lie so far from each other that the last ones are beyond 2**31 elements: 4 GiB in all."""
    time, apart = 520, 2**31 // 510 // 16 * 16
    inputs = make_inputs(time, 1, 2, 128, batch=1, dtype=torch.bfloat16, device="cuda")
    memory = torch.empty(time * apart, dtype=torch.bfloat16, device="cuda")
    spread, at = [], 0
    for x in inputs[:4]:
        spread.append(memory.as_strided(x.shape, (memory.numel(), apart, 128, 1), at).copy_(x))
        at += x[0, 0].numel()
    assert_agrees("triton", [*spread, *inputs[4:]], window=3, gates=GATES[3:])
