"""Decoding steps of retained attention that rotate queries and keys themselves, and read parts of one projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize_kernels import retained_decode, rotary, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from hybridize_kernels.retained_decode import kernel
from tests.kernels.tolerances import OUTPUT, assert_close

WINDOW, BUDGET, SINKS = 6, 4, 1


def tables_of(rows: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin `[rows, 1, size]`; the two halves differ, so that it shows which one a number gets."""
    angle = 3 * torch.randn(rows, 1, size)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def empty_cache(
    batch: int, heads: int, size: int, dtype: torch.dtype, device: str, window: int = WINDOW
) -> dict[str, Tensor]:
    rows, slots = (batch, heads), window + BUDGET
    cache = {
        "keys": torch.zeros(*rows, slots, size, dtype=dtype),
        "values": torch.zeros(*rows, slots, size, dtype=dtype),
        "scores": torch.zeros(*rows, slots),
        "retained_positions": torch.full((*rows, BUDGET), -1, dtype=torch.int32),
        "num_retained": torch.zeros(*rows, dtype=torch.int32),
        "last_position": torch.full((batch,), -1, dtype=torch.int32),
    }
    return {name: tensor.to(device) for name, tensor in cache.items()}


def assert_same(name: str, found: Tensor, expected: Tensor) -> None:
    """Bit for bit on a CPU. A GPU's compiler fuses one of two products with their sum, now this one and now that."""
    if found.device.type == "cpu" or not found.is_floating_point():
        assert torch.equal(found, expected), name
    else:
        assert_close(name, found, expected, OUTPUT[found.dtype])


def assert_steps_rotate_as_the_op(
    form: Implementation,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    *,
    heads: int = 2,
    group: int = 1,
    size: int = 16,
    rotated: int = 16,
    shared: bool = False,
    batch: int = 2,
    window: int = WINDOW,
    steps: int = 14,
    device: str = "cpu",
) -> None:
    """Outputs and caches of steps that rotate, against the op `rotary` before each step; q, k and v are one tensor."""
    own, expected = (empty_cache(batch, heads, size, dtype, device, window) for _ in range(2))
    for step in range(steps):
        projection = torch.randn(batch, 1, (group + 2) * heads * size).to(device, dtype)
        q, k, v = projection.unflatten(-1, (-1, size)).split((group * heads, heads, heads), dim=2)
        assert batch == 1 or not k.is_contiguous()
        cos, sin = tables_of(1 if shared else batch, rotated, table_dtype, device)
        positions = torch.full((batch, 1), step, device=device)
        options: dict[str, Any] = {
            "window": window,
            "sinks": SINKS,
            "positions": positions,
            "fresh_score": torch.randn(batch, heads, device=device),
            "margin": 2,
        }
        with use_implementation(form):
            out = retained_decode(q, k, v, **own, **options, rotary=(cos, sin))
            turned_q, turned_k = rotary(q, k, cos, sin)
            wanted = retained_decode(turned_q, turned_k, v.contiguous(), **expected, **options)
        assert not torch.equal(turned_k, k)
        assert out.dtype == dtype
        assert_same(f"output of step {step}", out, wanted)
        for name, tensor in own.items():
            assert_same(f"{name} after step {step}", tensor, expected[name])
    assert own["num_retained"].any()


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"heads": 1, "group": 3, "size": 20, "rotated": 8, "shared": True},
        {"group": 2, "size": 12, "rotated": 10},
        {"batch": 1, "heads": 1, "size": 6, "rotated": 2},
    ],
    ids=str,
)
def test_a_step_rotates_as_the_op_does(
    form: Implementation, dtype: torch.dtype, table_dtype: torch.dtype, case: dict[str, Any], kernel_device: str
) -> None:
    assert_steps_rotate_as_the_op(form, dtype, table_dtype, **case, device=kernel_device)


