"""What the processes of one run have to agree on: sums, who writes, their share of a step, and that one was lost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn

from hybridize.distillation.sharding import is_sharded, requested_sharding
from hybridize.errors import EXIT_BUG, ProcessLostError, RecipeError, UsageError
from hybridize.recipe.schema import Distill, Stage

TIMEOUT_VARIABLE = "HYBRIDIZE_PROCESS_TIMEOUT_S"
TIMEOUT_S = 600.0
"""How long a process waits for the others before it takes one of them for lost."""
_LOOK_EVERY_S = 0.05
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out")


def start_processes() -> Processes:
    """Joins the other processes that a launcher started, or is the only one.

    Raises:
        UsageError: HYBRIDIZE_PROCESS_TIMEOUT_S is not a time, or accelerate is configured for what does not go with
            distillation.
        ProcessLostError: not all of them came.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or TIMEOUT_S)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{text!r} is not a time in seconds.", where=TIMEOUT_VARIABLE, hint="Say 600, for example.")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))
    without_gpu = launched > 1 and not torch.cuda.is_available()  # accelerate has to be told; it would see one process
    with losses_told(launched):
        accelerator = Accelerator(mixed_precision="no", cpu=without_gpu, kwargs_handlers=[patience])
    if accelerator.num_processes != launched:
        what = f"{launched} processes were launched, and accelerate knows of {accelerator.num_processes}."
        raise UsageError(what, hint="Look at the launcher's options, or use torchrun.")
    return Processes(accelerator)


@contextmanager
def losses_told(count: int) -> Iterator[None]:
    """Turns what torch raises when one of `count` processes no longer answers into a sentence.

    NCCL reports it in another thread, which ends this process after the timeout with a message of its own.

    Raises:
        ProcessLostError: a collective failed.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        lost = isinstance(error, distributed.DistError) or any(sign in text for sign in _SIGNS_OF_LOSS)
        if count == 1 or not lost:
            raise
        first_line = str(error).strip().splitlines()[0]
        raise ProcessLostError(f"A process of this run was lost ({first_line}).") from error


def fit_processes(distill: Distill, begun_with: int, count: int) -> Distill:
    """The stages for another number of processes than a run began with: every step has the same sequences as before.

    A step has processes x batch_sequences x accumulate sequences. Those of one process are cut into micro-batches of as
    many as possible, at most as many as the recipe says, so that no process needs more memory than it had. Losses are
    means over sequences, so the cut changes nothing but rounding (and dropout, of which each process has its own).

    Raises:
        RecipeError: the sequences of a step cannot be shared out evenly; it names the numbers of processes that fit.
    """
    if count == begun_with:
        return distill
    sequences = [begun_with * stage.batch_sequences * stage.accumulate for stage in distill.stages]
    common = math.gcd(*sequences)
    if common % count:
        fitting = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
        what = f"The run began with {begun_with} processes, and its steps cannot be shared out evenly to {count}."
        raise RecipeError(what, where="distill.stages", hint=f"Go on with one of these numbers of them: {fitting}.")
    stages = (_fit(stage, total // count) for stage, total in zip(distill.stages, sequences, strict=True))
    return replace(distill, stages=tuple(stages))


def _fit(stage: Stage, sequences: int) -> Stage:
    batch = next(size for size in range(stage.batch_sequences, 0, -1) if sequences % size == 0)
    return replace(stage, batch_sequences=batch, accumulate=sequences // batch)


class Processes:
    """The processes of a run, one a device; most of it does nothing where there is only one.

    Args:
        accelerator: an `accelerate.Accelerator`.

    Attributes:
        sharding: how models are spread over the processes; None: each has its own copies.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.is_first: bool = accelerator.is_main_process
        self.sharding = requested_sharding(accelerator)

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

    def first_only(self, work: Callable[[], None]) -> None:
        """Lets the first process do something while the others wait, however long it takes; all have to ask.

        Raises:
            what `work` raised, in the first process. SystemExit: in the others, then, with the same exit code.
            ProcessLostError: the first process was lost.
        """
        if self.count == 1:
            work()
            return
        # gloo tells at once when a connection breaks; no need to guess from the time that it takes.
        group = distributed.new_group(backend="gloo", timeout=timedelta(days=30))
        if not self.is_first:
            with losses_told(self.count):
                code = _told_by_first(0, group)
            if code:
                raise SystemExit(code)
            return
        try:
            work()
        except Exception as error:
            with suppress(RuntimeError):  # why it failed matters more
                _told_by_first(getattr(error, "exit_code", EXIT_BUG), group)
            raise
        with losses_told(self.count):
            _told_by_first(0, group)

    def end(self) -> None:
        """Leaves the others; what follows is the first process's own."""
        self.accelerator.end_training()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the device, in place; all have to ask."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process; all have to ask, and wait for the answer."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)))

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient that is not sharded by its mean over the processes; one message a dtype."""
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None and not is_sharded(parameter):
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.count
            parts = flat.split([gradient.numel() for gradient in gradients])  # type: ignore[no-untyped-call]
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])

    # Randomness.

    def seed(self, seed: int) -> None:
        """Gives each process its own torch randomness, so that dropout differs; the first one's goes on as it is.

        To be called once the weights are made: those have to be equal everywhere.
        """
        if self.index:
            torch.manual_seed(seed + self.index)

    def gather_random_states(self) -> dict[str, Tensor]:
        """torch's random states of all processes but the first, whose are saved anyway; all have to ask."""
        if self.count == 1:
            return {}
        own = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        states: dict[str, Tensor] = {}
        for name, state in own.items():
            gathered = self.accelerator.gather(state.to(self.device)[None])
            states |= {f"process.{rank}.{name}": gathered[rank].clone() for rank in range(1, self.count)}
        return states

    def restore_random_state(self, tensors: dict[str, Tensor], seed: int) -> None:
        """Puts this process's torch generators where `gather_random_states` found them.

        A process that the saved run did not have is seeded anew.
        """
        if self.index == 0:
            return
        self.seed(seed)
        if (state := tensors.get(f"process.{self.index}.torch")) is not None:
            torch.set_rng_state(state.cpu())
        if (state := tensors.get(f"process.{self.index}.cuda")) is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state.cpu(), self.device)


def _told_by_first(code: int, group: Any) -> int:
    """The sum of all processes' codes, looked for now and then: blocked in torch, Python would hear no signal."""
    total = torch.tensor(code)
    work = distributed.all_reduce(total, group=group, async_op=True)
    while not work.is_completed():
        time.sleep(_LOOK_EVERY_S)
    work.wait()
    return int(total)
