"""Students, teachers and plain models of true sizes with random weights, and one step of each to be timed."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Student, wrap
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.processes import Processes
from hybridize.distillation.run import prepare_pair
from hybridize.distillation.run_state import RunState
from hybridize.distillation.sharding import Sharding
from hybridize.distillation.signals import StopRequest
from hybridize.distillation.teacher import AttentionTrace, Teacher
from hybridize.distillation.top_k import TopK
from hybridize.distillation.trainer import Trainer
from hybridize.mixers.registry import config_class
from hybridize.model.swap import swap
from hybridize.progress import SILENT
from hybridize.recipe.schema import Data, Distill, Lora, Stage
from hybridize.recipe.sources import TextSource

WARM_STEPS, STEPS = 4, 8
TOP_K = 64
MODELS = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
}
EVICTION = {
    "mixer": "token_eviction",
    "window_tokens": 512,
    "budget_tokens": 512,
    "score_gradient": "straight_through",
    "score_relaxation": "gate",
    "future_attention": 0.0,
    "detach_scorer_input": False,
    "budget_control": "l1",
}
"""With the paper's gradient, so that the rows in results/ are of one thing."""
MIXERS: dict[str, dict[str, Any]] = {
    "T": EVICTION,
    "E": {**EVICTION, "scorer_dropout": 0.0},
    "G": {"mixer": "gated_delta_net"},
    "N": {"mixer": "native_sparse_attention", "compression": "mean", "block_attention": 0.0},
    "F": {"mixer": "full_attention"},
}


@dataclass(frozen=True)
class Case:
    """A model's name and the shape of a micro-batch; `pattern` says which mixer a layer has, letters in turn."""

    model: str
    sequences: int
    tokens: int
    pattern: str = "TG"
    checkpointing: bool | Literal["auto"] = False

    @property
    def letters(self) -> dict[str, Any]:
        return {"model": self.model, "B": self.sequences, "T": self.tokens}


class RandomSequences:
    """Random tokens in place of a stream of documents; each row is one text, dealt out as `PackedSequences` does."""

    def __init__(self, vocabulary: int, rank: int, num: int) -> None:
        self.vocabulary, self.rank, self.num = vocabulary, rank, num
        self.generator = torch.Generator().manual_seed(0)

    def next_batches(self, count: int, num_sequences: int, sequence_tokens: int) -> tuple[Batch, ...]:
        shape = (num_sequences, count, self.num, sequence_tokens)
        tokens = torch.randint(self.vocabulary, shape, generator=self.generator)[:, :, self.rank]
        return tuple(Batch(each.contiguous(), ("random",)) for each in tokens.unbind(1))

    def state_dict(self) -> dict[str, Any]:
        return {}


class StoredTeacher:
    """A teacher whose next tokens are at hand: what a step costs when a cache gives them."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.vocabulary: int = teacher.model.config.vocab_size

    def targets(self, batch: Batch) -> TopK:
        shape, device = (*batch.tokens.shape, TOP_K), batch.tokens.device
        first = torch.randint(self.vocabulary - TOP_K, shape[:2], device=device, dtype=torch.int32)
        ids = first[..., None] + torch.arange(TOP_K, device=device, dtype=torch.int32)
        ratios = torch.linspace(0.0, -8.0, TOP_K, device=device).log_softmax(-1) - 0.05
        return TopK(ids, ratios.expand(shape).contiguous())

    def trace(self, batch: Batch, layers: Iterable[int]) -> dict[int, AttentionTrace]:
        return self.teacher.trace(batch, layers)


class _Unsaved(RunState):
    """Nothing is written: the time of a step is asked for."""

    def save(self, *args: Any, **kwargs: Any) -> None:
        return


def random_model(name: str, device: torch.device) -> Any:
    """A model of that size with random weights in bfloat16, the same in every process."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(MODELS[name])
    finally:
        torch.set_default_dtype(torch.float32)


