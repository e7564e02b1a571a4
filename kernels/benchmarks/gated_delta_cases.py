"""The cases of the gated delta rule: their inputs, ours on them, the exact result, and what a pass needs at least.

Operations at least, a token, in chunks of C = 64 with whole tiles; K and V are the sizes of a key and of a value:

    forward   6 K V + 4 C V a value head, 4 C K a key head
              k S, q S and the update of S; U = M R with M the inverse of I + A, and P U; P = q kᵀ and A from k kᵀ
    backward  12 K V + 8 C V a value head, 6 C K a key head
              dU = Pᵀ dO + k dS, then dR = Mᵀ dU; dP = dO Uᵀ, dA = −dR Uᵀ; dq from dO Sᵀ and dP k;
              dk from U dSᵀ, dR Sᵀ, dPᵀ q and (dA + dAᵀ) k; dS from qᵀ dO and kᵀ dR

(decays, beta and the inverse itself left out; W is never formed, value heads of a key head share its products). The
backward count takes S, U, M, P and A as known: what is computed again comes on top.

Bytes at least, a token: forward reads q, k, v and the gates and writes o; backward reads those and dO and writes the
gradients. They leave out whatever is kept between the two. So each is a floor by itself, and no pass meets both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hybridize_kernels import gated_delta_rule, use_implementation

CHUNK = 64
GATE_BYTES = 8  # log_decay and beta of a value head, both fp32

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""q, k `[B, T, H, D]`, v `[B, T, HV, D]`, log_decay and beta `[B, T, HV]` -> `[B, T, HV, D]`."""
LEAVES = ("q", "k", "v", "log_decay", "beta")


@dataclass(frozen=True)
class Case:
    """Letters as everywhere, K = V = D; lengths: of the sequences that one row of T tokens packs."""

    B: int
    T: int
    H: int
    HV: int
    D: int
    lengths: tuple[int, ...] = ()

    def letters(self) -> dict[str, int]:
        found = {name: getattr(self, name) for name in ("B", "T", "H", "HV", "D")}
        return found | ({"N": len(self.lengths)} if self.lengths else {})

    def boundaries(self) -> list[int]:
        """Where the sequences of a row begin, and the end of the last."""
        return [0, *accumulate(self.lengths or (self.T,))]

    def cu_seqlens(self, device: str | torch.device, dtype: torch.dtype = torch.int32) -> Tensor | None:
        return torch.tensor(self.boundaries(), device=device, dtype=dtype) if self.lengths else None


CASES = [
    Case(8, 4096, 16, 16, 128),
    Case(1, 32768, 16, 16, 128),
    Case(8, 2048, 9, 9, 64),
    Case(8, 4096, 8, 8, 256),
    Case(1, 8192, 16, 32, 128),
    Case(1, 8192, 16, 16, 128, lengths=(1300, 547, 2048, 963, 271, 3063)),
]
TINY = [Case(2, 96, 2, 4, 16), Case(1, 150, 2, 2, 16, lengths=(70, 1, 79))]


def make_inputs(case: Case, device: str, *, gradient: bool = False) -> list[Tensor]:
    """q, k, v, log_decay and beta: unit queries and keys, gates in fp32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(case.B, case.T, case.H, case.D, device=device), dim=-1) for _ in range(2))
    v = torch.randn(case.B, case.T, case.HV, case.D, device=device)
    log_decay, beta = (torch.randn(case.B, case.T, case.HV, device=device) for _ in range(2))
    leaves = [q.to(dtype), k.to(dtype), v.to(dtype), F.logsigmoid(log_decay), torch.sigmoid(beta)]
    return [x.requires_grad_(gradient) for x in leaves]


def ours(case: Case, device: str, **options: Any) -> Rule:
    """The op; options go to it as they are."""
    # An op of one sequence a row does not get the argument at all.
    packed = {"cu_seqlens": case.cu_seqlens(device)} if case.lengths else {}

    def rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        return gated_delta_rule(q, k, v, log_decay, beta, scale=case.D**-0.5, **packed, **options)[0]

    return rule


def exact(case: Case, leaves: list[Tensor], **options: Any) -> Tensor:
    """The eager form on leaves in fp64, sequence by sequence; they may be the first tokens of a case's."""
    outputs = []
    with use_implementation("eager"):
        for begin, end in spans(case, leaves[0].shape[1]):
            parts = [x[:, begin:end] for x in leaves]
            outputs.append(gated_delta_rule(*parts, scale=case.D**-0.5, **options)[0])
    return torch.cat(outputs, dim=1)


def spans(case: Case, time: int) -> Iterator[tuple[int, int]]:
    """First and last token, exclusive, of each sequence of a row that ends after `time` tokens."""
    for begin, end in pairwise(case.boundaries()):
        if begin < time:
            yield begin, min(end, time)


def operations(case: Case, *, backward: bool) -> int:
    """Multiplications and additions of a forward pass, or of a forward and a backward pass, at least."""
    state, of_values, of_keys = (18, 12, 10) if backward else (6, 4, 4)
    a_value_head = state * case.D**2 + of_values * CHUNK * case.D
    return case.B * case.T * (case.HV * a_value_head + case.H * of_keys * CHUNK * case.D)


def num_bytes(case: Case, *, backward: bool) -> int:
    """Bytes that the same must move, with q, k, v and outputs of two bytes a number."""
    keys, values, gates = 4 * case.H * case.D, 2 * case.HV * case.D, GATE_BYTES * case.HV
    forward = keys + 2 * values + gates
    both_ways = forward + (keys + 2 * values + gates) + (keys + values + gates)
    return case.B * case.T * (both_ways if backward else forward)
