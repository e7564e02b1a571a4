"""torch.compile leaves a call of a kernel as it is, and compiles what stands around it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridize_kernels import (
    attention_log_sum_exp,
    column_statistics,
    gated_delta_rule,
    retained_attention,
    retained_decode,
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


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


def inputs(device: str) -> list[Tensor]:
    return [torch.randn(1, TOKENS, heads, SIZE, device=device) for heads in (2 * HEADS, HEADS, HEADS)]


@pytest.mark.parametrize("call", [attend, statistics, score, decode, recurrent])
def test_a_compiled_call_is_the_same(call: Callable[..., Tensor], kernel_device: str) -> None:
    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q * 2, k, v) + 1

    given = inputs(kernel_device)
    with use_implementation("triton"), torch.no_grad():
        assert torch.equal(torch.compile(around, backend="eager")(*given), around(*given))


def test_a_compiled_call_has_the_same_gradient(kernel_device: str) -> None:
    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v).square().mean()

    given = [x.requires_grad_() for x in inputs(kernel_device)]
    with use_implementation("triton"):
        compiled = torch.autograd.grad(torch.compile(around, backend="eager")(*given), given)
        plain = torch.autograd.grad(around(*given), given)
    assert all(torch.equal(x, y) for x, y in zip(compiled, plain, strict=True))
