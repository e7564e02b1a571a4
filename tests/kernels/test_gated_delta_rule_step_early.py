"""Decoding steps of the gated delta rule that begin before the kernel before them has ended: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize_kernels import gated_delta_rule_step, norm_linear, short_convolution_step, use_implementation
from hybridize_kernels.launch import early_launches
from tests.kernels.step_cases import Steps

LAYERS = 10
REPLAYS = 4


def replays_of(chain: Callable[[], list[Tensor]], states: list[Tensor], early: bool) -> list[Tensor]:
    """Outputs and states after each of a few replays of one graph; the states start as they are now."""
    before = [state.clone() for state in states]
    with use_implementation("triton"), early_launches() if early else nullcontext():
        chain()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = chain()
    seen = []
    for state, start in zip(states, before, strict=True):
        state.copy_(start)
    for _ in range(REPLAYS):
        graph.replay()
        seen.extend(x.clone() for x in (*outputs, *states))
    for state, start in zip(states, before, strict=True):
        state.copy_(start)
    return seen


def assert_the_same_bits(chain: Callable[[], list[Tensor]], states: list[Tensor]) -> None:
    plain, early = (replays_of(chain, states, early) for early in (False, True))
    assert all(x.isfinite().all() for x in plain)
    assert all(torch.equal(x, y) for x, y in zip(plain, early, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("slots", [None, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("batch", "time", "heads", "size"), [(1, 1, 9, 64), (8, 1, 9, 64), (64, 1, 16, 128), (2, 1, 4, 256), (3, 4, 6, 96)]
)
def test_a_chain_of_steps(
    batch: int,
    time: int,
    heads: int,
    size: int,
    slots: torch.dtype | None,
    finish: bool,
    state_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    """Queries, keys, values and output gate of a layer are the output of the one before."""
    switches: dict[str, Any] = dict.fromkeys(("padding", "scale", "norm", "gate"), finish)
    steps = Steps(
        batch=batch, time=time, heads=(heads,) * 4, key=size, value=size, raw=True, slots=slots, dtype=dtype,
        state_dtype=state_dtype, device="cuda", **switches,
    )  # fmt: skip
    layers = [steps.arguments() for _ in range(LAYERS)]
    first = layers[0]
    if "real" in first:
        for layer in layers:
            layer["real"] = first["real"]
    cos, sin = (torch.randn(batch, time, size).to("cuda", dtype) for _ in range(2))

    def chain() -> list[Tensor]:
        outputs: list[Tensor] = []
        for number, layer in enumerate(layers):
            given = {**layer, "rotary": (cos, sin)} if finish else dict(layer)
            for name in ("log_decay", "beta"):
                given[name] = first[name]
            if outputs:
                given |= dict.fromkeys(("q", "k", "v"), outputs[-1])
                if finish:
                    given["gate"] = outputs[-1]
            if number == LAYERS // 2:
                given["v"] = given["v"] + 1  # a kernel of torch's between
            outputs.append(gated_delta_rule_step(**given))
        return outputs

    assert_the_same_bits(chain, [layer["state"] for layer in layers])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(("heads", "size"), [((9, 3, 3), 64), ((16, 4, 4), 128)])
def test_layers_as_a_model_has_them(heads: tuple[int, int, int], size: int, batch: int, dtype: torch.dtype) -> None:
    """Projection, convolution, step and output projection, on the residual stream."""
    states, width = heads[0], heads[0] * size
    sizes = [*(count * size for count in heads), states, states, width]
    real = torch.ones(batch, 1, dtype=torch.bool, device="cuda")
    real[batch // 2 :: 3] = batch == 1
    cos, sin = (torch.randn(batch, 1, size).to("cuda", dtype) for _ in range(2))
    x = draw(batch, width, dtype=dtype)
    layers = [Layer(sizes, heads, size, batch, dtype) for _ in range(LAYERS)]

    def chain() -> list[Tensor]:
        streams = [x]
        for layer in layers:
            streams.append(layer(streams[-1], real, (cos, sin)))
        return streams

    assert_the_same_bits(chain, [state for layer in layers for state in (layer.tail, layer.state)])


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to("cuda", dtype)


class Layer:
    """What a gated delta net does for one token of each row."""

    def __init__(
        self, sizes: list[int], heads: tuple[int, int, int], size: int, batch: int, dtype: torch.dtype
    ) -> None:
        states, width = heads[0], sizes[0]
        self.sizes, self.size = sizes, size
        self.inner = draw(sum(sizes), width, dtype=dtype, scale=width**-0.5)
        self.outer = draw(width, width, dtype=dtype, scale=width**-0.5)
        self.norm = 1 + draw(width, dtype=dtype, scale=0.1)
        self.taps = [draw(count * size, 4, dtype=dtype, scale=0.5) for count in heads]
        self.tail = draw(batch, 3, sum(heads) * size, dtype=dtype)
        self.state = torch.randn(batch, states, size, size, device="cuda")
        self.decay_rate, self.decay_bias = draw(states, dtype=torch.float32) - 2, draw(states, dtype=torch.float32)

    def __call__(self, x: Tensor, real: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        projected = norm_linear(x, self.inner, norm_weight=self.norm, epsilon=1e-5)[:, None]
        *parts, decay, beta, gate = projected.split(self.sizes, dim=2)
        xs = [part.unflatten(2, (-1, self.size)) for part in parts]
        q, k, v = short_convolution_step(xs, self.taps, self.tail, real)
        out = gated_delta_rule_step(
            q, k, v, decay, beta, self.state, scale=1.0, normalize_qk=True, decay_rate=self.decay_rate,
            decay_bias=self.decay_bias, beta_ceiling=2.0, real=real, norm_epsilon=1e-5,
            gate=gate.unflatten(2, (-1, self.size)), rotary=rotary,
        )  # fmt: skip
        return norm_linear(out.flatten(1), self.outer, residual=x)
