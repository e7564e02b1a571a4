"""A linear layer of a decoding step with norm, bias, activation and residual sum: every form against the equations."""

import json
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks import norm_linear as benchmark
from hybridize_kernels import norm_linear, use_implementation
from hybridize_kernels.launch import early_launches
from tests.kernels.tolerances import OUTPUT, assert_close

kernel = import_module("hybridize_kernels.norm_linear.kernel")
tiles = import_module("hybridize_kernels.norm_linear.tiles")
SMALL_TILES = "vector=4,32,2,1;matrix=16,32,2,2"

EVERYTHING = ("bias", "norm", "residual")
PARTS = [(), ("norm",), ("bias", "residual"), EVERYTHING, ("swiglu",), ("norm", "swiglu"), ("norm", "bias", "swiglu")]


def make_inputs(rows, outputs, size, parts=EVERYTHING, *, dtype=torch.float64, device="cpu", x_size=1.0):
    """x, weight and options; outputs are those of the op."""

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    weight_rows = 2 * outputs if "swiglu" in parts else outputs
    shape = (rows,) if isinstance(rows, int) else rows
    options = {
        "bias": draw(weight_rows) if "bias" in parts else None,
        "norm_weight": draw(size) if "norm" in parts else None,
        "epsilon": 1e-5 if "norm" in parts else None,
        "residual": draw(*shape, outputs) if "residual" in parts else None,
        "activation": "swiglu" if "swiglu" in parts else None,
    }
    return draw(*shape, size) * x_size, draw(weight_rows, size) / size**0.5, options


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def assert_agrees(form, x, weight, options, *, looser=1.0):
    """A form against the reference on the same numbers in fp64."""
    with use_implementation("reference"):
        expected = norm_linear(x.double(), weight.double(), **{name: wide(v) for name, v in options.items()})
    with use_implementation(form):
        found = norm_linear(x, weight, **options)
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    assert_close(form, found, expected, looser * OUTPUT[x.dtype])


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("rows", [1, (2, 3), 20])
def test_eager_equals_the_equations(parts, rows, device):
    assert_agrees("eager", *make_inputs(rows, 12, 20, parts, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, (3, 3), 16])
@pytest.mark.parametrize("parts", PARTS)
def test_the_kernel_equals_the_equations(parts, rows, dtype, kernel_device, monkeypatch):
    """Several tiles each way, the last ones of which are not full."""
    monkeypatch.setenv(tiles.VARIABLE, SMALL_TILES)
    assert_agrees("triton", *make_inputs(rows, 22, 80, parts, dtype=dtype, device=kernel_device))


@pytest.mark.parametrize("rows", [1, 5, 12])
@pytest.mark.parametrize(("outputs", "size"), [(1, 1), (32, 64), (7, 96), (33, 40), (4, 33), (50, 576)])
def test_the_table_has_tiles_for_every_shape(outputs, size, rows, kernel_device):
    for parts in (("norm",), ("norm", "swiglu")):
        assert_agrees("triton", *make_inputs(rows, outputs, size, parts, dtype=torch.float32, device=kernel_device))


@pytest.mark.parametrize("rows", [17, (3, 30)])
@pytest.mark.parametrize("parts", PARTS)
def test_many_rows_run_the_parts_kernels(parts, rows, kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "_at_once", None)
    assert_agrees("triton", *make_inputs(rows, 12, 20, parts, dtype=torch.float32, device=kernel_device))


def test_few_rows_are_one_launch(kernel_device, monkeypatch):
    monkeypatch.setattr(kernel, "_in_parts", None)
    launched = []
    launch = kernel.launch
    monkeypatch.setattr(
        kernel, "launch", lambda run, *rest, **options: launched.append(run) or launch(run, *rest, **options)
    )
    for rows in (1, kernel.MAX_ROWS):
        assert_agrees("triton", *make_inputs(rows, 12, 20, dtype=torch.float32, device=kernel_device))
    assert len(launched) == 2


def test_a_weight_of_another_dtype_runs_the_parts_kernels(kernel_device):
    x, weight, options = make_inputs(2, 12, 20, dtype=torch.float32, device=kernel_device)
    assert_agrees("triton", x, weight.double(), options | {"bias": options["bias"].half()})


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("x_size", [1e-4, 3e3])
def test_rows_far_from_one_keep_their_precision_in_fp16(x_size, rows, kernel_device):
    x, weight, options = make_inputs(rows, 12, 64, ("norm",), dtype=torch.float16, device=kernel_device, x_size=x_size)
    options |= {"norm_weight": 30 * options["norm_weight"], "epsilon": 1e-12}
    assert_agrees("triton", x, weight / 30, options)


@pytest.mark.parametrize("rows", [1, 3])
def test_norm_weight_and_bias_may_have_their_own_dtype(rows, kernel_device):
    x, weight, options = make_inputs(rows, 12, 64, dtype=torch.float16, device=kernel_device)
    options |= {"norm_weight": options["norm_weight"].float(), "bias": options["bias"].float()}
    assert_agrees("triton", x, weight, options)