def pair(case: Case, device: torch.device, sharding: Sharding | None = None) -> tuple[Student, Teacher]:
    """The student of a case with LoRA of rank 16, and its teacher; what is frozen exists once."""
    teacher = random_model(case.model, device)
    with torch.device("meta"):
        student = LlamaForCausalLM(MODELS[case.model]).to(torch.bfloat16)
    student.load_state_dict(teacher.state_dict(), assign=True)
    student.model.rotary_emb = teacher.model.rotary_emb
    student.tie_weights()
    letters = [case.pattern[index % len(case.pattern)] for index in range(student.config.num_hidden_layers)]
    options = {letter: dict(values) for letter, values in MIXERS.items()}
    configs = {letter: config_class(values.pop("mixer"))(**values) for letter, values in options.items()}
    wrapped = wrap(swap(student, [configs[letter] for letter in letters]), Lora(16, 32.0), frozen_dtype=torch.bfloat16)
    return prepare_pair(wrapped, Teacher(teacher), share=True, device=device, sharding=sharding)


def distillation(case: Case, **options: Any) -> dict[str, float]:
    """Median tokens a second of all processes, and the largest memory of one, in steps of `train`."""
    rows, peak_bytes = train(case, **options)
    return {"tokens_per_s": median(row["tokens_per_s"] for row in rows[WARM_STEPS:-1]), "peak_bytes": peak_bytes}


def train(
    case: Case,
    *,
    live: bool = True,
    kind: Literal["align", "distill"] = "distill",
    passes: int = 1,
    accumulate: int = 1,
    sharding: Sharding | None = None,
    steps: int = WARM_STEPS + STEPS,
) -> tuple[list[dict[str, Any]], float]:
    """The trainer's own steps, numbers read and logged.

    Args:
        live: the teacher is asked; else its next tokens are at hand.
        sharding: how both models are spread over the processes; None: each process has both whole.

    Returns:
        the lines of metrics.jsonl, and the largest memory of a process in bytes.
    """
    processes = Processes(Accelerator(mixed_precision="no"))
    processes.sharding = sharding
    student, teacher = pair(case, processes.device, sharding)
    stage = Stage(
        "bench",
        kind,
        steps=steps,
        batch_sequences=case.sequences,
        sequence_tokens=case.tokens,
        accumulate=accumulate,
        learning_rate=1e-4,
        passes=passes,
    )
    distill = Distill((stage,), save_every_steps=10**6, gradient_checkpointing=case.checkpointing)
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = MetricsFile(folder / "metrics.jsonl", 0)
        Trainer(
            distill,
            Data((TextSource("random"),)),
            student,
            teacher if live else StoredTeacher(teacher),
            RandomSequences(student.model.config.vocab_size, processes.index, processes.count),  # type: ignore[arg-type]
            _Unsaved(folder, 1),
            metrics,
            processes,
            True,
            SILENT,
            StopRequest(),
            0,
        ).train(None)
        metrics.close()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    peak_bytes = torch.tensor(float(torch.cuda.max_memory_allocated()), device=processes.device)
    return rows, float(processes.accelerator.gather(peak_bytes[None]).max())


def plain_training(case: Case) -> dict[str, float]:
    """transformers' model in bf16, AdamW, a chunked head: a step of ordinary training."""
    model = random_model(case.model, torch.device("cuda")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (case.sequences, case.tokens), device="cuda")

    def step() -> None:
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        chunked_cross_entropy(hidden, model.lm_head.weight, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, tokens.numel())


def forward_alone(case: Case) -> dict[str, float]:
    """transformers' forward pass in bf16 without a head: what a teacher costs there."""
    model = random_model(case.model, torch.device("cuda")).eval()
    tokens = torch.randint(model.config.vocab_size, (case.sequences, case.tokens), device="cuda")
    with torch.no_grad():
        return timed(lambda: model.model(input_ids=tokens, use_cache=False), tokens.numel())


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor, chunk: int = 8192) -> Tensor:
    """Mean next-token loss; logits exist for a chunk at a time."""

    def part(rows: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy((rows @ weight.T).float(), labels, reduction="sum")

    rows, labels = hidden[:, :-1].flatten(0, 1).split(chunk), tokens[:, 1:].flatten().split(chunk)
    parts = [checkpoint(part, x, y, use_reentrant=False) for x, y in zip(rows, labels, strict=True)]
    return torch.stack(parts).sum() / (tokens.numel() - len(tokens))


def timed(step: Callable[[], Any], tokens: int) -> dict[str, float]:
    """Median tokens a second, and the largest memory."""
    for _ in range(WARM_STEPS):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {"tokens_per_s": tokens / median(seconds), "peak_bytes": torch.cuda.max_memory_allocated()}
