"""A decoding step of native sparse attention as three Triton launches, and the scratch memory between them."""

import os
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import is_capturing
from ..launch import launch
from .append import append_kernel
from .chosen import choose_kernel
from .eager import ALWAYS_CHOSEN
from .selected import selected_kernel

SETTINGS_VARIABLE = "HYBRIDIZE_NATIVE_SPARSE_DECODE"
"""Environment variable that overrides the table below: "block_slots,num_warps,num_stages,num_programs"."""

# By bytes of one key in memory, at most: slots a tile, warps, stages, and the programs to aim at in each launch.
SETTINGS = {
    128: (64, 2, 3, 264),
    256: (64, 4, 3, 264),
    512: (32, 4, 2, 264),
    1024: (16, 4, 2, 264),
}
MAX_SPLITS = 64
CHOICES_A_WARP = 1024
"""Blocks whose importance a warp holds: 32 a thread."""
LARGE_TILE = 8192
"""Numbers of a group's output above which a program takes eight warps at least."""
SCRATCH = "native_sparse_decode"
ALIGNED = 32
"""Numbers of scratch memory between which its pieces begin: whole lines of the cache."""
LOG2_E = 1.4426950408889634


class Sizes(NamedTuple):
    """What places everything in the scratch memory.

    Attributes:
        batch, heads, group, head_size, blocks: B, H, G, D and the blocks of the cache.
        most_chosen: blocks, at most.
        block_splits, window_splits, selected_splits: programs a head of a row for each branch.
    """

    batch: int
    heads: int
    group: int
    head_size: int
    blocks: int
    most_chosen: int
    block_splits: int
    window_splits: int
    selected_splits: int


class Scratch(NamedTuple):
    """fp32, views of one tensor. `done` is zero between two steps: how many programs of a head have finished.

    Attributes:
        parts, maxima, totals: `[B, H, block and window splits, G, D]` and `[..., G]`: the branches' partial softmaxes.
        selected, selected_maxima, selected_totals: the same of the selected branch.
        logits: `[B, H, G, blocks]`, to the base 2. chosen: `[B, H, most_chosen]`. others: `[B, HQ, D]`.
        done: `[B, H]`.
    """

    parts: Tensor
    maxima: Tensor
    totals: Tensor
    selected: Tensor
    selected_maxima: Tensor
    selected_totals: Tensor
    logits: Tensor
    chosen: Tensor
    others: Tensor
    done: Tensor


def settings(row_bytes: int) -> tuple[int, int, int, int]:
    """Slots a tile, warps, stages and programs to aim at for keys of so many bytes."""
    override = os.environ.get(SETTINGS_VARIABLE)
    if override:
        block, warps, stages, programs = (int(part) for part in override.split(","))
        return block, warps, stages, programs
    return SETTINGS[min(size for size in SETTINGS if size >= min(row_bytes, max(SETTINGS)))]


