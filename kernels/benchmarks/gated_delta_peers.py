"""What the gated delta rule is compared with, where it is installed: Flash Linear Attention and FlashQLA.

FLA hands its calls to FlashQLA by itself where it finds it, so that is switched off and FlashQLA is called directly.
On Hopper with Triton 3.4 to 3.7.0 FLA's own backward raises, for its gradients would be wrong
(https://github.com/fla-org/flash-linear-attention/issues/640). With TileLang installed it takes a kernel of that for
the part in question; where that fails, the time of the kernels that it refuses to run is given, as a time only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gated_delta_cases import Case, Rule

os.environ["FLA_FLASH_QLA"] = "0"  # before FLA is imported: some of its switches are read then


@dataclass(frozen=True)
class Peer:
    """prepare: the rule for a case on a device; around: entered while it runs, gradients included.

    otherwise: what is measured where this one raises.
    """

    name: str
    prepare: Callable[[Case, str], Rule]
    facts: dict[str, str]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    otherwise: Peer | None = None


def peers(case: Case, *, on_gpu: bool, backward: bool) -> list[Peer]:
    """Those that are installed and cover the case."""
    found = []
    if on_gpu and find_spec("fla") is not None:
        facts = {"version": version("fla-core"), "switches": "FLA_FLASH_QLA=0"}
        timing_only = None
        if backward:
            facts["tilelang"] = version("tilelang") if find_spec("tilelang") is not None else "none"
            name = "FLA (timing only, gradients wrong on this Triton)"
            without = facts | {"switches": "FLA_FLASH_QLA=0 FLA_TILELANG=0"}
            timing_only = Peer(name, _fla, without, around=_refusal_lifted)
        found.append(Peer("FLA", _fla, facts, otherwise=timing_only))
    if on_gpu and find_spec("flash_qla") is not None and case.D == 128:
        facts = {"version": version("flash-qla"), "tilelang": version("tilelang")}
        found.append(Peer("FlashQLA", _flash_qla, facts))
    return found


def _fla(case: Case, device: str) -> Rule:
    return _called(import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule, case, device)


def _flash_qla(case: Case, device: str) -> Rule:
    return _called(import_module("flash_qla").chunk_gated_delta_rule, case, device)


def _called(function: Callable[..., tuple[Tensor, Any]], case: Case, device: str) -> Rule:
    """The two take the same arguments; g is the log decay."""
    boundaries = case.cu_seqlens(device, torch.int64)

    def rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        return function(q=q, k=k, v=v, g=log_decay, beta=beta, scale=case.D**-0.5, cu_seqlens=boundaries)[0]

    return rule


@contextmanager
def _refusal_lifted() -> Iterator[None]:
    with (
        mock.patch.dict(os.environ, FLA_TILELANG="0"),
        mock.patch("fla.ops.common.chunk_o.TRITON_ABOVE_3_4_0", False),
    ):
        yield
