"""Decoding steps of retained attention: what they show, and the cache they leave, in every form."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import retained_attention, retained_decode, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from hybridize_kernels.retained_decode import kernel
from tests.kernels.tolerances import OUTPUT, assert_close


@dataclass
class Stream:
    """Random rows of a text, a step at a time: q `[B, steps, HQ, D]`, k and v `[B, steps, H, D]`, score
    `[B, steps, H]`, positions `[B, steps]`."""

    batch: int = 2
    steps: int = 24
    heads: int = 2
    group: int = 1
    size: int = 4
    window: int = 5
    sinks: int = 1
    budget: int = 3
    margin: int = 2
    scored: bool = True
    score_levels: int = 3
    padding: float = 0.2
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        def draw(heads: int) -> Tensor:
            return torch.randn(self.batch, self.steps, heads, self.size).to(self.dtype)

        # Few levels make ties; half of them are not kept.
        levels = torch.randint(-self.score_levels, self.score_levels + 1, (self.batch, self.steps, self.heads))
        real = torch.rand(self.batch, self.steps) >= self.padding
        self.device = "cpu"
        self.q, self.k, self.v = draw(self.heads * self.group), draw(self.heads), draw(self.heads)
        self.score = levels.float() / 8
        self.positions = torch.where(real, real.cumsum(1) - 1, -1)
        capacity = self.budget if self.scored else self.sinks
        slots = self.window + capacity
        # What lies in a slot that is not occupied must not show.
        self.cache: dict[str, Tensor] = {
            "keys": torch.full((self.batch, self.heads, slots, self.size), 99.0, dtype=self.dtype),
            "values": torch.full((self.batch, self.heads, slots, self.size), 99.0, dtype=self.dtype),
            "last_position": torch.full((self.batch,), -1, dtype=torch.int32),
        }
        if self.scored:
            self.cache |= {
                "scores": torch.zeros(self.batch, self.heads, slots),
                "retained_positions": torch.full((self.batch, self.heads, capacity), -1, dtype=torch.int32),
                "num_retained": torch.zeros(self.batch, self.heads, dtype=torch.int32),
            }

    def to(self, device: str) -> Stream:
        """The same numbers on that device."""
        self.device = device
        for name in ("q", "k", "v", "score", "positions"):
            setattr(self, name, getattr(self, name).to(device))
        self.cache = {name: tensor.to(device) for name, tensor in self.cache.items()}
        return self

    def empty_cache(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.cache.items()}

    def final_score(self, step: int) -> Tensor:
        """`[B, H]`: the score of the token `margin` before the one of this step, anything where there is none."""
        final = self.positions[:, step] - self.margin
        column = (self.positions == final[:, None]).int().argmax(1)
        return self.score[torch.arange(self.batch, device=self.device), column]

    def step(self, cache: dict[str, Tensor], step: int, **options: Any) -> Tensor:
        now = slice(step, step + 1)
        options |= cache
        if self.scored:
            options |= {"fresh_score": self.final_score(step), "margin": self.margin}
        return retained_decode(
            self.q[:, now],
            self.k[:, now],
            self.v[:, now],
            window=self.window,
            sinks=self.sinks,
            positions=self.positions[:, now],
            **options,
        )

    def whole(self) -> Tensor:
        """All steps at once, by the reference of the attention over the whole text."""
        with use_implementation("reference"):
            return retained_attention(
                self.q.double(),
                self.k.double(),
                self.v.double(),
                self.score if self.scored else None,
                window=self.window,
                sinks=self.sinks,
                budget=self.budget if self.scored else None,
                query_positions=self.positions,
                key_positions=self.positions,
            )


def check(stream: Stream, form: Implementation, *, state_as: Implementation | None = None) -> None:
    """Every step shows what the whole text shows; the cache equals that of another form bit for bit."""
    whole, cache, other = stream.whole(), stream.empty_cache(), stream.empty_cache()
    for step in range(stream.steps):
        with use_implementation(form):
            out = stream.step(cache, step)
        assert out.dtype == stream.dtype
        assert_close(f"step {step}", out, whole[:, step : step + 1], OUTPUT[stream.dtype])
        if state_as is not None:
            with use_implementation(state_as):
                stream.step(other, step)
            for name, tensor in cache.items():
                assert torch.equal(tensor, other[name]), f"{name} after step {step}"


streams = st.builds(
    Stream,
    heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 4]),
    window=st.integers(2, 7),
    sinks=st.integers(0, 2),
    budget=st.integers(2, 5),
    margin=st.integers(0, 2),
    score_levels=st.sampled_from([1, 3, 40]),
    padding=st.sampled_from([0.0, 0.3]),
)


@given(streams)
def test_the_reference_shows_what_attention_over_the_whole_text_shows(stream: Stream) -> None:
    check(stream, "reference")


@given(streams)
def test_eager_shows_the_same_and_keeps_the_same_cache(stream: Stream) -> None:
    check(stream, "eager", state_as="reference")


@pytest.mark.parametrize("form", ["reference", "eager"])
@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 4, 40])
def test_sinks_alone_need_no_scores(form: Implementation, sinks: int, window: int) -> None:
    check(Stream(scored=False, sinks=sinks, window=window), form)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [
        {"margin": 5},  # the score comes just as its token leaves the ring
        {"window": 1, "margin": 0},
        {"window": 30},  # nothing leaves
        {"sinks": 3, "budget": 3},  # no slot is left for a score
        {"sinks": 0, "budget": 0},
        {"padding": 1.0},
    ],
    ids=str,
)
def test_edges(form: Implementation, case: dict[str, Any]) -> None:
    check(Stream(steps=12, **case), form, state_as="eager")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(("heads", "group", "size"), [(2, 1, 16), (1, 3, 20), (1, 4, 8)])
def test_the_kernel_equals_eager(
    heads: int, group: int, size: int, scored: bool, splits: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    # Tiles of 16 slots, so that a few dozen slots are several tiles and splits.
    monkeypatch.setenv(kernel.SETTINGS_VARIABLE, f"16,4,2,{2 * heads * splits}")
    stream = Stream(
        steps=42, heads=heads, window=28, budget=5, sinks=5, margin=3, group=group, size=size, scored=scored
    ).to(device)
    assert kernel.num_splits(stream.cache["keys"]) == splits
    check(stream, "triton", state_as="eager")


def test_the_kernel_finds_the_lowest_of_many_tiles_of_scores(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(kernel, "MAX_SCORES", 2)
    check(Stream(steps=45, budget=7, window=3, score_levels=2, padding=0.0).to(device), "triton", state_as="eager")


def test_the_kernel_takes_positions_that_rows_share(device: str) -> None:
    stream = Stream(steps=9, padding=0.0).to(device)
    stream.positions = torch.arange(9, device=device).expand(2, -1)
    assert stream.positions.stride(0) == 0
    check(stream, "triton", state_as="eager")


def test_a_workspace_serves_every_step(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv(kernel.SETTINGS_VARIABLE, "16,4,2,8")
    stream = Stream(steps=6, window=20, group=3).to(device)
    workspace: dict[str, Tensor] = {}
    own, given_one = stream.empty_cache(), stream.empty_cache()
    with use_implementation("triton"):
        scratch: list[Tensor] = []
        for step in range(stream.steps):
            out = stream.step(given_one, step, workspace=workspace)
            assert torch.equal(out, stream.step(own, step))
            scratch += workspace.values()
        assert all(tensor is scratch[0] for tensor in scratch)
        wider = Stream(batch=3, steps=1, window=20, group=3, padding=0.0).to(device)
        check_one = wider.step(wider.empty_cache(), 0, workspace=workspace)
        assert_close("another batch", check_one, wider.whole(), OUTPUT[torch.float32])


def test_retained_scores_may_tie_or_be_infinite() -> None:
    stream = Stream(steps=40, sinks=2, padding=0.0)
    stream.score = torch.where(torch.rand(stream.score.shape) < 0.2, torch.inf, stream.score)
    whole, cache = stream.whole(), {form: stream.empty_cache() for form in IMPLEMENTATIONS}
    for step in range(stream.steps):
        for form, slots in cache.items():
            with use_implementation(form):
                out = stream.step(slots, step)
            assert_close(f"{form} step {step}", out, whole[:, step : step + 1], OUTPUT[torch.float32])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window"),
        ({"window": 9}, "window"),
        ({"sinks": 4}, "sinks"),
        ({"margin": 6}, "margin"),
        ({"scores": None}, "together"),
        ({"num_retained": torch.zeros(2, 3, dtype=torch.int32)}, "num_retained has shape"),
        ({"keys": torch.zeros(2, 8, 2, 4).transpose(1, 2)}, "contiguous"),
        ({"q": torch.zeros(2, 1, 3, 4)}, "multiple"),
        ({"q": torch.zeros(2, 2, 2, 4)}, r"\[batch, 1, query heads"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    stream = Stream()
    arguments = {
        "q": stream.q[:, :1],
        "k": stream.k[:, :1],
        "v": stream.v[:, :1],
        "window": 5,
        "sinks": 1,
        "positions": stream.positions[:, :1],
        **stream.cache,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        retained_decode(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("group", "size"), [(1, 64), (4, 64), (3, 80), (8, 128), (32, 256)])
@pytest.mark.parametrize("batch", [1, 70])
def test_the_kernel_on_a_gpu(group: int, size: int, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(size)
    stream = Stream(
        batch=batch,
        steps=420,
        heads=4,
        group=group,
        size=size,
        window=150,
        budget=130,
        sinks=4,
        margin=6,
        padding=0.1,
        dtype=dtype,
    ).to("cuda")
    exact = copy.copy(stream)  # the same cache, read in fp64
    exact.q, exact.k, exact.v = stream.q.double(), stream.k.double(), stream.v.double()
    cache, other = stream.empty_cache(), stream.empty_cache()
    tolerance = OUTPUT.get(dtype, OUTPUT[torch.bfloat16])
    for step in range(stream.steps):
        with use_implementation("triton"):
            out = stream.step(cache, step)
        with use_implementation("eager"):
            assert_close(f"step {step}", out, exact.step(other, step), tolerance)
        for name in cache if step % 60 == 59 else ():
            assert torch.equal(cache[name], other[name]), f"{name} after step {step}"


@pytest.mark.gpu
@pytest.mark.parametrize("own_scratch", [True, False])
@pytest.mark.parametrize("batch", [1, 140])
def test_a_captured_graph_replays_what_the_steps_do(batch: int, own_scratch: bool) -> None:
    stream = Stream(batch=batch, steps=160, group=4, size=64, window=100, budget=40, dtype=torch.bfloat16).to("cuda")
    assert (kernel.num_splits(stream.cache["keys"]) > 1) == (batch == 1)
    captured, plain = stream.empty_cache(), stream.empty_cache()
    first, count = 140, 5
    scores = [stream.final_score(step) for step in range(stream.steps)]  # found on the host's initiative, not captured
    stream.final_score = lambda step: scores[step]  # type: ignore[method-assign]
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
    for name, tensor in captured.items():
        assert torch.equal(tensor, plain[name]), name


def test_a_workspace_serves_batches_of_any_size(monkeypatch, device):
    """Two layouts of the scratch memory of the same size must not take each other's sums for counters."""
    monkeypatch.setenv(kernel.SETTINGS_VARIABLE, "16,4,2,41")
    workspace = {}
    for batch in (5, 11, 5):
        q, k, v = torch.randn(batch, 1, 1, 16), torch.randn(batch, 1, 1, 16), torch.randn(batch, 1, 1, 16)
        results = []
        for form in ("eager", "triton"):
            torch.manual_seed(batch)
            keys, values = torch.randn(batch, 1, 200, 16), torch.randn(batch, 1, 200, 16)
            state = [x.to(device) for x in (keys, values, torch.full((batch,), 200, dtype=torch.int32))]
            positions = torch.full((batch, 1), 201, device=device)
            with use_implementation(form):
                out = retained_decode(
                    *(x.to(device) for x in (q, k, v)),
                    *state,
                    window=200,
                    sinks=0,
                    positions=positions,
                    workspace=workspace,
                )
            results.append([out, *state])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