def sizes_of(
    keys: Tensor, query_heads: int, *, block_size: int, num_selected_blocks: int, window: int, dense_below: int
) -> Sizes:
    """Of steps on keys `[B, capacity, H, D]`: the sizes of the cache decide, not how full it is."""
    batch, capacity, heads, head_size = keys.shape
    block, _, _, programs = settings(head_size * keys.element_size())
    wanted = min(-(-programs // max(batch * heads, 1)), MAX_SPLITS)
    most_chosen = max(num_selected_blocks, ALWAYS_CHOSEN)
    selected = min(max(most_chosen * block_size, dense_below), capacity)
    splits = [
        max(1, min(wanted, -(-slots // block))) for slots in (capacity // block_size, min(window, capacity), selected)
    ]
    return Sizes(batch, heads, query_heads // heads, head_size, capacity // block_size, most_chosen, *splits)


def scratch_of(sizes: Sizes, device: torch.device, workspace: dict[str, Tensor] | None) -> Scratch:
    """Scratch memory for steps of these sizes, from the workspace if it is there."""
    heads = sizes.batch * sizes.heads
    parts = heads * (sizes.block_splits + sizes.window_splits) * sizes.group
    selected = heads * sizes.selected_splits * sizes.group
    numbers = [
        parts * sizes.head_size,
        parts,
        parts,
        selected * sizes.head_size,
        selected,
        selected,
        heads * sizes.group * sizes.blocks,
        heads * sizes.most_chosen,
        heads * sizes.group * sizes.head_size,
        heads,
    ]
    numbers = [-(-number // ALIGNED) * ALIGNED for number in numbers]
    # Told apart by all that places the counters in it: another layout of the same size would take sums for counters.
    name = " ".join((SCRATCH, *map(str, sizes)))
    whole = None if workspace is None else workspace.get(name)
    if whole is None or whole.device != device:
        whole = torch.empty(sum(numbers), dtype=torch.float32, device=device)
        whole[-numbers[-1] :].zero_()
        # What a graph that is being captured allocates and clears is its own: nobody else may count on it.
        if workspace is not None and not is_capturing(device):
            workspace.clear()
            workspace[name] = whole
    return Scratch(*whole.split(numbers))


def native_sparse_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    keys: Tensor,
    values: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    num_selected_blocks: int,
    window: int,
    positions: Tensor,
    dense_below: int,
    scale: float,
    key_pooling: Tensor | None = None,
    value_pooling: Tensor | None = None,
    workspace: dict[str, Tensor] | None = None,
) -> Tensor:
    """See `hybridize_kernels.native_sparse_decode`."""
    q, k, v, gates = q.contiguous(), k.contiguous(), v.contiguous(), gates.contiguous()
    output = torch.empty_like(q)
    if q.numel() == 0:
        return output
    capacity, head_size = keys.shape[1], q.shape[3]
    # Beyond the capacity they mean the same, and the kernels count in 32 bits.
    window, num_selected_blocks = min(window, capacity), min(num_selected_blocks, capacity // block_size + 1)
    dense_below = min(max(dense_below, 0), capacity)
    sizes = sizes_of(
        keys,
        q.shape[2],
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        window=window,
        dense_below=dense_below,
    )
    scratch = scratch_of(sizes, q.device, workspace)
    block, num_warps, num_stages, _ = settings(head_size * keys.element_size())
    tile = {
        "G": sizes.group,
        "D": head_size,
        "BLOCK_G": max(16, triton.next_power_of_2(sizes.group)),  # the fewest rows of a matrix product
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_S": block,
    }
    if tile["BLOCK_G"] * tile["BLOCK_D"] > LARGE_TILE:
        num_warps = max(num_warps, 8)
    heads, stride = sizes.batch * sizes.heads, positions.stride(0)
    # The longest axis goes first: the others end at 65535.
    launch(
        append_kernel,
        (heads, sizes.block_splits + sizes.window_splits),
        (
            q,
            k,
            v,
            keys,
            values,
            compressed_k,
            compressed_v,
            lengths,
            positions,
            lengths if key_pooling is None else key_pooling.contiguous(),
            lengths if value_pooling is None else value_pooling.contiguous(),
            scratch.parts,
            scratch.maxima,
            scratch.totals,
            scratch.logits,
        ),
        (
            stride,
            scale * LOG2_E,
            sizes.heads,
            capacity,
            sizes.blocks,
            block_size,
            window,
            dense_below,
            sizes.block_splits,
            sizes.window_splits,
        ),
        **tile,
        LEARNED=key_pooling is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    choices = max(16, triton.next_power_of_2(sizes.blocks))
    launch(
        choose_kernel,
        (heads, 1 + sizes.group),
        (
            gates,
            positions,
            scratch.parts,
            scratch.maxima,
            scratch.totals,
            scratch.logits,
            scratch.chosen,
            scratch.others,
        ),
        (
            stride,
            sizes.heads,
            capacity,
            sizes.blocks,
            block_size,
            num_selected_blocks,
            dense_below,
            sizes.most_chosen,
            sizes.block_splits,
            sizes.window_splits,
        ),
        G=sizes.group,
        D=head_size,
        BLOCK_D=tile["BLOCK_D"],
        BLOCK_C=choices,
        BLOCK_PARTS=MAX_SPLITS,
        TILE=max(1, 2048 // tile["BLOCK_D"]),
        num_warps=max(4, choices // CHOICES_A_WARP),
        num_stages=2,
    )
    launch(
        selected_kernel,
        (heads, sizes.selected_splits),
        (
            q,
            gates,
            keys,
            values,
            positions,
            scratch.chosen,
            scratch.others,
            output,
            scratch.selected,
            scratch.selected_maxima,
            scratch.selected_totals,
            scratch.done,
        ),
        (
            stride,
            scale * LOG2_E,
            sizes.heads,
            capacity,
            block_size,
            num_selected_blocks,
            dense_below,
            sizes.most_chosen,
            sizes.selected_splits,
        ),
        **tile,
        SPLIT=sizes.selected_splits > 1,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return output
