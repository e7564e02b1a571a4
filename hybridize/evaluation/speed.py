"""How fast a model reads prompts and writes tokens here, measured."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from hybridize.evaluation.generation import Decoder
from hybridize.progress import Task
from hybridize.recipe.probes import SpeedProbe

Row = dict[str, Any]


def speed(models: dict[str, Any], settings: SpeedProbe, *, seed: int, task: Task) -> Row:
    """Times prefill and decode of random tokens, through the same loop that answers the probes' questions.

    Each number is the median of `repeats`, after one pass to warm up. Decoding starts from a cache of the prompt.

    Returns:
        "prefill": rows {"tokens", "sequences", "student", "teacher"} in tokens a second; "decode": the same in
        milliseconds a step of all sequences.
    """
    prefill, decode = [], []
    for tokens in settings.lengths:
        for sequences in settings.batch_sequences:
            size: Row = {"tokens": tokens, "sequences": sequences, "student": None, "teacher": None}
            read, write = dict(size), dict(size)
            for name, model in models.items():
                read_s, step_s = _times(model, tokens, sequences, settings, seed)
                read[name] = tokens * sequences / read_s
                write[name] = 1000 * step_s
                task.advance()
            prefill.append(read)
            decode.append(write)
    return {"prefill": prefill, "decode": decode, "new_tokens": settings.new_tokens, "repeats": settings.repeats}


def _times(model: Any, tokens: int, sequences: int, settings: SpeedProbe, seed: int) -> tuple[float, float]:
    """Seconds of the prefill, and of one step after it."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(model.config.vocab_size, (sequences, tokens), generator=generator).tolist()
    reads, steps = [], []
    with torch.inference_mode():
        for _ in range(settings.repeats + 1):
            decoder = Decoder(model)
            started = _now(model)
            following = decoder.read(prompts).argmax(-1)
            read = _now(model)
            for _ in range(settings.new_tokens):
                following = decoder.step(following).argmax(-1)
            reads.append(read - started)
            steps.append((_now(model) - read) / settings.new_tokens)
    return statistics.median(reads[1:]), statistics.median(steps[1:])


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
