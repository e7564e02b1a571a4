"""What the processes of one run have to agree on: sums, who writes, their share of a step, and that one was lost."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed, nn

from hybridize.distillation.lifeline import Lifeline, Tell
from hybridize.distillation.meeting import connect
from hybridize.distillation.sharding import is_sharded, requested_sharding
from hybridize.errors import EXIT_BUG, EXIT_INTERRUPTED, ProcessLostError, RecipeError, UsageError
from hybridize.recipe.schema import Distill, Stage

TIMEOUT_VARIABLE = "HYBRIDIZE_PROCESS_TIMEOUT_S"
TIMEOUT_S = 600.0
"""How long a process waits for the others before it takes one of them for lost."""
KNOWN_WITHIN_S = 1.0
"""How long after a message failed the lifeline may take to say whose loss that was."""
_SIGNS_OF_LOSS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out")


_lifeline: Lifeline | None = None
"""Of this process; like accelerate's own state it outlives every `Processes`."""


def start_processes(tell_loss: Tell | None = None) -> Processes:
    """Joins the other processes that a launcher started, or is the only one.

    Args:
        tell_loss: is given the error if another process is lost while this one is blocked in a message to it, and has
            to be ended from another thread. None: what an earlier call said, or the log of `hybridize.distillation`.

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
    return Processes(accelerator, _own_lifeline(accelerator, seconds, tell_loss))


def _own_lifeline(accelerator: Accelerator, timeout_s: float, tell: Tell | None) -> Lifeline | None:
    """The line to the other processes, made when they meet; None: there are no others."""
    global _lifeline
    index, count = accelerator.process_index, accelerator.num_processes
    if count == 1:
        return None

    def from_first(numbers: list[int]) -> list[int]:
        told = torch.tensor(numbers, device=accelerator.device)
        distributed.broadcast(told, src=0)
        return list(map(int, told.tolist()))

    if _lifeline is None or _lifeline.closed:
        with losses_told(count):
            _lifeline = Lifeline(connect(index, count, from_first, timeout_s))
    if tell is not None:
        _lifeline.tell = tell
    return _lifeline


@contextmanager
def losses_told(count: int, lifeline: Lifeline | None = None) -> Iterator[None]:
    """Turns what torch raises when one of `count` processes no longer answers into a sentence.

    A message of NCCL does not fail but waits; see `lifeline`, which also knows who was lost.

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
        if lifeline is not None:
            lifeline.check(within_s=KNOWN_WITHIN_S)
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
        lifeline: to the others; without one, a lost process is known by the messages that fail.

    Attributes:
        sharding: how models are spread over the processes; None: each has its own copies.
    """

    def __init__(self, accelerator: Any, lifeline: Lifeline | None = None) -> None:
        self.accelerator = accelerator
        self.lifeline = lifeline
        self.device: torch.device = accelerator.device
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.is_first: bool = accelerator.is_main_process
        self.sharding = requested_sharding(accelerator)

    @contextmanager
    def together(self) -> Iterator[None]:
        """The part of a run in which each process needs the others: one that is lost meanwhile ends them all, soon.

        Raises:
            ProcessLostError: one was lost. Where the main thread waits for it in NCCL, nothing is raised: the loss is
                told and this process ended with the error's exit code.
        """
        if self.lifeline is None:
            yield
            return
        with self.lifeline.bound(), losses_told(self.count, self.lifeline):
            try:
                yield
            except KeyboardInterrupt:
                self.lifeline.check()  # the launcher ends those that are left with a signal
                raise

    def undisturbed(self) -> AbstractContextManager[None]:
        """A part of it in which this process needs nobody, and may finish whoever is lost."""
        return nullcontext() if self.lifeline is None else self.lifeline.undisturbed()

    def wait(self) -> None:
        """Until all are here."""
        self._check()
        self.accelerator.wait_for_everyone()

    def first_only(self, work: Callable[[], None]) -> None:
        """Lets the first process do something while the others wait, however long it takes; all have to ask.

        Raises:
            what `work` raised, in the first process. SystemExit: in the others, then, with the same exit code.
            ProcessLostError: a process was lost.
        """
        if self.count == 1:
            work()
            return
        assert self.lifeline is not None
        if self.is_first:
            with self.together():
                self._told_to_all(work, self.lifeline)
        elif code := self.lifeline.wait_for_first():
            raise SystemExit(code)

    @staticmethod
    def _told_to_all(work: Callable[[], None], lifeline: Lifeline) -> None:
        try:
            with lifeline.undisturbed():
                work()
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            lifeline.done(EXIT_INTERRUPTED if interrupted else getattr(error, "exit_code", EXIT_BUG))
            raise
        lifeline.check()
        lifeline.done()

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Lets the first process through the block before the others, who then meet what it met; all have to ask."""
        if self.lifeline is not None and not self.is_first:
            self.lifeline.wait_for_first()
        try:
            yield
        finally:
            if self.lifeline is not None and self.is_first:
                self.lifeline.done()

    def end(self) -> None:
        """Leaves the others; what follows is the first process's own."""
        if self.lifeline is not None:
            self.lifeline.close()
        self.accelerator.end_training()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the device, in place; all have to ask."""
        if self.count > 1:
            self._check()
            distributed.all_reduce(values)
        return values

    def _check(self) -> None:
        """Before a message: with a lost process it would never end."""
        if self.lifeline is not None:
            self.lifeline.check()

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
        self._check()
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
