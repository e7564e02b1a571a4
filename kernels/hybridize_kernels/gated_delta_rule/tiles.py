"""Tiles, warps and pipeline stages of the chunked kernels, by head sizes and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton import next_power_of_2


class Tile(NamedTuple):
    """How a kernel is cut.

    Attributes:
        columns: of the values that a program, or a step of its loop, holds at a time; 0: the kernel has no such tile.
        warps, stages: of a program and of its loop's pipeline.
        resident: programs that a processor holds at once.
        registers: the most that a thread may take, so that more programs fit; 0: as many as it likes.
    """

    columns: int
    warps: int
    stages: int
    resident: int = 1
    registers: int = 0


class Tiles(NamedTuple):
    """One tile a kernel, and the tokens of a chunk."""

    chunk: int
    within: Tile
    forward: Tile
    backward: Tile
    gradient: Tile
    transition: Tile


_TABLE = {
    # By the size of the keys, at most; measured on an H100 at (B, T, HS, D) = (8, 2048, 9, 64), (8, 4096, 16, 128)
    # and (8, 4096, 8, 256). Value tiles below 64 columns need a pipeline: without, Triton 3.6 compiles a read of
    # shared memory beyond its end.
    64: Tiles(64, Tile(0, 4, 1, 3, 168), Tile(32, 4, 3, 2), Tile(32, 4, 3, 2), Tile(32, 4, 2), Tile(64, 4, 2)),
    128: Tiles(64, Tile(0, 4, 1, 3, 168), Tile(32, 4, 2, 2), Tile(128, 8, 2), Tile(64, 8, 2), Tile(64, 4, 2)),
    256: Tiles(64, Tile(0, 4, 1), Tile(64, 4, 2), Tile(64, 8, 2), Tile(64, 8, 2), Tile(64, 8, 2)),
}
_TABLE_FP32 = {
    128: Tiles(64, Tile(0, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(16, 8, 1), Tile(32, 4, 1)),
    256: Tiles(32, Tile(0, 4, 1), Tile(16, 4, 1), Tile(16, 4, 1), Tile(16, 8, 1), Tile(16, 4, 1)),
}


def tiles_for(key_size: int, value_size: int, dtype: torch.dtype, *, compiled: bool = True) -> Tiles:
    """The tiles for heads of K and V numbers.

    Small heads take the tiles of larger ones, masked: those are the ones that were compared with fp64 on a GPU, and
    Triton 3.6 compiles some that are narrower wrongly. Interpreted, they are as narrow as the heads.
    """
    table = _TABLE_FP32 if dtype == torch.float32 else _TABLE
    tiles = table[min(size for size in table if size >= key_size)]
    if compiled:
        return tiles
    most = max(16, int(next_power_of_2(value_size)))
    chunk, *kernels = tiles
    return Tiles(chunk, *(tile._replace(columns=min(tile.columns, most)) for tile in kernels))
