"""One of two processes that distil together; tells what it saw as one JSON object.

Called as `two_processes.py FOLDER`, with `run` in it prepared and copied to `straight`, `stopped` and `broken`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hybridize.distillation.data import Batch
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.trainer import Trainer
from hybridize.errors import HybridizeError
from tests.distillation import runs

SIGNAL_STEP = 3


def digest(tensors: Iterable[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def main(folder: Path) -> None:
    second = os.environ["RANK"] == "1"
    seen: list[list[Any]] = []
    signal_step = 0
    step, last_hidden = Trainer._step, Teacher.last_hidden

    def watched(self: Trainer, *args: Any) -> Any:
        if second and self.progress.step + 1 == signal_step:
            os.kill(os.getpid(), signal.SIGTERM)
        measured = step(self, *args)
        states = digest([torch.get_rng_state()])
        seen.append([self.progress.step + 1, states, digest(self.student.trained().values())])
        return measured

    def broken(self: Teacher, batch: Batch) -> torch.Tensor:
        return last_hidden(self, batch) * float("inf")

    def distil(run: str) -> dict[str, Any]:
        seen.clear()
        try:
            runs.distil(folder, runs.tiny_recipe(folder, save_every_steps=100), run)
        except HybridizeError as error:
            return {"steps": list(seen), "error": type(error).__name__, "what": error.what}
        return {"steps": list(seen), "error": None, "what": ""}

    Trainer._step = watched  # type: ignore[method-assign]
    told = {"straight": distil("straight")}
    signal_step = SIGNAL_STEP
    told["stopped"] = distil("stopped")
    signal_step = 0
    told["resumed"] = distil("stopped")
    if second:
        Teacher.last_hidden = broken  # type: ignore[method-assign]
    told["broken"] = distil("broken")
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
