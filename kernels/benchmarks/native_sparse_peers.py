"""What native sparse attention is compared with: Flash Linear Attention's, and dense attention, which it replaces.

FLA covers groups of 16, 32, .. query heads a key head. It is called without its window, which takes FlashAttention's
package: beside it stands ours without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.native_sparse_cases import Attention, Case, Form, exact_dense, exact_without_window

PEERS = ("fla", "dense")
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
FLA_SMALLEST_GROUP = 16


def peers(case: Case, names: Sequence[str], *, on_gpu: bool) -> list[Form]:
    """Those of PEERS named that are installed and cover the case."""
    found = []
    if "fla" in names and on_gpu and find_spec("fla") is not None and fla_covers(case):
        found.append(Form("FLA", "no window", _fla(case), exact_without_window(case), {"version": version("fla-core")}))
    if "dense" in names:
        found += dense(case, ("cudnn", "flash") if on_gpu else ("math",))
    return found


def fla_covers(case: Case) -> bool:
    group = case.HQ // case.H
    return group >= FLA_SMALLEST_GROUP and group & (group - 1) == 0


def dense(case: Case, backends: Sequence[str]) -> list[Form]:
    return [Form(f"sdpa-{name}", "dense", _sdpa(name), exact_dense(case), {}) for name in backends]


def _sdpa(backend: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


def _fla(case: Case) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        # Imported here: inside of what is guarded.
        output: Tensor = import_module("fla.ops.nsa").parallel_nsa(
            q,
            k,
            v,
            g_cmp=gates[..., 0],
            g_slc=gates[..., 1],
            block_counts=case.S,
            block_size=case.BS,
            window_size=0,
        )
        return output

    return attend
