"""Conversions of one teacher by variants of a recipe: each is trained and measured in place, one row a variant.

`PYTHONPATH=kernels python kernels/benchmarks/variants.py VARIANTS.yaml --out ROWS.jsonl`, where the file names a
recipe, the settings that all have in common and those of each variant, as `--set` takes them:

    recipe: smollm2-135m--lte.yaml
    set: [distill.stages.0.steps=300]
    measure: {haystack: [essays/*.txt], samples: 8}
    variants:
      paper: [mixers.T.score_gradient=straight_through]
      future attention alone: [mixers.T.score_gradient=none]

The teacher is loaded and questioned once; a variant starts from it as `hybridize convert` does, is trained as
`hybridize distill` does, and is measured: adapters merged, weights in bfloat16 on a GPU. Variants that ROWS.jsonl
already holds are left out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.distillation import device_row
from hybridize.distillation.calibration import device_name
from hybridize.distillation.data import PackedSequences
from hybridize.distillation.lora import Student, save_adapter, wrap
from hybridize.distillation.metrics import MetricsFile
from hybridize.distillation.processes import start_processes
from hybridize.distillation.run import prepare_pair, seed_everything, use_bfloat16
from hybridize.distillation.run_state import RunState
from hybridize.distillation.signals import StopRequest
from hybridize.distillation.teacher import Teacher
from hybridize.distillation.trainer import Trainer
from hybridize.evaluation.asking import ask
from hybridize.evaluation.items import Item
from hybridize.evaluation.parts import mean_of
from hybridize.evaluation.perplexity import perplexity
from hybridize.evaluation.recall import gather
from hybridize.evaluation.scores import score_windows
from hybridize.evaluation.tasks import make_items
from hybridize.evaluation.windows import Window, make_windows
from hybridize.model import training_form
from hybridize.model.load import load_teacher, load_tokenizer
from hybridize.model.swap import swap
from hybridize.plan import ConversionPlan, plan
from hybridize.progress import SILENT
from hybridize.recipe.documents import read_documents
from hybridize.recipe.probes import RecallProbe
from hybridize.recipe.reader import load_recipe
from hybridize.recipe.schema import Recipe
from hybridize.recipe.sources import TextSource

EDGES = (0, 512, 1024, 2048, 4096)
ASKED_TOKENS = 2**18
SCORED_TOKENS = 2**15
LOGGED = ("loss", "kl", "agreement", "error", "retention_target", "eviction_budget")


@dataclass(frozen=True)
class Questions:
    """What every variant is asked; the same for all."""

    items: Sequence[Item]
    windows: Sequence[Window]
    teacher_scores: Sequence[float]


class Unsaved(RunState):
    """A variant that is cut off begins again: it takes a minute or two."""

    def save(self, progress: Any, tensors: Any) -> None:
        pass


def train(recipe: Recipe, made: ConversionPlan, model: Any, tokenizer: Any, folder: Path) -> tuple[Student, float, int]:
    """The trained student of a recipe; seconds, and tokens.

    model: the teacher with its weights as they were loaded; it is put on the device.
    """
    if recipe.data is None or recipe.distill is None:
        raise SystemExit("The recipe trains nothing.")
    processes = start_processes()
    mixed = use_bfloat16(recipe.distill.precision, processes.device)
    torch.manual_seed(made.seed)
    hybrid = swap(copy.deepcopy(model), made.layers)
    seed_everything(made.seed)
    frozen_dtype = torch.bfloat16 if mixed else torch.float32
    student = wrap(hybrid, recipe.distill.lora, frozen_dtype=frozen_dtype)
    teacher = Teacher(copy.deepcopy(model).to(frozen_dtype))
    student, teacher = prepare_pair(student, teacher, share=recipe.distill.share_weights, device=processes.device)
    base = recipe.origin.base if recipe.origin else Path()
    sequences = PackedSequences.from_recipe(recipe.data, tokenizer, base=base, seed=made.seed, offline=True)
    metrics = MetricsFile(folder / "metrics.jsonl", 0)
    begun = time.perf_counter()
    trainer = Trainer(
        distill=recipe.distill,
        data=recipe.data,
        student=student,
        teacher=teacher,
        sequences=sequences,
        state=Unsaved(folder / "checkpoints", 1),
        metrics=metrics,
        processes=processes,
        mixed=mixed,
        reporter=SILENT,
        stop=StopRequest(),
        seed=made.seed,
    )
    trainer.train(None)
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    metrics.close()
    training_form.leave(student.model)
    return student, time.perf_counter() - begun, trainer.progress.tokens


def measure(model: Any, teacher: Any, tokenizer: Any, questions: Questions) -> dict[str, Any]:
    """Recall by task and length; perplexity at the last positions beside the teacher's, and divergence from it."""
    with SILENT.task("", None) as task:
        own = ask(model, tokenizer, questions.items, batch_tokens=ASKED_TOKENS, task=task)
        scores = score_windows(model, teacher, questions.windows, batch_tokens=SCORED_TOKENS, task=task)
    recall = gather(questions.items, {"student": own, "teacher": questions.teacher_scores})
    last = perplexity(scores, EDGES)["by_position"][-1]
    needles = {
        f"{task}@{length}": {name: cell["student"][name] for name in ("share", "low", "high", "samples")}
        for task, lengths in recall["tasks"].items()
        for length, cell in lengths.items()
    }
    divergence = mean_of([score.kl for score in scores if score.kl is not None]).value
    return {name: last[name] for name in ("student", "teacher", "ratio", "ratio_se")} | {
        "kl": divergence,
        "needles": needles,
    }


