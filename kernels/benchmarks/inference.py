"""Prefill and decode of hybrids in our engine beside their teacher, there and by transformers with torch's attention.

`PYTHONPATH=kernels python kernels/benchmarks/inference.py --sections llama-decode,million`; rows go to
recipes/results/inference-<gpu>.jsonl, where those of a section that is measured again take the place of the old ones,
tables and charts of all of them to the folder beside it.
Models have their true sizes and random weights, texts are random tokens: neither changes the time. `--tiny` tries all
of it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.inference_models import HALF_LINEAR, LALTE, LTE, Hybrid, random_hybrid, random_teacher
from hybridize.files import write_whole
from hybridize.inference.bench.clock import Effort, release
from hybridize.inference.bench.errors import reason
from hybridize.inference.bench.implementations import Implementation, dense, engine
from hybridize.inference.bench.limits import largest_batch, long_prefill
from hybridize.inference.bench.measure import Case, measure
from hybridize.inference.bench.run import dense_ways, machine
from hybridize.report.inference import tables, write_tables
from hybridize.report.tables import markdown

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parents[2] / "recipes" / "results"
SMOL, LLAMA, QWEN = "smollm2-135m", "llama-3-8b", "qwen3-1.7b"
K = 1024
CHUNK_TOKENS = 16 * K
MILLION = 1024 * K
ONE_READ = Effort(steps=1, seconds=0.0, repeats=1, warm_reads=0, read_seconds=0.0, read_repeats=1)
"""Of a prompt that takes seconds, with kernels that are warm."""
FEW_STEPS = Effort(steps=16, seconds=0.0, repeats=3, warm_reads=0, read_seconds=0.0, read_repeats=1)
"""Of a batch that fills the memory: a step takes long."""


@dataclass(frozen=True)
class Scale:
    """True sizes, or the same cases so small that a CPU does them."""

    tiny: bool

    @property
    def chunk_tokens(self) -> int:
        return 16 if self.tiny else CHUNK_TOKENS

    def context(self, tokens: int) -> int:
        """Another for each other length."""
        return 12 + 2 * tokens.bit_length() if self.tiny else tokens

    def case(self, batch: int, context_tokens: int) -> Case:
        return Case(min(batch, 2) if self.tiny else batch, self.context(context_tokens))

    def most(self, batch: int) -> int:
        """The largest batch that is tried."""
        return 4 if self.tiny else batch


Section = Callable[[Scale], Iterator[Row]]


def hybrid_way(model: str, hybrid: Hybrid, scale: Scale) -> Implementation:
    return engine(hybrid.name, random_hybrid(model, hybrid, tiny=scale.tiny), chunk_tokens=scale.chunk_tokens)


def teacher_ways(teacher: Any, scale: Scale) -> list[Implementation]:
    """By torch's kernels, and in our engine."""
    return [*dense_ways(teacher, compiled=False), engine("teacher, engine", teacher, chunk_tokens=scale.chunk_tokens)]


def in_turn(ways: Sequence[Implementation], case: Case, passes: Sequence[str], **options: Any) -> Iterator[Row]:
    """Two rounds, unless said otherwise; an error costs the others nothing."""
    yield from measure(
        ways,
        [case],
        prefill_limit_tokens=case.tokens,
        passes=passes,
        forgiven=lambda error: isinstance(error, Exception),
        **options,
    )


def decoding(
    model: str,
    hybrids: Sequence[Hybrid],
    cases: Sequence[tuple[int, int]],
    scale: Scale,
    compiled: tuple[int, int] | None = None,
) -> Iterator[Row]:
    """Steps of hybrids and teacher. To compile takes a minute: one case has it, in one round."""
    teacher = random_teacher(model, tiny=scale.tiny)
    ways = [*(hybrid_way(model, hybrid, scale) for hybrid in hybrids), *teacher_ways(teacher, scale)]
    for case in cases:
        yield from in_turn(ways, scale.case(*case), ("decode",))
    if compiled is not None and not scale.tiny:
        yield from in_turn([dense(teacher, "flash", compiled=True)], scale.case(*compiled), ("decode",), rounds=1)


def prefilling(model: str, hybrid: Hybrid, scale: Scale) -> Iterator[Row]:
    """Prompts of 32k, which warm all kernels up, and of 128k, which cuDNN reads faster than flash attention does."""
    teacher = random_teacher(model, tiny=scale.tiny)
    ways = [hybrid_way(model, hybrid, scale), *dense_ways(teacher, compiled=False)]
    yield from in_turn(ways, scale.case(1, 32 * K), ("prefill",))
    yield from in_turn(ways[:2], scale.case(1, 128 * K), ("prefill",), effort=ONE_READ)


def batches(model: str, hybrid: Hybrid, contexts: Sequence[int], most: int, scale: Scale) -> Iterator[Row]:
    """The largest batch of a hybrid and of its teacher, each with the memory of the GPU to itself."""
    makers: list[Callable[[], Implementation]] = [
        lambda: hybrid_way(model, hybrid, scale),
        lambda: dense(random_teacher(model, tiny=scale.tiny), "flash"),
        lambda: engine("teacher, engine", random_teacher(model, tiny=scale.tiny), chunk_tokens=scale.chunk_tokens),
    ]
    for make in makers:
        way = make()
        for context in contexts:
            yield guarded(way, scale.context(context), most)
        device = way.model.device
        del way
        release(device)