@pytest.mark.parametrize("rows", [1, 3])
def test_inputs_are_read_where_they_lie(rows, kernel_device):
    x, weight, options = make_inputs(rows, 12, 64, dtype=torch.float32, device=kernel_device)
    apart = torch.cat((x, x), dim=1)[:, 64:], torch.cat((weight, weight), dim=1)[:, :64]
    moved = {
        "residual": torch.cat((options["residual"], x), dim=1)[:, :12],
        "norm_weight": options["norm_weight"].repeat_interleave(2)[::2],
        "bias": options["bias"].repeat_interleave(2)[::2],
    }
    assert kernel._rows(apart[0]).data_ptr() == apart[0].data_ptr()
    with use_implementation("triton"):
        assert torch.equal(norm_linear(*apart, **options | moved), norm_linear(x, weight, **options))
    assert_agrees("triton", x.T.contiguous().T, weight.T.contiguous().T, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_rounds_as_transformers_does(dtype):
    x, weight, options = make_inputs(3, 12, 20, ("norm", "swiglu"), dtype=dtype)
    norm = LlamaRMSNorm(20, eps=1e-5).to(dtype)
    norm.weight.data.copy_(options["norm_weight"])
    with torch.no_grad(), use_implementation("eager"):
        gate, up = F.linear(norm(x), weight).chunk(2, dim=-1)
        assert torch.equal(norm_linear(x, weight, **options), F.silu(gate) * up)


@pytest.mark.parametrize("form", ["eager", "triton", "reference"])
def test_there_is_no_gradient(form, kernel_device):
    x, weight, options = make_inputs(2, 12, 20, dtype=torch.float32, device=kernel_device)
    with use_implementation(form):
        assert not norm_linear(x.requires_grad_(), weight.requires_grad_(), **options).requires_grad


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_rows_give_no_results(shape, device):
    x, weight, options = make_inputs(shape, 12, 20, device=device)
    assert norm_linear(x, weight, **options).shape == (*shape, 12)


def test_a_compiled_call_is_the_same(kernel_device):
    x, weight, options = make_inputs(2, 12, 20, dtype=torch.float32, device=kernel_device)

    def around(x):
        return norm_linear(2 * x, weight, **options) + 1

    torch.compiler.reset()
    with use_implementation("triton"):
        assert torch.equal(torch.compile(around, backend="eager")(x), around(x))


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("size", [1, 60, 576, 1536, 4096, 14336])
def test_tiles_are_powers_of_two_that_warps_share(size, item_bytes, halves):
    for rows in (1, 2, 16):
        for outputs in (1, 576, 4096, 151936):
            tile = tiles.tile_of(rows, outputs, size, halves, item_bytes, None)
            assert all(n & (n - 1) == 0 for n in (tile.outputs, tile.width, tile.warps))
            assert rows == 1 or (tile.outputs >= 16 and tile.width // tile.warps >= 16)


def test_what_the_environment_says_wins():
    override = "matrix=16,64,2,3"
    assert tiles.tile_of(2, 100, 100, 1, 2, override) == tiles.Tile(16, 64, 2, 3)
    assert tiles.tile_of(1, 100, 100, 1, 2, override) == tiles.tile_of(1, 100, 100, 1, 2, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(6)}, r"x \[6\] and weight"),
        ({"x": torch.ones(2, 5)}, "x has shape"),
        ({"bias": torch.ones(3)}, "bias has shape"),
        ({"norm_weight": torch.ones(5), "epsilon": 1e-5}, "norm_weight has shape"),
        ({"residual": torch.ones(1, 4)}, "residual has shape"),
        ({"epsilon": 1e-5}, "together or not at all"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"activation": "swiglu", "residual": torch.ones(2, 4)}, "no residual"),
        ({"activation": "swiglu", "weight": torch.ones(5, 6)}, "two halves of 5 rows"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"norm_linear: .*{message}"):
        norm_linear(**{"x": torch.ones(2, 6), "weight": torch.ones(4, 6)} | change)


def test_the_benchmark_gives_rows_without_errors(tmp_path):
    with use_implementation("triton"):
        benchmark.main(["--tiny", "--cases", "smollm2_135m", "--out", str(tmp_path)])
    lines = (tmp_path / "norm_linear-smollm2_135m.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[3:]]
    assert [row for row in rows if "error" in row] == []
    assert {row["impl"] for row in rows} == {"ours", "parts", "torch linear alone"}
    assert len(rows) == 3 * len(benchmark.ROWS) * len(benchmark.TINY)
    assert max(row["rel_error"] for row in rows if "rel_error" in row) < 1e-5


@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize(("rows", "parts"), [(2, ("residual",)), (17, ("residual",)), (17, EVERYTHING)])
def test_the_residual_may_be_lost(form, rows, parts, kernel_device):
    x, weight, options = make_inputs(rows, 6, 12, parts, dtype=torch.float32, device=kernel_device)
    with use_implementation(form):
        expected = norm_linear(x, weight, **options)
        assert torch.equal(norm_linear(x, weight, overwrites_residual=True, **options), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize(
    ("outputs", "size", "parts"),
    [
        (960, 576, ("norm", "bias")),
        (1536, 576, ("norm", "swiglu")),
        (576, 1536, ("residual",)),
        (4096, 4096, ("norm", "residual")),
        (6144, 2048, ("norm", "bias", "swiglu")),
        (2048, 6144, EVERYTHING),
        (1001, 600, EVERYTHING),
    ],
)
def test_real_layers_on_the_gpu(outputs, size, parts, rows, dtype, early):
    """As the table has it, and with early launches; the same bits again, several times in a row."""
    x, weight, options = make_inputs(rows, outputs, size, parts, dtype=dtype, device="cuda")
    with early_launches() if early else nullcontext():
        assert_agrees("triton", x, weight, options)
        with use_implementation("triton"):
            first = norm_linear(x, weight, **options)
            assert all(torch.equal(norm_linear(x.clone(), weight, **options), first) for _ in range(10))