def prepare_questions(spec: dict[str, Any], base: Path, teacher: Any, tokenizer: Any, seed: int) -> Questions:
    """Needles in noise and in the texts of `haystack`, and windows of these texts; the teacher's answers."""
    sources = tuple(TextSource(path=str(path)) for path in spec["haystack"])
    documents = [document for source in sources for document in read_documents(source, base, offline=True)]
    probe = RecallProbe(
        tasks=tuple(spec.get("tasks", ("niah_single_1", "niah_single_2"))),
        lengths=tuple(spec.get("lengths", (2048, 4096))),
        depths=tuple(spec.get("depths", (0.0, 0.2, 0.4, 0.6, 0.8))),
        samples=spec.get("samples", 8),
    )
    items = make_items(probe, tokenizer, [document.text for document in documents], seed=seed)
    windows = make_windows(documents, tokenizer, context_tokens=EDGES[-1], max_windows=spec.get("windows", 24))
    with SILENT.task("", None) as task:
        scores = ask(teacher, tokenizer, items, batch_tokens=ASKED_TOKENS, task=task)
    return Questions(items, windows, scores)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("variants", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="rows, appended")
    parser.add_argument("--only", nargs="*", help="names of variants; all unless given")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no variant is begun after so long")
    parser.add_argument("--set", action="append", default=[], help="for all variants, after their own")
    parser.add_argument("--keep", type=Path, help="folder for what was trained, a file a variant")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    spec = yaml.safe_load(options.variants.read_text(encoding="utf-8"))
    base = options.variants.absolute().parent
    known = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    done = {row["variant"] for row in known if "variant" in row and "error" not in row}
    device = start_processes().device
    common = list(spec.get("set", ()))
    first = load_recipe(base / spec["recipe"], overrides=[*common, *options.set])
    model = load_teacher(first.model, dtype=torch.float32, offline=True)
    tokenizer = load_tokenizer(first.model, offline=True)
    teacher = used(copy.deepcopy(model), device)
    questions = prepare_questions(spec["measure"], base, teacher, tokenizer, first.seed)
    if not known:
        append(options.out, device_row() if device.type == "cuda" else {"device": device_name(device)})
        append(options.out, {"variant": "teacher", **measure(teacher, teacher, tokenizer, questions)})
    for name, settings in spec["variants"].items():
        if name in done or (options.only and name not in options.only):
            continue
        if time.perf_counter() - begun > options.seconds:
            break
        # What the command line sets is the same for all, and may hold paths of this machine.
        row: dict[str, Any] = {"op": "conversion", "variant": name, "set": [*common, *settings]}
        try:
            recipe = load_recipe(base / spec["recipe"], overrides=[*row["set"], *options.set])
            row["seed"] = recipe.seed
            row |= converted(recipe, model, teacher, tokenizer, questions, options.keep and options.keep / name)
        except Exception as error:  # the others are worth having
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
        append(options.out, row)
        gc.collect()
        torch.cuda.empty_cache()


def converted(
    recipe: Recipe, model: Any, teacher: Any, tokenizer: Any, questions: Questions, keep: Path | None
) -> dict[str, Any]:
    """What is measured of a recipe's hybrid."""
    made = plan(recipe)
    with tempfile.TemporaryDirectory() as folder:
        student, seconds, tokens = train(recipe, made, model, tokenizer, Path(folder))
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        save_adapter(student, keep)
    begun = time.perf_counter()
    found = measure(used(student.peft.merge_and_unload(), teacher.device), teacher, tokenizer, questions)
    return {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "measured_seconds": round(time.perf_counter() - begun, 1),
        **found,
        "last_step": {name: value for name, value in json.loads(lines[-1]).items() if name in LOGGED},
    }


def used(model: Any, device: torch.device) -> Any:
    """A model in the dtype of use, on the device."""
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).to(device).eval()


def append(path: Path, row: dict[str, Any]) -> None:
    """Writes a row to the end of the file, and to the screen."""
    line = json.dumps(row)
    print(line, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
