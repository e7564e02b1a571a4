"""On the GPU: every configuration of the table of tiles, in its dtype, at lengths around the tiles' edges."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from hybridize_kernels import retained_attention
from tests.kernels.retained_cases import Case, assert_kernels_agree, attention, plan


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize(
    ("size", "group"), [(64, 3), (64, 1), (96, 4), (128, 4), (128, 7), (256, 2), (32, 4), (32, 16)]
)
def test_every_tile_of_the_table(dtype: torch.dtype, time: int, size: int, group: int) -> None:
    case = Case(time, group=group, size=size, window=70, dtype=dtype, batch=1 if time >= 1000 else 2)
    if time > 1000:  # the reference's matrices
        case = replace(case, heads=1, time=min(time, 4 * 4097 // group))
    assert_kernels_agree(case)
    assert_kernels_agree(replace(case, budget=40, window=129))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("budget", [None, 100])
@pytest.mark.parametrize("layout", ["plain", "padded", "documents", "continued", "continued short"])
@pytest.mark.parametrize("positive", [0.0, 0.2, 1.0])
def test_every_layout(dtype: torch.dtype, budget: int | None, layout: str, positive: float) -> None:
    case = Case(700, size=64, window=90, budget=budget, layout=layout, positive=positive, prefix=80, dtype=dtype)
    assert_kernels_agree(case)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_the_largest_group(size: int) -> None:
    assert_kernels_agree(Case(65, heads=1, group=64, size=size, window=20, budget=12, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_other_gpus_than_hopper(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "is_hopper", lambda device: False)
    monkeypatch.setattr(attention, "plan_of", lru_cache(plan.Plan))
    assert_kernels_agree(Case(300, size=size, window=70, budget=40, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 256])
def test_a_long_text(budget: int | None) -> None:
    assert_kernels_agree(
        Case(4097, heads=1, group=3, size=64, window=300, budget=budget, batch=1, dtype=torch.bfloat16)
    )


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_gpu() -> None:
    inputs, options = Case(700, size=64, window=90, budget=50, dtype=torch.bfloat16).arguments()
    leaves = [x.requires_grad_() for x in inputs]
    retained_attention(*leaves, **options).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        retained_attention(*leaves, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
