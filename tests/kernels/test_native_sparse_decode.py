"""Decoding steps of native sparse attention: what they show, and the cache they leave, in every form."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import native_sparse_decode, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from tests.kernels.native_sparse_decode_cases import Stream, compare, held
from tests.kernels.tolerances import OUTPUT, assert_close

launches = import_module("hybridize_kernels.native_sparse_decode.launches")


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
    learned=st.booleans(),
    padding=st.sampled_from([0.0, 0.3]),
    spare=st.integers(0, 5),
)


@given(streams)
def test_the_reference_shows_what_attention_over_the_whole_text_shows(stream: Stream) -> None:
    check(stream, "reference")


@given(streams)
def test_eager_shows_the_same_and_keeps_the_same_cache(stream: Stream) -> None:
    check(stream, "eager")


@pytest.mark.parametrize(
    ("heads", "group", "size", "splits", "learned"),
    [(2, 1, 16, 3, True), (1, 3, 24, 3, False), (1, 4, 16, 3, False), (1, 3, 24, 1, True)],
)
def test_the_kernel_shows_the_same(
    heads: int, group: int, size: int, splits: int, learned: bool, monkeypatch: pytest.MonkeyPatch, kernel_device: str
) -> None:
    # Tiles of 16 slots, so that a few dozen slots are several tiles and splits.
    monkeypatch.setenv(launches.SETTINGS_VARIABLE, f"16,4,2,{2 * heads * splits}")
    stream = Stream(
        steps=70,
        heads=heads,
        group=group,
        size=size,
        block=2,
        chosen=20,
        window=40,
        learned=learned,
        padding=0.1,
        device=kernel_device,
    )
    sizes = launches.sizes_of(stream.empty_cache()["keys"], heads * group, **stream.options)
    assert (sizes.block_splits, sizes.window_splits, sizes.selected_splits) == (splits,) * 3
    check(stream, "triton", cache_as="eager", every=13 if kernel_device == "cpu" else 1)


EDGES: list[dict[str, Any]] = [
    {"block": 5, "chosen": 3, "learned": True},
    {"chosen": 1},  # the first, the previous and the current block come all the same
    {"block": 1, "chosen": 7, "learned": True},
    {"block": 60, "learned": True},  # no block is ever complete
    {"block": 30, "spare": 0},
    {"chosen": 40, "window": 100},  # everything is seen
    {"window": 1, "learned": True},
    {"dense_below": 17},
    {"dense_below": 100, "learned": True},
    {"padding": 1.0},
]


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_edges(form: Implementation, edge: dict[str, Any], kernel_device: str) -> None:
    device = kernel_device if form == "triton" else "cpu"
    stream = Stream(**{"steps": 33, "group": 3, "device": device} | edge)
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
        stream = Stream(
            batch=batch, steps=40, heads=1, size=16, window=40, chosen=10, padding=0.0, device=kernel_device
        )
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
    compare(stream, at=range(4, stream.steps, 7))


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
