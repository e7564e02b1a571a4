"""How fast a model reads prompts and writes tokens here, measured."""

from __future__ import annotations

from typing import Any

from hybridize.inference.bench.clock import Effort
from hybridize.inference.bench.implementations import engine
from hybridize.inference.bench.measure import Case, measure
from hybridize.model.training_form import leave
from hybridize.progress import Task
from hybridize.recipe.probes import SpeedProbe

Row = dict[str, Any]


def speed(models: dict[str, Any], settings: SpeedProbe, *, seed: int, task: Task) -> Row:
    """Times prefill and decode of random tokens in the engine that `hybridize generate` runs.

    Each number is the median of `repeats`, after a pass to warm up. Decoding starts from a state that was made up.

    Returns:
        "prefill": rows {"tokens", "sequences", "student", "teacher"} in tokens a second, without those of more than
        `prefill_limit_tokens`; "decode": the same in milliseconds a step of all sequences, with "student_state_bytes"
        and "teacher_state_bytes" of one; None where there is no such model.
    """
    effort = Effort(
        steps=settings.new_tokens,
        seconds=0.0,
        repeats=settings.repeats,
        warm_reads=1,
        read_seconds=float("inf"),
        read_repeats=settings.repeats,
    )
    prefill, decode = [], []
    for tokens in settings.lengths:
        for sequences in settings.batch_sequences:
            size: Row = {"tokens": tokens, "sequences": sequences, "student": None, "teacher": None}
            read, write = dict(size), {**size, "student_state_bytes": None, "teacher_state_bytes": None}
            for name, model in models.items():
                for row in measure(
                    [engine(name, model)],
                    [Case(sequences, tokens)],
                    prefill_limit_tokens=settings.prefill_limit_tokens,
                    effort=effort,
                    rounds=1,
                    seed=seed,
                ):
                    if "error" in row:
                        continue
                    if row["pass"] == "prefill":
                        read[name] = row["tokens_per_s"]
                    else:
                        write[name], write[f"{name}_state_bytes"] = row["ms"], row["state_bytes"]
                leave(model)
                task.advance()
            if read["student"] is not None:
                prefill.append(read)
            decode.append(write)
    return {"prefill": prefill, "decode": decode, "new_tokens": settings.new_tokens, "repeats": settings.repeats}
