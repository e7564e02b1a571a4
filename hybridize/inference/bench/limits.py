"""How far an implementation goes: the largest batch that memory holds, and one very long text."""

from __future__ import annotations

import math
from typing import Any

from hybridize.inference.bench.clock import Effort, Footprint, effort_on, free_bytes, release, stopwatch
from hybridize.inference.bench.errors import is_out_of_memory
from hybridize.inference.bench.implementations import Implementation
from hybridize.inference.bench.measure import Row, decode_numbers, random_texts
from hybridize.inference.reader import WORTH_RECORDING

CLOSE = 1.1
"""The largest batch is known when the next one that was tried is not larger by more than this."""
_SHARE = 0.95
"""Of the free memory: what the states of a predicted batch take; the rest is for a step's own tensors."""


def largest_batch(
    implementation: Implementation, context_tokens: int, *, most: int = 4096, effort: Effort | None = None
) -> Row:
    """The largest batch whose decoding step runs in memory, to 10 %, and its throughput.

    A first guess comes from the bytes of a state and the free memory; then batches are run, doubled or halved between
    the largest that ran and the smallest that did not.

    Args:
        most: batches beyond are not tried.

    Returns:
        A row of `measure` with "pass": "largest", "case": {"B", "context"}, and "attempts": how many batches were
        tried; "error" if not even one sequence runs.
    """
    model = implementation.model
    row = _decode(implementation, 1, context_tokens, effort)
    attempts = 1
    if row is None:
        return _row(implementation, 1, context_tokens, {"error": "out of memory"}, attempts)
    low, high = 1, most + 1
    guess = _predicted(row["state_bytes"], free_bytes(model.device), most)
    while high > math.floor(low * CLOSE) + 1:
        batch = _next_batch(low, high, guess, most)
        tried = _decode(implementation, batch, context_tokens, effort)
        attempts += 1
        if tried is None:
            high = batch
        else:
            low, row = batch, tried
    return _row(implementation, low, context_tokens, row, attempts)


def long_prefill(implementation: Implementation, tokens: int, chunk_tokens: int, *, seed: int = 0) -> list[Row]:
    """Reads one very long text of random tokens in chunks.

    Args:
        implementation: an engine whose pieces have chunk_tokens.

    Returns:
        a row for each chunk with "pass": "chunk", "case": {"B": 1, "context": tokens read with it}, "ms": of the chunk,
        "tokens_per_s", "peak_bytes", "state_bytes".
    """
    model = implementation.model
    footprint = Footprint(model)
    timed: Any = implementation.make(1, tokens)
    # The first pieces compile and, where pieces are recorded, record.
    timed.read(random_texts(model, 1, min((WORTH_RECORDING + 1) * chunk_tokens, tokens), seed))
    timed.reset()
    rows: list[Row] = []

    def after(piece_tokens: int) -> None:
        read_s = elapsed()
        done = piece_tokens + (rows[-1]["case"]["context"] if rows else 0)
        numbers = {
            "ms": 1e3 * read_s,
            "tokens_per_s": piece_tokens / read_s,
            "peak_bytes": footprint.peak_bytes(),
            "state_bytes": timed.state_bytes(),
        }
        case = {"B": 1, "context": done}
        rows.append({"impl": implementation.name, "case": case, "pass": "chunk", **numbers})
        footprint.begin()
        elapsed()

    texts = random_texts(model, 1, tokens, seed)
    footprint.begin()
    elapsed = stopwatch(model.device)
    timed.read(texts, on_tokens=after)
    return rows


def _decode(implementation: Implementation, batch: int, context_tokens: int, effort: Effort | None) -> Row | None:
    """The numbers of a step, or None where memory ran out."""
    model = implementation.model
    footprint = Footprint(model)
    numbers: Row | None = None
    try:
        timed = implementation.make(batch, context_tokens)
        numbers = decode_numbers(timed, model, context_tokens, effort or effort_on(model.device), footprint)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    timed = None  # type: ignore[assignment]
    release(model.device)
    return numbers


def _predicted(state_bytes: int, free: int | None, most: int) -> int | None:
    """The batch whose states fill the memory; None where nobody knows how much there is."""
    return None if free is None else max(2, min(most, int(_SHARE * free / max(state_bytes, 1))))


def _next_batch(low: int, high: int, guess: int | None, most: int) -> int:
    """What to try between a batch that ran and one that did not (most + 1: none yet)."""
    if guess is not None and low < guess < high:
        return guess
    if guess is not None and low == guess and high > most:
        return min(most, math.floor(low * CLOSE) + 1)
    if high > most:
        return min(most, 2 * low)
    return max(low + 1, min(high - 1, round(math.sqrt(low * high))))


def _row(implementation: Implementation, batch: int, context_tokens: int, numbers: Row, attempts: int) -> Row:
    case = {"B": batch, "context": context_tokens}
    return {"impl": implementation.name, "case": case, "pass": "largest", **numbers, "attempts": attempts}
