"""How a row of logits is walked over, and how many rows exist at one time: the table that `make bench` chose from."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import triton

VARIABLE = "HYBRIDIZE_DISTILLATION_LOSS"
"""Overrides the table: `full=2048,4,4,1;top_k=4096,8,3,1;frozen=192;trained=384;most=640`.

Tiles in the order of `Tile`'s fields.
"""

ROW = 16
"""Rows of logits begin at multiples of this many numbers, so that they are read 16 bytes at a time."""

ENOUGH_TOKENS = 1024
"""With fewer tokens a chunk's products with a large head run slower: it gets more memory for them, up to a limit."""

ROUND_TOKENS = 128
"""Chunks are multiples of a matrix product's tile where they hold as much."""


@dataclass(frozen=True)
class Tile:
    """Columns that a program holds at a time, its warps, the stages of its loads, and the second pass's direction.

    back: it goes back from the row's end (1), or begins again (0), which is better where the rows of all programs that
    run at one time fit into the cache.
    """

    columns: int
    warps: int
    stages: int
    back: int = 1

    def for_vocabulary(self, vocabulary: int) -> Tile:
        """No wider than the vocabulary, and a thread has at least four columns."""
        columns = min(self.columns, int(triton.next_power_of_2(vocabulary)))
        return replace(self, columns=columns, warps=max(1, min(self.warps, columns // 128)))


@dataclass(frozen=True)
class Table:
    """full, top_k: the tiles of the two kernels. frozen, trained: MiB of a chunk's logits, by the student's head.

    A trained head's gradient is added to in fp32 once a chunk, which takes more time than its product where chunks are
    small: they are larger then. most: MiB that a chunk of `ENOUGH_TOKENS` may take for a large vocabulary.
    """

    full: Tile = Tile(2048, 4, 4)
    top_k: Tile = Tile(4096, 8, 3)
    frozen: int = 192
    trained: int = 384
    most: int = 640


def table() -> Table:
    """The table, as the environment has it."""
    found = Table()
    if override := os.environ.get(VARIABLE):
        for name, value in (part.split("=") for part in override.split(";")):
            first, *others = (int(number) for number in value.split(","))
            given: Any = Tile(first, *others) if others else first
            found = replace(found, **{name: given})
    return found


def row_numbers(vocabulary: int) -> int:
    """From the beginning of a row of logits to the next one's."""
    return int(triton.cdiv(vocabulary, ROW)) * ROW


def chunk_size(tokens: int, token_bytes: int, *, trained: bool) -> int:
    """Tokens of a chunk, where one takes `token_bytes` of logits: about the same for all chunks."""
    sizes, token_bytes = table(), max(1, token_bytes)
    usual = ((sizes.trained if trained else sizes.frozen) << 20) // token_bytes
    most = max(1, usual, min(ENOUGH_TOKENS, (sizes.most << 20) // token_bytes))
    if most >= ROUND_TOKENS:
        most -= most % ROUND_TOKENS
    chunks = max(1, triton.cdiv(tokens, most))
    even = int(triton.cdiv(triton.cdiv(tokens, chunks), ROUND_TOKENS)) * ROUND_TOKENS
    return max(1, min(tokens, most, even))
