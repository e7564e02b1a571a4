"""What retained attention is compared with: the same pattern in FlexAttention, and kernels of simpler patterns.

A peer's `pattern` says what it computes: "retained" is all of it, "window" leaves the retained tokens out (a lower
bound) and "dense" is causal attention over everything (what is replaced).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import median_ms
from benchmarks.retained_cases import Attention
from hybridize_kernels import eviction_position

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


@dataclass(frozen=True)
class Peer:
    """prepare: from score `[B, T, H]`, window, budget and query heads to the attention and what it tells by itself."""

    name: str
    pattern: str
    has_gradient: bool
    prepare: Callable[[Tensor, int, int | None, int], tuple[Attention, dict[str, Any]]]


def peers(*, on_gpu: bool, with_flex: bool) -> list[Peer]:
    dense = ["cudnn", "flash"] if on_gpu else ["math"]
    found = [Peer(f"sdpa-{name}", "dense", True, _dense(name)) for name in dense]
    if on_gpu:
        found.append(Peer("flash-window", "window", False, _flash_window))
    if with_flex:
        found.append(Peer("flex", "retained", on_gpu, _flex))
    return found


def _dense(backend: str) -> Callable[..., tuple[Attention, dict[str, Any]]]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return lambda score, window, budget, query_heads: (attend, {})


def _flash_window(score: Tensor, window: int, budget: int | None, query_heads: int) -> tuple[Attention, dict[str, Any]]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        time = q.shape[1]
        result: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, time, time, 0.0, True, False, window_size_left=window - 1, window_size_right=0
        )[0]
        return result

    return attend, {}


def _flex(score: Tensor, window: int, budget: int | None, query_heads: int) -> tuple[Attention, dict[str, Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # it compiles a shape once, and a limited number of them
    batch, time, heads = score.shape
    group = query_heads // heads
    positions = torch.arange(time, device=score.device).expand(batch, -1)
    evicted = eviction_position(score, positions, sinks=0, budget=budget, window=window)
    until = evicted.clamp(max=2**30).to(torch.int32).transpose(1, 2).contiguous()  # [B, H, T]

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        # A key that is not kept has its own position here, which makes this the window as well.
        return (j <= i) & (i - window < until[b, h // group, j])

    on_gpu = score.is_cuda

    def make_mask() -> Any:
        return create_block_mask(visible, batch, query_heads, time, time, device=score.device, _compile=on_gpu)

    mask = make_mask()
    compiled = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        result: Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=group > 1)
        return result.transpose(1, 2)

    return attend, {"mask_ms": median_ms(make_mask)}
