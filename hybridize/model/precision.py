"""Whether a device computes in bfloat16: the one answer behind every `auto`."""

from __future__ import annotations

from typing import Any

import torch

_CPU_NAMES = ("avx512_bf16", "amx_bf16", "bf16")
"""What `torch.cpu.get_capabilities` calls it on x86 and Arm."""
_CPU_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
"""Functions of torch.cpu that older versions have instead; AMX tiles come with bfloat16 products."""


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; emulation costs more than it saves."""
    if device.type == "cuda":
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities: Any = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return any(bool(found.get(name)) for name in _CPU_NAMES)
    probes = (getattr(torch.cpu, name, None) for name in _CPU_PROBES)
    return any(bool(probe()) for probe in probes if probe is not None)
