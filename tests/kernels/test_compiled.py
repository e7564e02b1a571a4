"""torch.compile leaves a call of a kernel as it is, and compiles what stands around it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridize_kernels import (
    attention_log_sum_exp,
    column_statistics,
    gated_delta_rule,
    gated_rms_norm,
    retained_attention,
    retained_decode,
    short_convolution,
    short_convolution_step,
    token_scorer,
    use_implementation,
)

HEADS, SIZE, TOKENS = 2, 16, 20


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return retained_attention(q, k, v, k.sum(-1), window=5, budget=4)


def statistics(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return column_statistics(q, k, attention_log_sum_exp(q, k), window=5)[0]


def score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = ((HEADS, 3 * 2 * SIZE, SIZE), (HEADS, SIZE), (HEADS, SIZE, 1), (HEADS, 1))
    weight, bias, last, last_bias = (torch.randn(shape, generator=generator).to(k) for shape in shapes)
    real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    return token_scorer(k, v, (weight,), (bias,), last, last_bias, real, dilation=1)


def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = (torch.ones(1, HEADS, 5, SIZE, device=q.device) for _ in range(2))
    last = torch.full((1,), 3, dtype=torch.int32, device=q.device)
    return retained_decode(
        q[:, :1], k[:, :1], v[:, :1], keys, values, last, window=5, positions=(last + 1).long()[:, None]
    )


def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.zeros(1, HEADS, SIZE, SIZE, device=q.device)
    gate = torch.zeros(1, 1, HEADS, device=q.device)
    return gated_delta_rule(q[:, :1, :HEADS], k[:, :1], v[:, :1], gate - 0.1, gate + 0.5, initial_state=state)[0]


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gate = q.mean(-1)
    return gated_delta_rule(q, k, v, -gate.square(), gate.sigmoid(), normalize_qk=True, output_final_state=True)[0]


def convolve(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return short_convolution(q, torch.ones(2 * HEADS * SIZE, 4, device=q.device), activation="silu")[0]


def convolve_step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    taps = torch.ones(HEADS * SIZE, 4, device=q.device)
    tail = torch.zeros(1, 3, 2 * HEADS * SIZE, device=q.device)
    first, second = short_convolution_step((k[:, :1], v[:, :1]), (taps, taps), tail)
    return first + second + tail.sum()


def normalise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return gated_rms_norm(k, torch.ones(HEADS, SIZE, device=k.device), v)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def inputs(device: str) -> list[Tensor]:
    return [torch.randn(1, TOKENS, heads, SIZE, device=device) for heads in (2 * HEADS, HEADS, HEADS)]


@pytest.mark.parametrize(
    "call", [attend, statistics, score, decode, recurrent, chunked, convolve, convolve_step, normalise]
)
def test_a_compiled_call_is_the_same(call: Callable[..., Tensor], kernel_device: str) -> None:
    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q * 2, k, v) + 1

    given = inputs(kernel_device)
    with use_implementation("triton"), torch.no_grad():
        assert torch.equal(torch.compile(around, backend="eager")(*given), around(*given))


@pytest.mark.parametrize("call", [attend, chunked, convolve, normalise])
def test_a_compiled_call_has_the_same_gradient(call: Callable[..., Tensor], kernel_device: str) -> None:
    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q * 2, k * 3, v * 0.5).square().mean() + (q.mean() + k.mean() + v.mean())

    given = [x.requires_grad_() for x in inputs(kernel_device)]
    with use_implementation("triton"):
        compiled = torch.autograd.grad(torch.compile(around, backend="eager")(*given), given)
        plain = torch.autograd.grad(around(*given), given)
    assert all(torch.equal(x, y) for x, y in zip(compiled, plain, strict=True))
