"""Decoding steps of native sparse attention on the GPU: every size and group in its dtype, long contexts, graphs.

The kernels are compiled for each dtype, head size and group, which takes longer than to run them: the configurations
below are the fewest that see every group, every row of the table of tiles and every dtype.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from tests.kernels.native_sparse_decode_cases import Stream, compare, held

pytestmark = pytest.mark.gpu

launches = import_module("hybridize_kernels.native_sparse_decode.launches")

HALF = torch.bfloat16
SIZES = {
    HALF: [(1, 64), (2, 128), (3, 64), (4, 128), (7, 80), (16, 128), (32, 256), (64, 64)],
    torch.float16: [(1, 128), (8, 64), (16, 256)],
    torch.float32: [(3, 64), (4, 128), (2, 256)],
}
"""(query heads of a key head, head size) of each dtype."""
LENGTHS = (1, 63, 64, 65, 1000, 4097)
"""Tokens of each row after the first step."""


def test_every_row_of_the_table_is_run() -> None:
    rows = {launches.settings(size * dtype.itemsize) for dtype, of in SIZES.items() for _, size in of}
    assert rows == set(launches.SETTINGS.values())


@pytest.mark.parametrize(("dtype", "group", "size"), [(dtype, *of) for dtype, each in SIZES.items() for of in each])
def test_every_group_and_size(dtype: torch.dtype, group: int, size: int) -> None:
    stream = Stream(
        batch=3,
        steps=330,
        group=group,
        size=size,
        block=8,
        chosen=9,
        window=60,
        learned=True,
        dtype=dtype,
        device="cuda",
    )
    compare(stream, at=[*range(10), *range(20, 300, 37), *range(310, 330)])


def of_context(batch: int, steps: int, block: int, spare: int) -> Stream:
    return Stream(
        batch=batch,
        steps=steps,
        group=4,
        size=128,
        block=block,
        chosen=16,
        window=512,
        padding=0.0,
        spare=spare,
        dtype=HALF,
        device="cuda",
    )


def test_rows_of_every_awkward_length() -> None:
    stream = of_context(len(LENGTHS), steps=3, block=64, spare=max(LENGTHS))
    compare(stream, at=range(3), cache=stream.cache_behind(length - 1 for length in LENGTHS))


@pytest.mark.parametrize(
    ("batch", "tokens", "block", "steps"), [(1, 131_000, 16, 20), (1, 131_000, 64, 20), (40, 9_022, 64, 3)]
)
def test_a_long_context(batch: int, tokens: int, block: int, steps: int) -> None:
    """A block is completed on the way."""
    assert (tokens + steps) // block > tokens // block
    stream = of_context(batch, steps, block, spare=tokens)
    compare(stream, at=range(steps), cache=stream.cache_behind([tokens] * batch))


@pytest.mark.parametrize(("batch", "own_scratch"), [(1, True), (1, False), (140, True)])
def test_a_captured_graph_replays_what_the_steps_do(batch: int, own_scratch: bool) -> None:
    stream = Stream(batch=batch, steps=600, group=4, size=64, block=16, window=200, chosen=8, dtype=HALF, device="cuda")
    plain, captured = stream.empty_cache(), stream.empty_cache()
    sizes = launches.sizes_of(plain["keys"], stream.q.shape[2], **stream.options)
    assert (sizes.selected_splits > 1) == (batch == 1)
    first, count = 550, 40
    for step in range(first):
        stream.step(plain, step)
    before = {name: tensor.clone() for name, tensor in plain.items()}
    workspace: dict[str, Tensor] | None = None if own_scratch else {}
    stream.step({name: tensor.clone() for name, tensor in plain.items()}, first, workspace=workspace)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = [stream.step(captured, step, workspace=workspace) for step in range(first, first + count)]
    for _ in range(2):  # a second time from the same cache: nothing is left over from the first
        for name, tensor in captured.items():
            tensor.copy_(before[name])
        graph.replay()
        torch.cuda.synchronize()
    for n, out in enumerate(replayed):
        assert torch.equal(out, stream.step(plain, first + n))
    for name in plain:
        assert torch.equal(held(captured, stream.block, name), held(plain, stream.block, name)), name
