"""Decoding steps of the gated delta rule that rotate queries and keys themselves, and read parts of one projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize_kernels import gated_delta_rule_step, rotary, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from tests.kernels.step_cases import Steps, copied


def tables_of(rows: int, time: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin `[rows, time, size]`; the two halves differ, so that it shows which one a number gets."""
    angle = 3 * torch.randn(rows, time, size)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def assert_steps_rotate_as_the_op(
    steps: Steps, form: Implementation, tables: tuple[Tensor, Tensor], **changes: Any
) -> None:
    """A step that rotates, against the op `rotary` before the step."""
    given = steps.arguments() | changes
    other = copied(given)
    with use_implementation(form):
        out = gated_delta_rule_step(**given, rotary=tables)
        other["q"], other["k"] = rotary(other["q"], other["k"], *tables)
        wanted = gated_delta_rule_step(**other)
    assert out.dtype == steps.dtype
    assert torch.equal(out, wanted), steps
    assert torch.equal(given["state"], other["state"]), steps


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("time", "key", "rotated", "shared"), [(1, 16, 16, False), (1, 20, 8, True), (5, 12, 10, False), (3, 16, 2, True)]
)
def test_a_step_rotates_as_the_op_does(
    form: Implementation,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    normalize: bool,
    time: int,
    key: int,
    rotated: int,
    shared: bool,
    kernel_device: str,
) -> None:
    steps = Steps(
        time=time, heads=(4, 2, 2, 4), key=key, value=key, dtype=dtype, normalize=normalize, raw=True, padding=True,
        slots=torch.int32, norm=True, gate=True, strided=True, device=kernel_device,
    )  # fmt: skip
    tables = tables_of(1 if shared else steps.batch, time, rotated, table_dtype, kernel_device)
    assert_steps_rotate_as_the_op(steps, form, tables)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_tables_may_be_parts_of_longer_ones(form: Implementation, kernel_device: str) -> None:
    steps = Steps(time=2, key=8, value=8, device=kernel_device)
    cos, sin = tables_of(steps.batch, 6, 16, torch.float32, kernel_device)
    assert_steps_rotate_as_the_op(steps, form, (cos[:, 3:5, :8], sin[:, 3:5, 8:]))
    assert_steps_rotate_as_the_op(steps, form, (cos[:, :2, ::2], sin[:, :2, :8].clone()))


@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize("time", [1, 3])
def test_every_input_may_be_a_part_of_one_projection(form: Implementation, time: int, kernel_device: str) -> None:
    steps = Steps(time=time, heads=(4, 2, 2, 4), key=8, value=8, gate=True, padding=True, device=kernel_device)
    given = steps.arguments()
    names = ("q", "k", "v", "log_decay", "beta", "gate")
    widths = [given[name].flatten(2).shape[2] for name in names]
    wide = torch.cat([given[name].flatten(2) for name in names], dim=2)
    parts = dict(zip(names, wide.split(widths, dim=2), strict=True))
    for name in ("q", "k", "v", "gate"):
        parts[name] = parts[name].unflatten(2, (-1, 8))
    apart = copied(given) | parts
    assert not any(apart[name].is_contiguous() for name in names)
    with use_implementation(form):
        assert torch.equal(gated_delta_rule_step(**apart), gated_delta_rule_step(**given))
    assert torch.equal(apart["state"], given["state"])


@pytest.mark.parametrize("form", ["eager", "triton"])
def test_other_layouts_are_read_too(form: Implementation, kernel_device: str) -> None:
    given = Steps(time=3, heads=(4, 2, 2, 4), key=8, value=8, gate=True, device=kernel_device).arguments()
    apart = copied(given)
    for name in ("q", "k", "v", "gate", "log_decay", "beta"):
        apart[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    with use_implementation(form):
        assert torch.equal(gated_delta_rule_step(**apart), gated_delta_rule_step(**given))
    assert torch.equal(apart["state"], given["state"])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 1, 5), (3, 1, 5)), "cos has shape"),
        (((3, 1, 14), (3, 1, 14)), "cos has shape"),
        (((3, 2, 12), (3, 2, 12)), "cos has shape"),
        (((2, 1, 12), (2, 1, 12)), "cos has shape"),
        (((3, 1, 12), (1, 1, 12)), "sin has shape"),
    ],
    ids=str,
)
def test_tables_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    cos, sin = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=f"gated_delta_rule_step: {message}"):
        gated_delta_rule_step(**Steps().arguments(), rotary=(cos, sin))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "rotated"), [(64, 64), (96, 48), (128, 128), (256, 64)])
def test_on_a_gpu_too(size: int, rotated: int, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    """Bit for bit: sums and products are fused there."""
    for batch, time, finish in ((1, 1, False), (1, 1, True), (40, 1, True), (5, 7, True)):
        steps = Steps(
            batch=batch, time=time, heads=(8, 4, 4, 8), key=size, value=size, dtype=dtype, raw=True, norm=finish,
            gate=finish, strided=True, device="cuda",
        )  # fmt: skip
        assert_steps_rotate_as_the_op(steps, "triton", tables_of(batch, time, rotated, table_dtype, "cuda"))
