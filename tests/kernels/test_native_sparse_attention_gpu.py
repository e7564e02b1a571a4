"""Native sparse attention on the GPU: every size and group in its dtype, long texts, and what a training step needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hybridize_kernels import native_sparse_attention
from tests.kernels.native_sparse_cases import Case, assert_kernels_agree, op_of, smallest_gap
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, outputs_and_gradients

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = ["plain", "padded left", "padded middle", "lengths left", "lengths middle", "documents"]
SIZES = [(1, 64), (2, 128), (3, 64), (4, 128), (7, 64), (8, 128), (16, 64), (16, 256), (32, 128), (4, 256), (1, 256)]
"""(query heads of a key head, head size)"""
CONFIGURATIONS = [
    *((HALF, *size) for size in SIZES),
    *((torch.float16, *size) for size in [(1, 64), (3, 128), (16, 128), (4, 256)]),
    *((torch.float32, *size) for size in [(1, 128), (3, 64), (4, 128), (16, 64), (2, 256)]),
]


def of_layout(layout: str, **change: object) -> Case:
    """700 tokens, with 500 earlier ones where the layout has room for them."""
    past = 500 if layout == "plain" or layout.startswith("lengths") else 0
    case = Case(700, size=64, block_size=64, selected=5, window=90, layout=layout, past=past, dtype=HALF, batch=3)
    return replace(case, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("time", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize(("dtype", "group", "size"), CONFIGURATIONS)
def test_every_group_and_size(dtype: torch.dtype, time: int, group: int, size: int) -> None:
    assert_kernels_agree(
        Case(time, heads=2, group=group, size=size, block_size=64, window=70, dtype=dtype, batch=1 if time > 100 else 2)
    )


@pytest.mark.parametrize(
    ("dtype", "group", "size", "selected"),
    [
        (torch.bfloat16, 1, 64, 4),
        (torch.bfloat16, 3, 64, 16),
        (torch.bfloat16, 4, 128, 16),
        (torch.bfloat16, 16, 128, 4),
        (torch.bfloat16, 2, 256, 16),
        (torch.float16, 3, 64, 4),
        (torch.float16, 4, 128, 4),
        (torch.float32, 4, 128, 16),
        (torch.float32, 2, 256, 4),
    ],
)
def test_a_long_text(dtype: torch.dtype, group: int, size: int, selected: int) -> None:
    """Few, as the reference takes several gigabytes for each, and tests run side by side."""
    case = Case(
        4097,
        heads=1 if group > 4 else 2,
        group=group,
        size=size,
        block_size=64,
        selected=selected,
        window=512,
        dtype=dtype,
        batch=1,
    )
    assert_kernels_agree(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compression", ["mean", "learned"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(dtype: torch.dtype, compression: str, layout: str) -> None:
    assert_kernels_agree(of_layout(layout, dtype=dtype, compression=compression))
    assert_kernels_agree(of_layout(layout, dtype=dtype, compression=compression, dense_below=300, group=3))


@pytest.mark.parametrize("layout", ["plain", "lengths left"])
@pytest.mark.parametrize("group", [1, 4])
def test_a_kept_compression(layout: str, group: int) -> None:
    assert_kernels_agree(of_layout(layout, compression="kept", group=group))


@pytest.mark.parametrize(
    ("block_size", "group", "size"),
    [
        (size, *of)
        for size in (16, 32, 128)
        for of in ((3, 64), (4, 128), (16, 128), (2, 256))
        if size * of[1] <= 64 * 256
    ],
)
def test_other_blocks(block_size: int, group: int, size: int) -> None:
    assert_kernels_agree(
        Case(900, heads=1, group=group, size=size, block_size=block_size, selected=5, window=100, dtype=HALF, batch=2)
    )


@pytest.mark.parametrize("window", [1, 5, 64, 4096])
def test_windows(window: int) -> None:
    assert_kernels_agree(Case(1000, group=4, size=64, block_size=64, window=window, dtype=HALF, batch=1))


def test_the_largest_group() -> None:
    assert_kernels_agree(Case(400, heads=1, group=64, size=128, block_size=64, window=70, dtype=HALF, batch=1))


@pytest.mark.parametrize("size", [80, 96])
def test_head_sizes_with_room_to_the_next_power_of_two(size: int) -> None:
    assert_kernels_agree(Case(500, heads=1, group=3, size=size, block_size=64, window=70, dtype=HALF, batch=2))


def test_the_cases_leave_something_to_choose() -> None:
    for case in (
        Case(4097, heads=1, group=3, size=64, block_size=64, selected=16, dtype=HALF, batch=1),
        of_layout("padded middle"),
        of_layout("lengths left"),
    ):
        inputs, options = case.arguments()
        assert smallest_gap(case, inputs, options).isfinite().float().mean() > 0.2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "size"), [(3, 64), (4, 128), (16, 128)])
def test_every_block_selected_is_dense_attention(dtype: torch.dtype, group: int, size: int) -> None:
    case = Case(1000, heads=2, group=group, size=size, block_size=64, selected=16, dtype=dtype, batch=2)
    inputs, options = case.arguments()
    inputs[3] = torch.tensor([0, 1, 0], dtype=dtype, device="cuda").expand(inputs[3].shape)

    def dense(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        output = F.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)
        return output + 0 * gates.sum()

    outputs, gradients = outputs_and_gradients("triton", op_of(case, options), inputs)
    expected, expected_gradients = outputs_and_gradients("eager", dense, [x.double() for x in inputs])
    assert_close("output", outputs[0], expected[0], OUTPUT[dtype])
    for name, x, y in zip(("dq", "dk", "dv"), gradients, expected_gradients, strict=False):
        assert_close(name, x, y, GRADIENT[dtype])


@pytest.mark.parametrize("group", [1, 4, 16])
def test_a_random_text_has_the_same_bits_every_time(group: int) -> None:
    shape = (2, 3000, 2 * group, 128)
    q, k, v = torch.randn(shape), torch.randn(2, 3000, 2, 128), torch.randn(2, 3000, 2, 128)
    inputs = [x.to("cuda", HALF) for x in (q, k, v, torch.rand(*shape[:3], 3))]

    def op(*given: Tensor) -> Tensor:
        return native_sparse_attention(*given, block_size=64, num_selected_blocks=16, window=512)

    first = outputs_and_gradients("triton", op, inputs)
    for _ in range(3):
        again = outputs_and_gradients("triton", op, inputs)
        assert all(torch.equal(x, y) for x, y in zip(first[0] + first[1], again[0] + again[1], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_call_does_not_wait_for_the_gpu(layout: str) -> None:
    case = of_layout(layout)
    inputs, options = case.arguments()
    op = op_of(case, options)
    leaves = [x.requires_grad_() for x in inputs]
    op(*leaves).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*leaves).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_of_a_training_step(layout: str) -> None:
    """A replay sees the numbers, positions, lengths and bounds of its own time."""
    case = of_layout(layout, compression="learned", batch=2)
    inputs, options = case.arguments()
    held = [x.clone().requires_grad_() for x in inputs]
    tables = {name: x.clone() for name, x in options.items() if isinstance(x, Tensor)}
    if "key_positions" in tables:
        tables["key_positions"] = tables["query_positions"]  # the same tensor: a promise
    op = op_of(case, options | tables)
    direction = torch.randn(inputs[0].shape, device="cuda").to(HALF)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(op(*held), held, direction)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = op(*held)
        gradients = torch.autograd.grad(output, held, direction)

    torch.manual_seed(1)
    others, other_options = case.arguments()
    if layout == "documents":
        other_options["cu_seqlens"] = other_options["cu_seqlens"].sub(1).clamp(0)  # type: ignore[attr-defined]
        other_options["cu_seqlens"][-2:] = case.time
    if layout == "padded left":
        shifted = other_options["query_positions"].sub(9).clamp(-1)  # type: ignore[attr-defined]
        other_options |= {"query_positions": shifted, "key_positions": shifted}
    if layout.startswith("lengths"):
        shorter = torch.where(other_options["query_positions"] >= 0, other_options["query_positions"] - 9, -1)
        other_options |= {"query_positions": shorter, "key_lengths": other_options["key_lengths"] - 9}
    with torch.no_grad():
        for x, y in zip(held, others, strict=True):
            x.copy_(y)
        for name, table in tables.items():
            if name != "key_positions":
                table.copy_(other_options[name])
    graph.replay()
    leaves = [x.requires_grad_() for x in others]
    expected = op_of(case, other_options)(*leaves)
    assert torch.equal(output, expected)
    for name, x, y in zip(case.names, gradients, torch.autograd.grad(expected, leaves, direction), strict=True):
        assert torch.equal(x, y), name