def test_every_split_rotates(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 slots each, the fewest of a GPU's matrix product."""
    monkeypatch.setenv(kernel.SETTINGS_VARIABLE, "16,4,2,16")
    assert kernel.num_splits(empty_cache(2, 2, 16, torch.float32, "cpu", window=36)["keys"]) == 3
    options: dict[str, Any] = {"group": 2, "rotated": 12, "window": 36, "steps": 44, "device": kernel_device}
    assert_steps_rotate_as_the_op("triton", torch.float32, torch.float32, **options)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_tables_may_be_rows_of_longer_ones(form: Implementation, kernel_device: str) -> None:
    """cos of one stride and sin of another, one row of angles for all texts, padding whose angles are anything."""
    batch, heads, size = 2, 2, 8
    cos, sin = tables_of(batch, 2 * size, torch.float32, kernel_device)
    cos[0], sin[0] = torch.nan, torch.nan
    cases = [(cos[..., :size], sin[..., size:]), (cos[1:, :, ::2], sin[1:, :, :size].clone())]
    q, k, v = (torch.randn(batch, 1, heads, size, device=kernel_device) for _ in range(3))
    positions = torch.tensor([[-1], [0]], device=kernel_device)
    for tables in cases:
        caches = [empty_cache(batch, heads, size, torch.float32, kernel_device) for _ in range(2)]
        with use_implementation(form):
            out = retained_decode(q, k, v, **caches[0], window=WINDOW, positions=positions, rotary=tables)
            turned = rotary(q, k, *(table.contiguous() for table in tables))
            wanted = retained_decode(*turned, v, **caches[1], window=WINDOW, positions=positions)
        assert_same("output", out, wanted)
        for name, tensor in caches[0].items():
            assert_same(name, tensor, caches[1][name])


@pytest.mark.parametrize("form", ["eager", "triton"])
def test_other_layouts_are_read_too(form: Implementation, kernel_device: str) -> None:
    batch, heads, size = 3, 2, 8
    by_head = [torch.randn(batch, heads, 1, 2 * size, device=kernel_device) for _ in range(3)]
    apart = [x.transpose(1, 2)[..., ::2] for x in by_head]
    outputs = []
    for q, k, v in (apart, [x.contiguous() for x in apart]):
        cache = empty_cache(batch, heads, size, torch.float32, kernel_device)
        positions = torch.zeros(batch, 1, dtype=torch.int64, device=kernel_device)
        with use_implementation(form):
            outputs.append(retained_decode(q, k, v, **cache, window=WINDOW, positions=positions))
        outputs.append(cache["keys"])
    assert_same("output", outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 1, 5), (2, 1, 5)), "cos has shape"),
        (((2, 1, 18), (2, 1, 18)), "cos has shape"),
        (((2, 3, 16), (2, 3, 16)), "cos has shape"),
        (((3, 1, 16), (3, 1, 16)), "cos has shape"),
        (((1, 16), (1, 16)), "cos has shape"),
        (((2, 1, 16), (1, 1, 16)), "sin has shape"),
    ],
    ids=str,
)
def test_tables_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    x = torch.zeros(2, 1, 2, 16)
    cache = empty_cache(2, 2, 16, torch.float32, "cpu")
    positions = torch.zeros(2, 1, dtype=torch.int64)
    cos, sin = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=f"retained_decode: {message}"):
        retained_decode(x, x, x, **cache, window=WINDOW, positions=positions, rotary=(cos, sin))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("group", "size", "rotated"), [(1, 64, 64), (4, 64, 64), (3, 96, 48), (8, 128, 128), (4, 256, 64)]
)
@pytest.mark.parametrize("batch", [1, 70])
def test_on_a_gpu_too(
    group: int, size: int, rotated: int, batch: int, dtype: torch.dtype, table_dtype: torch.dtype
) -> None:
    of = {"heads": 4, "group": group, "size": size, "rotated": rotated, "batch": batch, "device": "cuda"}
    assert_steps_rotate_as_the_op("triton", dtype, table_dtype, **of)