def guarded(way: Implementation, context: int, most: int) -> Row:
    """A row, or what went wrong: it must not cost the others theirs."""
    try:
        return largest_batch(way, context, most=most, effort=FEW_STEPS if way.model.device.type == "cuda" else None)
    except Exception as error:  # whatever an implementation raises
        return {"impl": way.name, "case": {"B": 1, "context": context}, "pass": "largest", "error": reason(error)}


def smol_decode(scale: Scale) -> Iterator[Row]:
    yield from decoding(SMOL, (LTE, LALTE), [(1, 1 * K), (1, 32 * K), (1, 128 * K)], scale, compiled=(1, 1 * K))


def smol_throughput(scale: Scale) -> Iterator[Row]:
    yield from decoding(SMOL, (LTE, LALTE), [(64, 32 * K)], scale)


def llama_prefill(scale: Scale) -> Iterator[Row]:
    yield from prefilling(LLAMA, HALF_LINEAR, scale)


def llama_decode(scale: Scale) -> Iterator[Row]:
    yield from decoding(LLAMA, (HALF_LINEAR,), [(1, 1 * K), (1, 128 * K)], scale)


def llama_batch(scale: Scale) -> Iterator[Row]:
    yield from batches(LLAMA, HALF_LINEAR, (32 * K, 128 * K), scale.most(4096), scale)


def qwen_prefill(scale: Scale) -> Iterator[Row]:
    yield from prefilling(QWEN, HALF_LINEAR, scale)


def million(scale: Scale) -> Iterator[Row]:
    """A text of a million tokens, by a hybrid of constant memory; the teacher's state alone would be 22 GiB."""
    model = random_hybrid(SMOL, LTE, tiny=scale.tiny)
    for name, recorded in ((f"{LTE.name}, recorded", True), (LTE.name, False)):
        way = engine(name, model, chunk_tokens=scale.chunk_tokens, record_reading=recorded)
        yield from long_prefill(way, scale.context(MILLION), scale.chunk_tokens)


SECTIONS: dict[str, tuple[str, Section]] = {
    "smol-decode": (SMOL, smol_decode),
    "smol-throughput": (SMOL, smol_throughput),
    "llama-prefill": (LLAMA, llama_prefill),
    "llama-decode": (LLAMA, llama_decode),
    "llama-batch": (LLAMA, llama_batch),
    "qwen-prefill": (QWEN, qwen_prefill),
    "million": (SMOL, million),
}
"""The model and what is measured, by name."""


class Results:
    """The file of rows: the machine, then section after section.

    Raises:
        SystemExit: the rows that are there were measured with other versions or on another machine.
    """

    def __init__(self, path: Path, head: Row) -> None:
        self.path, self.head = path, head
        self.rows: list[Row] = []
        if path.exists():
            old, *self.rows = map(json.loads, path.read_text().splitlines())
            if old != head:
                raise SystemExit(
                    f"{path} holds rows of {old}, and this is {head}: move it away, or give another --out."
                )

    def replace(self, section: str, rows: Sequence[Row]) -> None:
        """Writes the rows of a section in place of its old ones."""
        self.rows = [*(row for row in self.rows if row["section"] != section), *rows]
        order = list(SECTIONS)
        self.rows.sort(key=lambda row: order.index(row["section"]) if row["section"] in order else len(order))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (self.head, *self.rows)))


def finished(section: str, model: str, row: Row) -> Row:
    """A row as it is kept: with its section and model, numbers of four digits."""
    numbers = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    case = {"model": model, **row["case"]}
    return {"section": section, "op": "inference", **numbers, "case": case}


def measured_section(name: str, scale: Scale) -> list[Row]:
    """The rows of a section, printed as they come; an error ends the section and is its last row."""
    model, section = SECTIONS[name]
    rows: list[Row] = []
    try:
        for row in section(scale):
            rows.append(finished(name, model, row))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    except Exception as error:  # one section must not cost the others theirs
        rows.append({"section": name, "op": "inference", "case": {"model": model}, "error": reason(error)})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma separated")
    parser.add_argument("--tiny", action="store_true", help="tiny models and texts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args(arguments)
    chosen = options.sections.split(",")
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        raise SystemExit("inference.py times a CUDA GPU, and there is none; --tiny tries it without.")
    device = torch.device("cuda" if on_gpu else "cpu")
    head = machine(device, torch.bfloat16 if on_gpu else torch.float32)
    print(json.dumps(head), flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", (torch.cuda.get_device_name() if on_gpu else platform.machine()).lower())
    results = Results(options.out / f"inference-{name}.jsonl", head)
    for section in chosen:
        results.replace(section, measured_section(section, Scale(options.tiny)))
    rows = [row for row in results.rows if "impl" in row]
    for table in tables(rows):
        print(markdown(table))
    write_tables(head, rows, options.out / f"inference-{name}")


if __name__ == "__main__":
    main()
