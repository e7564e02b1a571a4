"""The state of a run on disk: trained tensors, optimiser, place in the data, random states. No pickle.

A checkpoint is one folder that appears whole (`AtomicFolder`), is read back and verified before an older one goes, and
is found again by its manifest; `latest` names the newest for people and scripts.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybridize.checkpoint import (
    AtomicFolder,
    fault_point,
    load_state,
    resolve_source,
    resource_errors,
    save_tensors,
    verify_folder,
)
from hybridize.distillation.sharding import gather, part_like, sharded_like
from hybridize.errors import CheckpointError, VerificationError

KIND = "run-checkpoint"
_STATE_FILE = "state.json"
_STEP = "step"
_FOLDER = re.compile(r"step-(\d+)")
Parameters = Mapping[str, nn.Parameter]
"""By name."""


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: optimiser steps done, over all stages.
        stage: index of the stage of the next step, or the number of stages at the end.
        stage_step: steps done in that stage.
        data: place in the data where the micro-batches of the next step begin.
        tokens: trained on so far.
        seconds: spent training so far.
    """

    step: int
    stage: int
    stage_step: int
    data: dict[str, Any]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint as it is read: where the run was, its tensors by name, and the random states."""

    progress: Progress
    tensors: dict[str, Tensor]
    random_states: dict[str, Any]


class RunState:
    """The checkpoints of one run.

    Args:
        folder: holds `step-<n>/` folders and `latest`.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Writes a checkpoint, verifies it, moves `latest` and removes old ones.

        Raises:
            ResourceError: disk full, and the like; the previous checkpoint is whole.
            VerificationError: what was written reads back differently.
        """
        out = self.folder / f"step-{progress.step:07d}"
        states, random_tensors = random_states()
        state = {"version": 1, **asdict(progress), "random": states}
        with AtomicFolder(out, overwrite=True, kind=KIND) as partial:
            save_tensors(partial, {**tensors, **random_tensors}, max_shard_bytes=float("inf"))
            (partial / _STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        verify_folder(out, finite=False)
        fault_point("after-save-before-latest")
        self.settle(progress)

    def settle(self, progress: Progress) -> None:
        """Lets `latest` name the checkpoint of that place, and removes old ones; what a kill may have left undone."""
        self._point_latest(self.folder / f"step-{progress.step:07d}")
        for old in self._folders()[self.keep :]:
            fault_point("during-rotation")
            shutil.rmtree(old)

    def _point_latest(self, out: Path) -> None:
        latest = self.folder / "latest"
        partial = latest.with_name("latest.partial")
        with resource_errors(latest):
            partial.write_text(out.name + "\n", encoding="utf-8")
            os.replace(partial, latest)

    def load(self) -> tuple[Snapshot | None, list[str]]:
        """The newest checkpoint that is whole, its tensors on the CPU.

        Returns:
            it (None if there is none), and a sentence about each newer one that was passed over.
        """
        notes = []
        for folder in self._folders():
            try:
                verify_folder(folder, finite=False)
            except (CheckpointError, VerificationError) as error:
                notes.append(f"{folder.name} is damaged and was passed over: {error.what}")
                continue
            state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
            tensors = load_state(resolve_source(str(folder)))
            states = state.pop("random")
            state.pop("version")
            return Snapshot(Progress(**state), tensors, states), notes
        return None, notes

    def _folders(self) -> list[Path]:
        """Checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]


_CUDA_RANDOM = "random.cuda"


def random_states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of all random generators: what JSON holds, and tensors."""
    generator: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = generator
    version, words, gauss = random.getstate()
    states = {
        "python": [version, list(words), gauss],
        "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[_CUDA_RANDOM] = torch.cuda.get_rng_state()  # of this process's GPU, whichever others it sees
    return states, tensors


def restore_random_states(states: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts the generators where `random_states` found them."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["random.torch"].cpu())
    if _CUDA_RANDOM in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[_CUDA_RANDOM].cpu())


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, own: Parameters, parameters: Parameters, *, keep: bool = True
) -> dict[str, Tensor]:
    """The optimiser's state as `optimizer.<key>.<parameter>`, whole; of sharded ones all processes have to ask.

    Args:
        own: what the optimiser changes, by name. parameters: what they are, or are parts of (`own_parameters`).
        keep: as of `sharding.gather`.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in own.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if key == _STEP else sharded_like(value, parameters[name])
            found |= gather({f"optimizer.{key}.{name}": tensor}, keep=keep)
    return found


def load_optimizer(
    optimizer: torch.optim.Optimizer, own: Parameters, parameters: Parameters, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, from whole tensors on any device."""
    for name, value in tensors.items():
        prefix, _, rest = name.partition(".")
        key, _, parameter_name = rest.partition(".")
        if prefix == "optimizer":
            parameter = own[parameter_name]
            part = value if key == _STEP else part_like(value, parameters[parameter_name])
            optimizer.state[parameter][key] = part.to(parameter.device)
