"""The cases of native sparse attention: their inputs, ours on them, and how many pairs they see.

How neighbouring queries' selections overlap decides what a kernel can share between them, and Gaussian queries and
keys, which benchmarks are usually made of, select as if they drew lots. So there are two kinds of inputs: "gaussian",
and "lifelike", whose overlap is that of a real model, at every length and head size (`native_sparse_overlap` measures
both). Lifelike are queries and keys with one mean, turned by their positions as rotary embeddings do: near blocks then
score higher, by a curve that moves with the query, and noise of tokens, blocks and heads adds what flickers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hybridize_kernels import native_sparse_attention, use_implementation

Attention = Callable[..., Tensor]
"""q `[B, T, HQ, D]`, k and v `[B, T, H, D]`, gates `[B, T, HQ, 3]` -> `[B, T, HQ, D]`."""

KINDS = ("gaussian", "lifelike")
FORCED = 3
"""Blocks that every query selects: the first, the previous and its own."""
ROTARY_BASE = 1e5
QUERY_NOISE, HEAD_NOISE, KEY_NOISE, BLOCK_NOISE = 0.3, 0.1, 0.5, 0.5
"""Of a lifelike query, of each head of its group, of a key, of all keys of a block; their mean has deviation 1.

Chosen so that a tile's union is as large as in SmolLM2-135M.
"""


@dataclass(frozen=True)
class Case:
    """Letters as everywhere; W: window; BS: tokens of a block; S: blocks that a query selects; inputs: of KINDS."""

    B: int
    T: int
    HQ: int
    H: int
    D: int
    W: int = 512
    BS: int = 64
    S: int = 16
    inputs: str = "gaussian"

    def letters(self) -> dict[str, int | str]:
        return {name: getattr(self, name) for name in ("B", "T", "HQ", "H", "D", "W", "BS", "S", "inputs")}


def make_inputs(case: Case, device: str, *, gradient: bool = False) -> list[Tensor]:
    """q, k, v and gates."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k = (gaussian if case.inputs == "gaussian" else lifelike)(case, device)
    v = torch.randn(case.B, case.T, case.H, case.D, device=device)
    gates = torch.rand(case.B, case.T, case.HQ, 3, device=device)
    return [x.to(dtype).requires_grad_(gradient) for x in (q, k, v, gates)]


def gaussian(case: Case, device: str) -> tuple[Tensor, Tensor]:
    q, k = (torch.randn(case.B, case.T, heads, case.D, device=device) for heads in (case.HQ, case.H))
    return q, k


def lifelike(case: Case, device: str) -> tuple[Tensor, Tensor]:
    draw = partial(torch.randn, device=device)
    mean = draw(case.B, 1, case.H, case.D)
    blocks = draw(case.B, -(-case.T // case.BS), case.H, case.D).repeat_interleave(case.BS, 1)[:, : case.T]
    k = mean + BLOCK_NOISE * blocks + KEY_NOISE * draw(case.B, case.T, case.H, case.D)
    shared = mean + QUERY_NOISE * draw(case.B, case.T, case.H, case.D)
    q = shared.repeat_interleave(case.HQ // case.H, 2)
    q += HEAD_NOISE * draw(*q.shape)
    return rotated(q), rotated(k)


def rotated(x: Tensor) -> Tensor:
    """`[B, T, heads, D]` turned by the positions, as in Llama."""
    time, size = x.shape[1], x.shape[3]
    frequency = ROTARY_BASE ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float64) / size)
    angle = torch.arange(time, device=x.device, dtype=torch.float64)[:, None] * frequency
    cos, sin = (wave.to(x.dtype)[:, None] for wave in (angle.cos(), angle.sin()))  # [T, 1, D / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass(frozen=True)
class Form:
    """An implementation of a case.

    Attributes:
        name: of the row.
        pattern: "sparse", "no window" (without the third branch) or "dense" (causal attention over everything).
        attend: what is measured.
        exact: what it computes, by the eager form; takes the op's positions as well.
        facts: what its rows tell beside their numbers.
    """

    name: str
    pattern: str
    attend: Attention
    exact: Attention
    facts: dict[str, str]


def forms_of_ours(case: Case) -> list[Form]:
    """Ours, and ours with a window of the query alone, which is what a peer without this branch compares with."""

    def form(name: str, pattern: str, window: int) -> Form:
        attend = partial(native_sparse_attention, block_size=case.BS, num_selected_blocks=case.S, window=window)
        return Form(name, pattern, attend, eager(attend), {})

    return [form("ours", "sparse", case.W), form("ours, no window", "no window", 1)]


def eager(attend: Attention) -> Attention:
    def exact(*inputs: Tensor, **positions: Tensor) -> Tensor:
        with use_implementation("eager"):
            return attend(*inputs, **positions)

    return exact


def exact_without_window(case: Case) -> Attention:
    """The compressed and the selected branch."""

    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, **positions: Tensor) -> Tensor:
        shut = gates * gates.new_tensor([1.0, 1.0, 0.0])
        return native_sparse_attention(
            q, k, v, shut, block_size=case.BS, num_selected_blocks=case.S, window=1, **positions
        )

    return eager(attend)


def exact_dense(case: Case) -> Attention:
    """Causal attention over everything, which the op is at positions below `dense_below`."""
    return eager(
        partial(native_sparse_attention, block_size=case.BS, num_selected_blocks=1, window=1, dense_below=case.T)
    )


def visible_pairs(case: Case, pattern: str) -> int:
    """(query, key or block, query head) triples that the pattern sees, over its branches, exactly."""
    tokens = torch.arange(1, case.T + 1)  # up to the query, itself included
    if pattern == "dense":
        seen = tokens
    else:
        blocks = -(-tokens // case.BS)
        in_own_block = tokens - (blocks - 1) * case.BS
        selected = (blocks.clamp(max=max(case.S, FORCED)) - 1) * case.BS + in_own_block
        seen = tokens // case.BS + selected
        if pattern == "sparse":
            seen = seen + tokens.clamp(max=case.W)
    return int(seen.sum()) * case.B * case.HQ
