"""What the distillation loss is compared with: Flash Linear Attention and Liger, where they are installed, and PyTorch.

All of them take forward KL, a sum over the vocabulary and a mean over the tokens: FLA's only reduction, and Liger's
generalised JSD with beta = 0. Liger sums a head's gradient over its chunks in the head's dtype unless told otherwise,
so it is measured in fp32 as well, as FLA's and ours are. Liger's KL loss takes the teacher's probabilities as data:
here they are made of the teacher's logits first, whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.distillation_cases import Case, Loss


@dataclass(frozen=True)
class Peer:
    """prepare: the loss, whose libraries are imported only now; facts: go into its row."""

    name: str
    prepare: Callable[[], Loss]
    facts: dict[str, str]


PACKAGES = {"FLA": ("fla", "fla-core"), "Liger": ("liger_kernel", "liger-kernel")}


def missing() -> list[str]:
    """Peers that are not installed."""
    return [name for name, (module, _) in PACKAGES.items() if find_spec(module) is None]


def peers(case: Case, *, on_gpu: bool) -> list[Peer]:
    """Those that are installed and run here."""
    found = [Peer("torch, whole logits", lambda: _whole, {})]
    absent = missing() if on_gpu else list(PACKAGES)
    if "FLA" not in absent:
        found.append(Peer("FLA", _fla, _facts("FLA")))
    if "Liger" not in absent:
        found.append(Peer("Liger JSD", _liger_jsd, _facts("Liger")))
        if case.trained:
            found.append(Peer("Liger JSD, fp32 sums", lambda: _liger_jsd(accum_dtype=torch.float32), _facts("Liger")))
        found.append(Peer("Liger KL, whole teacher", _liger_kl, _facts("Liger")))
    return found


def _facts(name: str) -> dict[str, str]:
    return {"version": version(PACKAGES[name][1])}


def _fla() -> Loss:
    loss = import_module("fla.modules.fused_kl_div").fused_kl_div_loss

    def run(hidden: Tensor, teacher_hidden: Tensor, head: Tensor, teacher_head: Tensor) -> Tensor:
        return loss(hidden, teacher_hidden, head, teacher_head)

    return run


def _liger_jsd(**options: Any) -> Loss:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0, **options)

    def run(hidden: Tensor, teacher_hidden: Tensor, head: Tensor, teacher_head: Tensor) -> Tensor:
        return loss(hidden, head, teacher_hidden, teacher_head, None)

    return run


def _liger_kl() -> Loss:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearKLDivLoss()

    def run(hidden: Tensor, teacher_hidden: Tensor, head: Tensor, teacher_head: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher_hidden @ teacher_head.T).softmax(-1, dtype=torch.float32)
        return loss(hidden, head, target)

    return run


def _whole(hidden: Tensor, teacher_hidden: Tensor, head: Tensor, teacher_head: Tensor) -> Tensor:
    log_q = (hidden @ head.T).log_softmax(-1, dtype=torch.float32)
    with torch.no_grad():
        log_p = (teacher_hidden @ teacher_head.T).log_softmax(-1, dtype=torch.float32)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def products(case: Case, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The matrix products alone, over all tokens at once: what the loss takes at least."""
    hidden, teacher_hidden, head, teacher_head = (tensor.detach() for tensor in inputs)

    def run() -> tuple[Tensor, ...]:
        logits = hidden @ head.T
        teacher_logits = teacher_hidden @ teacher_head.T
        return (logits @ head, teacher_logits, *([logits.T @ hidden] if case.trained else []))

    return run
