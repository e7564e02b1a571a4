"""Steps of short convolutions as decoding makes them: parts of one projection, and kernels that begin early."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from hybridize_kernels import short_convolution_step, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from hybridize_kernels.launch import early_launches
from hybridize_kernels.short_convolution import step
from tests.kernels.tolerances import OUTPUT, assert_close

HEADS = (3, 1, 2)


def make_layer(
    size: int, taps: int, batch: int, dtype: torch.dtype, device: str, heads: tuple[int, ...] = HEADS
) -> tuple[list[Tensor], Tensor]:
    """Filters and a tail."""
    weights = [(torch.randn(count * size, taps) * taps**-0.5).to(device, dtype) for count in heads]
    return weights, torch.randn(batch, taps - 1, sum(heads) * size).to(device, dtype)


def split_heads(wide: Tensor, size: int, heads: tuple[int, ...] = HEADS) -> list[Tensor]:
    """`[B, T, N]` -> `[B, T, H_i, D]` each, of the first numbers of a token."""
    widths = [count * size for count in heads]
    parts = wide[..., : sum(widths)].split(widths, dim=2)
    return [part.unflatten(2, (-1, size)) for part in parts]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a wider projection": lambda x: torch.cat((x, x[..., :7]), dim=2)[..., : x.shape[2]],
    "even rows": lambda x: torch.cat((x, x[..., :16]), dim=2)[..., : x.shape[2]],
    "part of a text": lambda x: torch.cat((x, x, x), dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels apart": lambda x: torch.stack((x, x), dim=3)[..., 0],
    "one row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("batch", "time", "size", "taps"), [(3, 1, 16, 4), (1, 1, 5, 2), (2, 4, 20, 3), (1, 3, 96, 16)]
)
def test_texts_are_read_where_they_lie(
    form: Implementation, layout: str, padding: bool, batch: int, time: int, size: int, taps: int, kernel_device: str
) -> None:
    weights, tail = make_layer(size, taps, batch, torch.float32, kernel_device)
    apart = LAYOUTS[layout](torch.randn(batch, time, sum(HEADS) * size).to(kernel_device))
    real = (torch.rand(batch, time) < 0.6).to(kernel_device) if padding else None
    other_tail = tail.clone()
    with use_implementation(form):
        ys = short_convolution_step(split_heads(apart, size), weights, tail, real, activation="silu")
        others = short_convolution_step(
            split_heads(apart.contiguous(), size), weights, other_tail, real, activation="silu"
        )
    assert form != "triton" or all(y.is_contiguous() for y in ys)
    assert all(torch.equal(y, other) for y, other in zip(ys, others, strict=True))
    assert torch.equal(tail, other_tail)


def test_parts_of_a_projection_are_not_copied(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(step, "launch", lambda kernel, grid, pointers, *rest, **constants: seen.extend(pointers))
    for batch, time in ((1, 1), (3, 1), (2, 4)):
        weights, tail = make_layer(16, 4, batch, torch.float32, kernel_device)
        xs = split_heads(torch.zeros(batch, time, 100, device=kernel_device), 16)
        seen.clear()
        with use_implementation("triton"):
            short_convolution_step(xs, weights, tail)
        assert [x.data_ptr() for x in seen[:3]] == [x.data_ptr() for x in xs]


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("time", [1, 3])
def test_padding_may_hold_anything(form: Implementation, time: int, kernel_device: str) -> None:
    weights, tail = make_layer(8, 4, 3, torch.float32, kernel_device)
    wide = torch.randn(3, time, 48).to(kernel_device)
    real = torch.ones(3, time, dtype=torch.bool, device=kernel_device)
    real[1] = False
    wide[1] = torch.nan
    before = tail.clone()
    with use_implementation(form):
        ys = short_convolution_step(split_heads(wide, 8), weights, tail, real)
    assert torch.equal(tail[1], before[1])
    for y in ys:
        assert not y[1].any()
        assert y.isfinite().all()


def test_token_by_token_leaves_the_tail_of_all_at_once(kernel_device: str) -> None:
    weights, tail = make_layer(12, 5, 2, torch.float32, kernel_device)
    wide = torch.randn(2, 9, 72).to(kernel_device)
    single = tail.clone()
    with use_implementation("triton"):
        whole = short_convolution_step(split_heads(wide, 12), weights, tail)
        steps = [short_convolution_step(split_heads(wide[:, t : t + 1], 12), weights, single) for t in range(9)]
    for y, parts in zip(whole, zip(*steps, strict=True), strict=True):
        assert_close("output", torch.cat(parts, dim=1), y, OUTPUT[torch.float32])
    assert torch.equal(single, tail)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("taps", [2, 4, 16])
@pytest.mark.parametrize(
    ("batch", "time", "heads", "size"),
    [(1, 1, (9, 3, 3), 64), (8, 1, (9, 3, 3), 64), (64, 1, (32, 8, 8), 128), (4, 5, (9, 3, 3), 64), (3, 1, (2, 1), 60)],
)
def test_a_chain_that_begins_early_has_the_same_bits(
    batch: int, time: int, heads: tuple[int, ...], size: int, taps: int, padding: bool, dtype: torch.dtype
) -> None:
    """Layers in a CUDA graph, each reading what the one before wrote, now and then a kernel of torch's between."""
    layers = [make_layer(size, taps, batch, dtype, "cuda", heads) for _ in range(12)]
    wide = torch.randn(batch, time, sum(heads) * size + 18).to("cuda", dtype)
    real = torch.rand(batch, time).cuda() < 0.7 if padding else None
    start = [tail.clone() for _, tail in layers]

    def chain() -> list[Tensor]:
        xs, outputs = split_heads(wide, size, heads), []
        for number, (weights, tail) in enumerate(layers):
            if number % 5 == 4:
                xs = [x / x.square().mean().sqrt() for x in xs]
            xs = list(short_convolution_step(xs, weights, tail, real, activation="silu"))
            outputs.extend(xs)
        return outputs

    with use_implementation("triton"):
        plain, early = (replays_of(chain, layers, start, early) for early in (False, True))
    assert all(x.isfinite().all() for x in plain)
    assert all(torch.equal(x, y) for x, y in zip(plain, early, strict=True))


def replays_of(
    chain: Callable[[], list[Tensor]], layers: list[tuple[list[Tensor], Tensor]], start: list[Tensor], early: bool
) -> list[Tensor]:
    """Outputs and tails after each of four replays."""
    with early_launches() if early else nullcontext():
        chain()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = chain()
    for (_, tail), before in zip(layers, start, strict=True):
        tail.copy_(before)
    seen = []
    for _ in range(4):
        graph.replay()
        seen.extend(x.clone() for x in (*outputs, *(tail for _, tail in layers)))
    return seen
