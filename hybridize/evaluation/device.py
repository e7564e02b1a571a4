"""Where and in which type a model is evaluated."""

from __future__ import annotations

from typing import Any

import torch

from hybridize.recipe.schema import Precision


def pick_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that `precision` asks for; auto is bf16 where the device multiplies it natively, else fp32."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(_cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def _cpu_capabilities() -> dict[str, Any]:
    """What torch knows of the processor; older versions tell nothing, and fp32 is right everywhere."""
    return getattr(torch.cpu, "get_capabilities", dict)()  # type: ignore[no-any-return]
