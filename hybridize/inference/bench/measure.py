"""Prefill and decode of every implementation at every context length and batch: rows of plain numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridize.inference.bench.clock import Effort, Footprint, effort_on, release, seconds_of
from hybridize.inference.bench.errors import is_out_of_memory, reason
from hybridize.inference.bench.implementations import Implementation, Timed
from hybridize.progress import SILENT, Reporter

Row = dict[str, Any]
Forgiven = Callable[[BaseException], bool]
PASSES = ("prefill", "decode")
ROUNDS = 2
_MOST_STEPS = 256


@dataclass(frozen=True)
class Case:
    """B sequences of so many tokens."""

    batch: int
    context_tokens: int

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.batch * self.context_tokens

    @property
    def letters(self) -> dict[str, int]:
        """As it stands in a row."""
        return {"B": self.batch, "context": self.context_tokens}


def measure(
    implementations: Sequence[Implementation],
    cases: Sequence[Case],
    *,
    prefill_limit_tokens: int,
    passes: Sequence[str] = PASSES,
    forgiven: Forgiven = is_out_of_memory,
    effort: Effort | None = None,
    rounds: int = ROUNDS,
    reporter: Reporter = SILENT,
    seed: int = 0,
) -> Iterator[Row]:
    """Measures all, in turn and then in turn again, so that a machine that slows down shows.

    Args:
        prefill_limit_tokens: larger cases read nothing; their state is made up, and they have no prefill row.
        passes: what is measured, of PASSES.
        forgiven: errors that become a row; others are raised.
        effort: how much is run; default: by the device.
        rounds: 2, or 1 where there is no time for another.
        seed: of the random tokens.

    Yields:
        {"impl", "case": {"B", "context"}, "pass": "prefill" or "decode", "ms": of the whole prompt or of one step of
        all sequences, "again_ms": the same in the second round, "tokens_per_s", "peak_bytes": of GPU memory, weights
        and warm-up included, None on a CPU, "state_bytes": of one sequence}; or "error" in place of the numbers.
    """
    manner = _Manner(prefill_limit_tokens, passes, forgiven, effort, seed)
    with reporter.task("measuring", len(implementations) * len(cases) * rounds) as task:
        for case in cases:
            done: list[dict[tuple[str, str], Row]] = []
            for _ in range(rounds):
                rows: dict[tuple[str, str], Row] = {}
                for implementation in implementations:
                    known = done[0].get((implementation.name, "decode"), {}) if done else {}
                    if "error" not in known:  # it would run out of memory again
                        for row in _measured(implementation, case, manner):
                            rows[row["impl"], row["pass"]] = row
                    task.advance(now=f"{implementation.name}, {case.batch} × {case.context_tokens}")
                done.append(rows)
            yield from _joined(done)


def decode_numbers(timed: Timed, model: Any, context_tokens: int, effort: Effort, footprint: Footprint) -> Row:
    """One step of all sequences, the last of which sees `context_tokens`: median over runs of many steps."""
    device: torch.device = model.device
    most = max(1, min(_MOST_STEPS, max(effort.steps, context_tokens // 16), context_tokens // 2))
    fewest = min(effort.steps, most)

    def run(steps: int) -> float:
        timed.pretend(context_tokens - steps)
        return seconds_of(lambda: timed.run(steps), device) / steps

    footprint.begin()
    run(fewest)
    steps = fewest
    if effort.seconds:
        steps = min(most, max(fewest, round(effort.seconds / run(fewest))))
        run(steps)
    step_s = statistics.median(run(steps) for _ in range(effort.repeats))
    return {
        "ms": 1e3 * step_s,
        "tokens_per_s": timed.batch / step_s,
        "peak_bytes": footprint.peak_bytes(),
        "state_bytes": timed.state_bytes(),
    }


def prefill_numbers(timed: Timed, model: Any, case: Case, effort: Effort, footprint: Footprint, seed: int) -> Row:
    """A prompt of random tokens in each row, read for real."""
    texts = random_texts(model, case.batch, case.context_tokens, seed)

    def read() -> float:
        timed.reset()
        return seconds_of(lambda: timed.read(texts), model.device)

    footprint.begin()
    for _ in range(effort.warm_reads):
        read()
    times = [read()]
    while len(times) < effort.read_repeats and sum(times) < effort.read_seconds:
        times.append(read())
    read_s = statistics.median(times)
    return {
        "ms": 1e3 * read_s,
        "tokens_per_s": case.tokens / read_s,
        "peak_bytes": footprint.peak_bytes(),
        "state_bytes": timed.state_bytes(),
    }


def random_texts(model: Any, batch: int, tokens: int, seed: int) -> list[list[int]]:
    """Rows of random tokens, the same for every implementation."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[list[int]] = torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).tolist()
    return texts


@dataclass(frozen=True)
class _Manner:
    """How every case is measured; as of `measure`."""

    prefill_limit_tokens: int
    passes: Sequence[str]
    forgiven: Forgiven
    effort: Effort | None
    seed: int

    def passes_of(self, case: Case) -> list[str]:
        too_large = case.tokens > self.prefill_limit_tokens
        return [name for name in self.passes if name == "decode" or not too_large]


def _measured(implementation: Implementation, case: Case, manner: _Manner) -> list[Row]:
    """A row a pass; what an error left behind is gone before the next."""
    model = implementation.model
    effort, footprint = manner.effort or effort_on(model.device), Footprint(model)
    rows: list[Row] = []
    timed: Timed | None = None
    for name in manner.passes_of(case):
        try:
            timed = timed or implementation.make(case.batch, case.context_tokens)
            if name == "prefill":
                numbers = prefill_numbers(timed, model, case, effort, footprint, manner.seed)
            else:
                numbers = decode_numbers(timed, model, case.context_tokens, effort, footprint)
        except Exception as error:
            if not manner.forgiven(error):
                raise
            numbers, timed = {"error": reason(error)}, None
        if "error" in numbers:
            release(model.device)  # after the handler, whose traceback held what was allocated
        rows.append({"impl": implementation.name, "case": case.letters, "pass": name, **numbers})
    timed = None
    release(model.device)
    return rows


def _joined(rounds: Sequence[dict[tuple[str, str], Row]]) -> Iterator[Row]:
    first, second = rounds[0], rounds[-1] if len(rounds) > 1 else {}
    for key, row in first.items():
        again = second.get(key, {}).get("ms")
        if again is None or "ms" not in row:
            yield row
            continue
        head = ("impl", "case", "pass", "ms")
        yield {**{name: row[name] for name in head}, "again_ms": again, **row}
