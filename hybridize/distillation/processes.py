"""What the processes of one run have to agree on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn


class Processes:
    """The processes of a run, one a device; most of it does nothing where there is only one.

    Args:
        accelerator: an `accelerate.Accelerator`.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.is_first: bool = accelerator.is_main_process

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()

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
        """Replaces every gradient by its mean over the processes; one message a dtype."""
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
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
