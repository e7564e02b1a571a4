"""Rows of measurements: with a stand-in that keeps count, and with the real implementations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.errors import CheckpointError
from hybridize.inference.bench.clock import Effort, weight_bytes
from hybridize.inference.bench.implementations import Implementation, dense, engine
from hybridize.inference.bench.limits import largest_batch, long_prefill
from hybridize.inference.bench.measure import Case, measure
from hybridize.mixers.registry import config_class
from hybridize.model.swap import swap
from tests.tiny import tiny_teacher

QUICK = Effort(steps=2, seconds=0.0, repeats=2, warm_reads=0, read_seconds=0.0, read_repeats=1)


class StandIn:
    """Decodes nothing; writes down what it is asked for, and has memory for so many tokens."""

    def __init__(self, log: list[Any], name: str, batch: int, context_tokens: int, memory_tokens: int) -> None:
        self.log, self.name, self.batch, self.context_tokens = log, name, batch, context_tokens
        if batch * context_tokens > memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate all of it")
        self.length = 0
        self.note("make")

    def note(self, what: str, *numbers: int) -> None:
        self.log.append((self.name, what, *numbers))

    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        assert len(texts) == self.batch
        self.length += len(texts[0])
        self.note("read", len(texts[0]))
        return torch.zeros(self.batch, 7)

    def run(self, steps: int) -> None:
        self.length += steps
        assert self.length <= self.context_tokens
        self.note("run", steps)

    def pretend(self, tokens: int) -> None:
        self.length = tokens

    def reset(self) -> None:
        self.length = 0

    def state_bytes(self) -> int:
        return 10 * self.context_tokens


def stand_in(log: list[Any], name: str, memory_tokens: int = 10**6) -> Implementation:
    model = SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(vocab_size=7),
    )
    return Implementation(name, model, lambda batch, context: StandIn(log, name, batch, context, memory_tokens))


def tiny_hybrid() -> Any:
    eviction = config_class("token_eviction")(window_tokens=14, sink_tokens=2, budget_tokens=8)  # type: ignore[call-arg]
    return swap(tiny_teacher(), [eviction, config_class("gated_delta_net")()] * 2)


def test_takes_turns_twice_and_keeps_both_times() -> None:
    log: list[Any] = []
    ways = [stand_in(log, "a"), stand_in(log, "b")]
    rows = list(measure(ways, [Case(2, 40), Case(3, 40)], prefill_limit_tokens=100, effort=QUICK))
    assert [name for name, what, *_ in log if what == "make"] == list("abab" * 2)
    assert [(row["impl"], row["pass"], row["case"]["B"]) for row in rows] == [
        *(("a", "prefill", 2), ("a", "decode", 2), ("b", "prefill", 2), ("b", "decode", 2)),
        *(("a", "decode", 3), ("b", "decode", 3)),  # 3 × 40 are more than are read
    ]
    first, step = rows[:2]
    assert list(first) == ["impl", "case", "pass", "ms", "again_ms", "tokens_per_s", "peak_bytes", "state_bytes"]
    assert first["tokens_per_s"] == pytest.approx(80 / first["ms"] * 1e3)
    assert step["tokens_per_s"] == pytest.approx(2 / step["ms"] * 1e3)
    assert step["case"] == {"B": 2, "context": 40}
    assert (step["state_bytes"], step["peak_bytes"]) == (400, None)


def test_steps_are_as_many_as_take_time_and_end_at_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybridize.inference.bench import measure as module

    def a_millisecond_a_step(work: Any, device: torch.device) -> float:
        work()
        return 1e-3 * log[-1][2]

    log: list[Any] = []
    monkeypatch.setattr(module, "seconds_of", a_millisecond_a_step)
    effort = Effort(steps=8, seconds=0.02, repeats=3, warm_reads=0, read_seconds=0.0, read_repeats=1)
    (row,) = measure([stand_in(log, "a")], [Case(4, 1600)], prefill_limit_tokens=0, effort=effort)
    assert [entry[2] for entry in log if entry[1] == "run"] == [8, 8, 20, 20, 20, 20] * 2
    assert row["ms"] == row["again_ms"] == pytest.approx(1.0)
    log.clear()
    list(measure([stand_in(log, "a")], [Case(1, 4)], prefill_limit_tokens=0, effort=effort))
    assert {entry[2] for entry in log if entry[1] == "run"} == {2}  # a text of 4 tokens has no more


def test_what_runs_out_of_memory_is_a_row_and_is_not_tried_again() -> None:
    log: list[Any] = []
    ways = [stand_in(log, "small", 100), stand_in(log, "large")]
    rows = list(measure(ways, [Case(4, 40)], prefill_limit_tokens=10**6, effort=QUICK))
    failed = [row for row in rows if row["impl"] == "small"]
    assert [(row["pass"], row["error"]) for row in failed] == [
        ("prefill", "out of memory"),
        ("decode", "out of memory"),
    ]
    assert "ms" not in failed[0]
    assert {row["pass"] for row in rows if "again_ms" in row} == {"prefill", "decode"}


def test_other_errors_end_it_unless_forgiven() -> None:
    def make(batch: int, context: int) -> Any:
        raise ValueError("no such kernel\nand a long story")

    way = Implementation("broken", stand_in([], "").model, make)
    with pytest.raises(ValueError, match="kernel"):
        list(measure([way], [Case(1, 8)], prefill_limit_tokens=0, effort=QUICK))
    (row,) = measure([way], [Case(1, 8)], prefill_limit_tokens=0, effort=QUICK, forgiven=lambda error: True)
    assert row == {
        "impl": "broken",
        "case": {"B": 1, "context": 8},
        "pass": "decode",
        "error": "ValueError: no such kernel",
    }


@pytest.mark.parametrize("memory", [10, 40, 45, 1230, 3999, 99_000])
@pytest.mark.parametrize("free", [None, 400, 12_000, 50_000])
def test_the_largest_batch_is_found_in_few_attempts(memory: int, free: int | None, monkeypatch: Any) -> None:
    from hybridize.inference.bench import limits

    monkeypatch.setattr(limits, "free_bytes", lambda device: free)
    monkeypatch.setattr(limits, "release", lambda device: None)  # there is nothing to collect
    log: list[Any] = []
    row = largest_batch(stand_in(log, "a", memory), 40, most=500, effort=QUICK)
    fits = min(500, memory // 40)
    if fits == 0:
        assert row["error"] == "out of memory"
        return
    found = row["case"]["B"]
    assert fits / 1.1 - 1 < found <= fits
    assert row["pass"] == "largest"
    assert row["tokens_per_s"] > 0
    assert row["attempts"] <= 16
    if free == 12_000 and memory == 1230:
        assert row["attempts"] == 3  # 28 was predicted, 31 is too many


@pytest.mark.parametrize("recorded", [False, True])
def test_a_long_text_has_a_row_for_each_chunk(recorded: bool) -> None:
    way = engine("a", tiny_hybrid(), chunk_tokens=32, record_reading=recorded)
    rows = long_prefill(way, 300, 32)
    assert [row["case"]["context"] for row in rows] == [*range(32, 300, 32), 300]
    assert {(row["impl"], row["pass"]) for row in rows} == {("a", "chunk")}
    assert all(row["ms"] > 0 for row in rows)
    assert len({row["state_bytes"] for row in rows}) == 1


def test_real_ones_have_the_state_that_is_promised() -> None:
    hybrid, teacher = tiny_hybrid(), tiny_teacher()
    ways = [engine("hybrid", hybrid, chunk_tokens=16), dense(teacher, "flash")]
    ways.append(engine("teacher, engine", teacher, chunk_tokens=16))
    rows = list(measure(ways, [Case(2, 48)], prefill_limit_tokens=100, effort=QUICK))
    assert [row for row in rows if "error" in row] == []
    bytes_of = {row["impl"]: row["state_bytes"] for row in rows}
    promised = sum(mixer.config.state_bytes(mixer.geometry, 48, 4) for mixer in hybrid.mixers.values())
    assert bytes_of["hybrid"] == promised
    assert bytes_of["teacher, torch"] == 4 * 2 * 2 * 48 * 8 * 4
    assert bytes_of["teacher, engine"] == pytest.approx(bytes_of["teacher, torch"], rel=0.05)


def test_an_engine_joins_weights_before_they_are_counted() -> None:
    teacher = tiny_teacher()
    before = weight_bytes(teacher)
    way = engine("teacher, engine", teacher, chunk_tokens=16)
    joined = weight_bytes(teacher)
    way.make(2, 32)
    assert weight_bytes(teacher) == joined
    assert joined == pytest.approx(before, rel=0.01)


def test_a_folder_is_measured_beside_its_teacher(tmp_path: Path) -> None:
    from hybridize.inference.bench.run import bench

    teacher = tiny_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    found = bench(tmp_path / "teacher", teacher=str(tmp_path / "teacher"), contexts=(16,), batches=(2,))
    assert {"device", "torch", "triton", "versions", "dtype"} == found["machine"].keys()
    assert found["max_positions"] == 512
    assert list(dict.fromkeys(row["impl"] for row in found["rows"])) == ["model", "teacher, torch", "teacher, engine"]
    alone = bench(tmp_path / "teacher", teacher=None, contexts=(16,), batches=(1,))
    assert {row["impl"] for row in alone["rows"]} == {"model"}
    with pytest.raises(CheckpointError):
        bench(tmp_path / "nothing", teacher=None)
