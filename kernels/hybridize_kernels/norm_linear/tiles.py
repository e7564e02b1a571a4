"""How the kernel of few rows shares out a weight: from sizes alone, or as the environment says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import triton

VARIABLE = "HYBRIDIZE_NORM_LINEAR"
"""Overrides the table: `vector=4,1024,4,1;matrix=16,256,4,4`, in the order of `Tile`'s fields."""

MAX_ROWS = 16
"""Rows of x that the kernel takes; a matrix product's tile has as many columns."""
ENOUGH = 264
"""Programs that keep an H100 busy: two for each of its multiprocessors."""


@dataclass(frozen=True)
class Tile:
    """How a program walks over its rows of the weight.

    Attributes:
        outputs: results of a program; with swiglu it reads twice as many rows of the weight.
        width: numbers of a row that are taken at a time. warps: of a program.
        stages: tiles of the weight in flight; of the matrix form alone, the vector form has two.
    """

    outputs: int
    width: int
    warps: int
    stages: int = 1


# One row of 16-bit numbers, by results, size and halves: what is fastest in a whole step of SmolLM2-135M on an H100.
MEASURED = {
    (960, 576, 1): Tile(1, 512, 2),
    (576, 576, 1): Tile(1, 1024, 4),
    (1536, 576, 2): Tile(4, 1024, 4),
    (576, 1536, 1): Tile(2, 1024, 2),
    (49152, 576, 1): Tile(8, 1024, 2),
}


@lru_cache(maxsize=1024)
def tile_of(rows: int, outputs: int, size: int, halves: int, item_bytes: int, override: str | None) -> Tile:
    """The tile for `rows` rows of x and `outputs` results of `halves` (1, or 2 with swiglu) rows of the weight each.

    size: numbers of a row; item_bytes: bytes of one.
    """
    name = "vector" if rows == 1 else "matrix"
    given = dict(part.split("=") for part in override.split(";")) if override else {}
    if name in given:
        return Tile(*map(int, given[name].split(",")))
    if rows == 1 and item_bytes == 2 and (outputs, size, halves) in MEASURED:
        return MEASURED[outputs, size, halves]
    make = _vector if rows == 1 else _matrix
    return make(outputs, size, halves, item_bytes)


def tiles_override() -> str | None:
    """What `VARIABLE` says, asked for once a call."""
    return os.environ.get(VARIABLE)


def _vector(outputs: int, size: int, halves: int, item_bytes: int) -> Tile:
    """A thread reads 16 bytes of each row at a time, and a warp's threads lie side by side in it."""
    of_warp = 32 * 16 // item_bytes
    warps = min(8 if size >= 16 * of_warp else 4, int(triton.next_power_of_2(triton.cdiv(size, of_warp))))
    width = warps * of_warp
    most = (16 if size <= width else 8) // halves
    return Tile(_outputs(outputs, 1 if halves == 2 else 2, most), width, warps)


def _matrix(outputs: int, size: int, halves: int, item_bytes: int) -> Tile:
    if item_bytes == 4:  # no matrix unit takes them: the sums need the registers
        return Tile(16, 64, 4, 2)
    width = max(64, min(128, int(triton.next_power_of_2(size))))
    return Tile(_outputs(outputs, 16, 32), width, 2, 4)


def _outputs(outputs: int, least: int, most: int) -> int:
    """As many results a program as leave enough programs."""
    found = most
    while found > least and triton.cdiv(outputs, found) < ENOUGH:
        found //= 2
    return found
