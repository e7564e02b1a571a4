"""Decoding steps of native sparse attention: what they show, and the cache they leave, in every form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import native_sparse_attention, native_sparse_decode, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from tests.kernels.tolerances import OUTPUT, assert_close

launches = import_module("hybridize_kernels.native_sparse_decode.launches")


@dataclass
class Stream:
    """Random rows of a text, a step at a time: q `[B, steps, HQ, D]`, k and v `[B, steps, H, D]`, gates
    `[B, steps, HQ, 3]`, positions `[B, steps]`."""

    batch: int = 2
    steps: int = 40
    heads: int = 2
    group: int = 1
    size: int = 4
    block: int = 4
    chosen: int = 4
    window: int = 6
    dense_below: int = 0
    learned: bool = False
    padding: float = 0.2
    spare: int = 3
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape).to(self.dtype).to(self.device)

        each = self.batch, self.steps
        self.q = draw(*each, self.heads * self.group, self.size)
        self.k, self.v = (draw(*each, self.heads, self.size) for _ in range(2))
        self.gates = draw(*each, self.heads * self.group, 3).sigmoid()
        real = torch.rand(*each) >= self.padding
        self.positions = torch.where(real, real.cumsum(1) - 1, -1).to(self.device)
        pooling = draw(2, self.block, self.heads, self.size) / self.block
        self.pooling = {"key_pooling": pooling[0], "value_pooling": pooling[1]} if self.learned else {}

    @property
    def options(self) -> dict[str, Any]:
        return {
            "block_size": self.block,
            "num_selected_blocks": self.chosen,
            "window": self.window,
            "dense_below": self.dense_below,
        }

    def empty_cache(self) -> dict[str, Tensor]:
        """What lies in a slot that is not occupied must not show."""
        capacity = self.steps + self.spare

        def garbage(slots: int) -> Tensor:
            shape = self.batch, slots, self.heads, self.size
            return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

        return {
            "keys": garbage(capacity),
            "values": garbage(capacity),
            "compressed_k": garbage(capacity // self.block),
            "compressed_v": garbage(capacity // self.block),
            "lengths": torch.zeros(self.batch, dtype=torch.int32, device=self.device),
        }

    def at(self, step: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return tuple(x[:, step : step + 1].to(dtype or self.dtype) for x in (self.q, self.k, self.v, self.gates))

    def step(self, cache: dict[str, Tensor], step: int, **options: Any) -> Tensor:
        positions = self.positions[:, step : step + 1]
        return native_sparse_decode(
            *self.at(step), **cache, positions=positions, **{**self.options, **self.pooling, **options}
        )

    def whole(self) -> Tensor:
        """All steps at once, by the reference of the attention over the whole text."""
        with use_implementation("reference"):
            return native_sparse_attention(
                *(x.double() for x in (self.q, self.k, self.v, self.gates)),
                query_positions=self.positions,
                key_positions=self.positions,
                **self.options,
                **{name: weights.double() for name, weights in self.pooling.items()},
            )


def held(cache: dict[str, Tensor], block: int, name: str) -> Tensor:
    """A tensor of the cache with zeros where nothing lies."""
    tensor = cache[name]
    if name == "lengths":
        return tensor
    filled = cache["lengths"] // (block if name.startswith("compressed") else 1)
    occupied = torch.arange(tensor.shape[1], device=tensor.device) < filled[:, None]
    return tensor.masked_fill(~occupied[:, :, None, None], 0.0)


def check(stream: Stream, form: Implementation, *, cache_as: Implementation = "reference", every: int = 1) -> None:
    """Every step shows what the whole text shows; the cache is that of another form.

    Where the form takes `every` step only (the interpreter is slow), the other form takes those between.
    """
    whole, cache, other = stream.whole(), stream.empty_cache(), stream.empty_cache()
    workspace: dict[str, Tensor] = {}
    for step in range(stream.steps):
        with use_implementation(form if step % every == 0 else cache_as):
            out = stream.step(cache, step, workspace=workspace)
        assert out.dtype == stream.dtype
        assert_close(f"step {step}", out, whole[:, step : step + 1], OUTPUT[stream.dtype])
    for step in range(stream.steps):
        with use_implementation(cache_as):
            stream.step(other, step)
    for name in cache:
        ours, theirs = (held(x, stream.block, name) for x in (cache, other))
        if name.startswith("compressed"):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(ours, theirs), name


streams = st.builds(
    Stream,
    steps=st.just(30),
    heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4]),
    block=st.integers(1, 6),
    chosen=st.integers(1, 6),
    window=st.integers(1, 9),
    dense_below=st.sampled_from([0, 9, 50]),
    padding=st.sampled_from([0.0, 0.3]),
    spare=st.integers(0, 5),
)


@given(streams)
def test_the_reference_shows_what_attention_over_the_whole_text_shows(stream: Stream) -> None:
    check(stream, "reference")


@given(streams)
def test_eager_shows_the_same_and_keeps_the_same_cache(stream: Stream) -> None:
    check(stream, "eager")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("heads", "group", "size"), [(2, 1, 16), (1, 3, 24), (1, 4, 16)])
def test_the_kernel_shows_the_same(
    heads: int, group: int, size: int, splits: int, monkeypatch: pytest.MonkeyPatch, kernel_device: str
) -> None:
    # Tiles of 16 slots, so that a few dozen slots are several tiles and splits.
    monkeypatch.setenv(launches.SETTINGS_VARIABLE, f"16,4,2,{2 * heads * splits}")
    stream = Stream(
        steps=70, heads=heads, group=group, size=size, block=2, chosen=20, window=40, padding=0.1, device=kernel_device
    )
    sizes = launches.sizes_of(stream.empty_cache()["keys"], heads * group, **stream.options)
    assert (sizes.block_splits, sizes.window_splits, sizes.selected_splits) == (splits,) * 3
    check(stream, "triton", cache_as="eager", every=9 if kernel_device == "cpu" else 1)


CASES: list[dict[str, Any]] = [
    {"block": 5, "chosen": 3},
    {"chosen": 1},  # the first, the previous and the current block come all the same
    {"block": 1, "chosen": 7},
    {"block": 60},  # no block is ever complete
    {"block": 30, "spare": 0},
    {"chosen": 40, "window": 100},  # everything is seen
    {"window": 1},
    {"dense_below": 17},
    {"dense_below": 100},
    {"padding": 1.0},
]
with_pooling = pytest.mark.parametrize("learned", [False, True])


@with_pooling
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_edges(form: Implementation, case: dict[str, Any], learned: bool, kernel_device: str) -> None:
    device = kernel_device if form == "triton" else "cpu"
    stream = Stream(**{"steps": 33, "group": 3, "learned": learned, "device": device} | case)
    check(stream, form, cache_as="eager", every=5 if form == "triton" and device == "cpu" else 1)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_ties_choose_the_lower_block(form: Implementation, kernel_device: str) -> None:
    """Queries of zero give every block the same score; uniform weights over one-hot values show the choice."""
    device = kernel_device if form == "triton" else "cpu"
    stream = Stream(batch=1, steps=20, heads=1, size=20, block=2, chosen=5, window=1, padding=0.0, device=device)
    stream.q.zero_()
    stream.v.copy_(torch.eye(20)[None, :, None])
    stream.gates.copy_(torch.tensor([0.0, 1.0, 0.0]))
    cache, chosen = stream.empty_cache(), {}
    for step in range(stream.steps):
        with use_implementation(form if step in (0, 1, 9, 12, 18, 19) else "eager"):
            out = stream.step(cache, step)
        chosen[step] = sorted({int(j) // 2 for j in out[0, 0, 0].nonzero()})
    assert chosen[0] == chosen[1] == [0]
    assert chosen[9] == [0, 1, 2, 3, 4]
    assert chosen[12] == [0, 1, 2, 5, 6]
    assert chosen[18] == chosen[19] == [0, 1, 2, 8, 9]


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_position_without_a_slot_is_nan_and_writes_nothing(form: Implementation, kernel_device: str) -> None:
    stream = Stream(steps=8, spare=0, padding=0.0, device=kernel_device if form == "triton" else "cpu")
    cache = stream.empty_cache()
    with use_implementation("eager"):
        for step in range(stream.steps):
            stream.step(cache, step)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    stream.positions[0] += 1
    stream.positions[1] = -1
    with use_implementation(form):
        out = stream.step(cache, 7)
    assert out[0].isnan().all()
    assert (out[1] == 0).all()
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())


def test_a_workspace_serves_every_step_and_batches_of_any_size(
    monkeypatch: pytest.MonkeyPatch, kernel_device: str
) -> None:
    monkeypatch.setenv(launches.SETTINGS_VARIABLE, "16,4,2,12")
    workspace: dict[str, Tensor] = {}
    for batch in (1, 2, 1):
        stream = Stream(batch=batch, steps=40, size=16, window=40, chosen=10, padding=0.0, device=kernel_device)
        own, given_one, scratch = stream.empty_cache(), stream.empty_cache(), []
        for step in range(stream.steps):
            with use_implementation("triton" if step > 37 else "eager"):
                out = stream.step(given_one, step, workspace=workspace)
                assert torch.equal(out, stream.step(own, step))
            scratch += workspace.values()
        assert all(tensor is scratch[-1] for tensor in scratch[-2:])
        assert_close(f"batch of {batch}", out, stream.whole()[:, -1:], OUTPUT[torch.float32])


def test_the_kernel_in_half_precision(kernel_device: str) -> None:
    stream = Stream(steps=30, group=3, size=16, dtype=torch.float16, device=kernel_device)
    compare(stream, at=range(0, stream.steps, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window"),
        ({"block_size": 0}, "block_size"),
        ({"num_selected_blocks": 0}, "num_selected_blocks"),
        ({"q": torch.zeros(2, 2, 2, 4)}, r"\[batch, 1, query heads"),
        ({"q": torch.zeros(2, 1, 3, 4)}, "multiple"),
        ({"gates": torch.zeros(2, 1, 2, 2)}, "gates has shape"),
        ({"compressed_k": torch.zeros(2, 9, 2, 4)}, "compressed_k has shape"),
        ({"keys": torch.zeros(2, 2, 43, 4).transpose(1, 2)}, "contiguous"),
        ({"keys": torch.zeros(2, 0, 2, 4)}, "no slots"),
        ({"key_pooling": torch.zeros(4, 2, 4)}, "together"),
        ({"key_pooling": torch.zeros(3, 2, 4), "value_pooling": torch.zeros(3, 2, 4)}, "key_pooling has shape"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    stream = Stream()
    q, k, v, gates = stream.at(0)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "gates": gates,
        "positions": stream.positions[:, :1],
        **stream.empty_cache(),
        **stream.options,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        native_sparse_decode(**arguments)


def compare(stream: Stream, at: Iterable[int]) -> None:
    """The kernel at those steps against eager in fp64 on the same numbers, from caches that are the same before each.

    A pooled block may be rounded the other way; in the step that completes it, that is no matter of choice.
    """
    cache, workspace, chosen = stream.empty_cache(), {}, set(at)
    for step in range(stream.steps):
        if step not in chosen:
            with use_implementation("eager"):
                stream.step(cache, step)
            continue
        exact = {name: x.double() if x.is_floating_point() else x.clone() for name, x in cache.items()}
        with use_implementation("triton"):
            out = stream.step(cache, step, workspace=workspace)
        with use_implementation("eager"):
            wanted = native_sparse_decode(
                *stream.at(step, torch.float64),
                **exact,
                positions=stream.positions[:, step : step + 1],
                **stream.options,
                **{name: weights.double() for name, weights in stream.pooling.items()},
            )
        assert_close(f"step {step}", out, wanted, OUTPUT[stream.dtype])
        for name in cache:
            actual, expected = (held(x, stream.block, name) for x in (cache, exact))
            assert_close(f"{name} after step {step}", actual, expected, OUTPUT[stream.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("group", "size"),
    [(1, 64), (2, 128), (3, 64), (4, 128), (4, 256), (7, 80), (8, 128), (16, 128), (32, 256), (64, 64)],
)
def test_the_kernel_on_a_gpu(group: int, size: int, dtype: torch.dtype) -> None:
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
    compare(stream, at=[*range(10), *range(20, 300, 37), *range(300, 330)])


def fill(stream: Stream, cache: dict[str, Tensor], tokens: int) -> None:
    """Random tokens up to the slot `tokens` of every row, and their pooled blocks."""
    blocks = tokens // stream.block
    for name in ("keys", "values"):
        cache[name].normal_()
        pooled = (
            cache[name][:, : blocks * stream.block].unflatten(1, (blocks, stream.block)).mean(2, dtype=torch.float32)
        )
        cache[f"compressed_{name[0]}"][:, :blocks] = pooled
    cache["lengths"].fill_(tokens)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "tokens"), [(1, 131_000), (40, 9_000)])
@pytest.mark.parametrize("block", [16, 64])
def test_a_long_context_on_a_gpu(batch: int, tokens: int, block: int) -> None:
    stream = Stream(
        batch=batch,
        steps=70,
        group=4,
        size=128,
        block=block,
        chosen=16,
        window=512,
        padding=0.0,
        spare=tokens,
        dtype=torch.bfloat16,
        device="cuda",
    )
    cache = stream.empty_cache()
    fill(stream, cache, tokens)
    stream.positions += tokens
    exact = {name: x.double() if x.is_floating_point() else x.clone() for name, x in cache.items()}
    workspace: dict[str, Tensor] = {}
    for step in range(0, stream.steps) if batch == 1 else range(3):
        out = stream.step(cache, step, workspace=workspace)
        with use_implementation("eager"):
            wanted = native_sparse_decode(
                *stream.at(step, torch.float64),
                **exact,
                positions=stream.positions[:, step : step + 1],
                **stream.options,
            )
        assert_close(f"step {step}", out, wanted, OUTPUT[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("own_scratch", [True, False])
@pytest.mark.parametrize("batch", [1, 140])
def test_a_captured_graph_replays_what_the_steps_do(batch: int, own_scratch: bool) -> None:
    stream = Stream(
        batch=batch, steps=600, group=4, size=64, block=16, window=200, chosen=8, dtype=torch.bfloat16, device="cuda"
    )
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
