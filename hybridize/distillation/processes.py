"""What the processes of one run have to agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def any_process(accelerator: Any, flag: bool) -> bool:
    """Whether the flag is set in at least one process; all have to ask."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))


def seed_process(accelerator: Any, seed: int) -> None:
    """Gives each process its own torch randomness, so that dropout differs; the first one's goes on as it is.

    To be called once the weights are made: those have to be equal everywhere.
    """
    if accelerator.process_index:
        torch.manual_seed(seed + accelerator.process_index)


def gather_random_states(accelerator: Any) -> dict[str, Tensor]:
    """torch's random states of all processes but the first, whose are saved anyway; all have to ask."""
    if accelerator.num_processes == 1:
        return {}
    own = {"torch": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    states: dict[str, Tensor] = {}
    for name, state in own.items():
        gathered = accelerator.gather(state.to(accelerator.device)[None])
        states |= {f"process.{rank}.{name}": gathered[rank].clone() for rank in range(1, accelerator.num_processes)}
    return states


def restore_random_state(accelerator: Any, tensors: dict[str, Tensor], seed: int) -> None:
    """Puts this process's torch generators where `gather_random_states` found them.

    A process that the saved run did not have is seeded anew.
    """
    rank = accelerator.process_index
    if rank == 0:
        return
    seed_process(accelerator, seed)
    if (state := tensors.get(f"process.{rank}.torch")) is not None:
        torch.set_rng_state(state.cpu())
    if (state := tensors.get(f"process.{rank}.cuda")) is not None and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), accelerator.device)
