"""Where and in which type a model is evaluated."""

from __future__ import annotations

import torch

from hybridize.model.precision import computes_bfloat16
from hybridize.recipe.probes import Precision


def pick_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that `precision` asks for; auto is bf16 where the device multiplies it natively, else fp32."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    return torch.bfloat16 if computes_bfloat16(device) else torch.float32
