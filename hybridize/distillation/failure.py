"""failure.json: what was known when a loss or gradient was not finite, for whoever looks into it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from hybridize.checkpoint import resource_errors
from hybridize.distillation.data import Batch
from hybridize.distillation.log import StepNote, without_mixers
from hybridize.distillation.lora import Student
from hybridize.distillation.processes import Processes
from hybridize.distillation.run_state import random_states
from hybridize.errors import NumbersError


def failure_name(process: int) -> str:
    """File name by process; each has documents of its own."""
    return "failure.json" if process == 0 else f"failure-{process}.json"


def fail(
    folder: Path,
    note: StepNote,
    numbers: Mapping[str, float],
    student: Student,
    processes: Processes,
    autocast: AbstractContextManager[Any],
    *,
    own_loss: bool,
) -> NoReturn:
    """Writes all that is known of a step that went wrong beside the checkpoints, and says what fits a sentence.

    Args:
        folder: of the run's training.
        numbers: of the step, means over the processes.
        own_loss: a loss of this process was not finite.

    Raises:
        NumbersError: always.
    """
    where = f"stage {note.stage.name}, step {note.stage_step}"
    numbers = without_mixers(numbers)
    bad = sorted(
        (name for name, value in numbers.items() if not math.isfinite(value) and name != "grad_norm"),
        key=lambda name: name in ("loss", "error"),  # sums and means say less than their parts
    )
    layers = [int(name.removeprefix("layer_")) for name in bad if name.startswith("layer_")]
    if bad and not own_loss:
        if processes.sharding is not None and not layers:  # the process that looks needs the parts of the others
            with autocast:
                first_bad_layer(student.model, note.batches)
        raise NumbersError("A loss in another process is not finite; that process says which.", where=where)
    digests = random_digests()
    found: dict[str, Any]
    if bad:
        what = f"{bad[0].replace('_', ' ').capitalize()} is not finite ({numbers[bad[0]]})"
        alone = nullcontext() if processes.sharding is not None else processes.undisturbed()  # the others have ended
        with autocast, alone:
            layer = layers[0] if layers else first_bad_layer(student.model, note.batches)
        found = {"losses": numbers, "layer": layer}
    else:
        name = _first_bad_gradient(note, student)
        what, found = f"The gradient of {name} is not finite", {"parameter": name, "layer": None}
    documents = list(dict.fromkeys(identity for batch in note.batches for identity in batch.documents))
    facts = {
        "what": what,
        "stage": note.stage.name,
        "stage_step": note.stage_step,
        "step": note.step,
        **found,
        "documents": documents,
        "learning_rates": dict(note.rates),
        "random_states": digests,
    }
    path = folder / failure_name(processes.index)
    write_failure(path, facts)
    shown = ", ".join(documents[:4]) + (f" and {len(documents) - 4} more" if len(documents) > 4 else "")
    file = f"{path.parent.name}/{path.name}"
    hint = f"See {file}; lower the learning rate, or look at the documents. The state saved before is untouched."
    raise NumbersError(f"{what}; the batch holds {shown}.", where=where, hint=hint)


def _first_bad_gradient(note: StepNote, student: Student) -> str:
    """Name of the first trained parameter with NaN or Inf in its gradient."""
    norms = dict(zip(map(id, note.norms.parameters), note.norms.each.tolist(), strict=True))
    trained = student.trained().items()
    bad = (name for name, parameter in trained if not math.isfinite(norms.get(id(parameter), 0.0)))
    return next(bad, "all parameters together")


def write_failure(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes the facts, as a whole file or not at all; numbers that JSON does not have become their names.

    Raises:
        ResourceError: disk full, and the like.
    """
    partial = path.with_name(path.name + ".partial")
    with resource_errors(path):
        partial.write_text(json.dumps(_plain(facts), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)


def random_digests() -> dict[str, str]:
    """SHA-256 of the state of every random generator."""
    states, tensors = random_states()
    contents = {name: json.dumps(state).encode() for name, state in states.items()}
    contents |= {name.removeprefix("random."): state.numpy().tobytes() for name, state in tensors.items()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


@torch.no_grad()
def first_bad_layer(model: Any, batches: Sequence[Batch]) -> int | None:
    """Index of the first decoder layer whose output is not finite for one of the batches; None if all are."""
    bad: list[int] = []

    def watch(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            if not bool((out[0] if isinstance(out, tuple) else out).isfinite().all()):
                bad.append(index)

        return hook

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(model.model.layers)]
    try:
        for batch in batches:
            model.model(**batch.model_inputs(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return min(bad, default=None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
