"""A tiny run from end to end: a teacher with a byte-like tokenizer on disk, converted, ready to distil.

Run as a script it distils a prepared folder, so that tests can kill it: `python runs.py RUN [key=value ...]`.
"""

from __future__ import annotations

import json
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridize.recipe.schema import Data, Distill, LayerPlan, Lora, Loss, MixerChoice, Ramp, Recipe, Stage, TextSource

CHARACTERS = string.ascii_letters + string.digits + " .,\n'-"
MIXERS = {
    "T": MixerChoice(
        "token_eviction", {"window_tokens": 14, "sink_tokens": 2, "budget_tokens": 8, "l1_every_steps": 2}
    ),
    "G": MixerChoice("gated_delta_net"),
}
STAGES = (
    Stage("align", "align", steps=3, batch_sequences=1, accumulate=2, learning_rate=1e-2, passes=2, warmup_steps=1),
    Stage(
        "distill",
        "distill",
        steps=4,
        batch_sequences=2,
        accumulate=2,
        learning_rate=1e-2,
        projection_learning_rate=2e-3,
        budget_ramp=Ramp(0.0, 0.5),
        loss=Loss(hidden=0.1, cross_entropy=0.1),
    ),
)
"""Passes, accumulation, a ramp, dropout in the scorer: everything that a resumed run has to find again."""


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """The recipe of the tests; `changes` are fields of `Distill`."""
    distill = Distill(stages=STAGES, lora=Lora(rank=2, alpha=4), precision="float32", save_every_steps=1)
    return Recipe(
        model=str(folder / "teacher"),
        layers=LayerPlan(pattern="F T G T"),
        mixers=MIXERS,
        data=Data(
            train=(TextSource("text/*.txt"),),
            held_out=(TextSource("held/*.txt"),),
            sequence_tokens=32,
            shuffle_documents=4,
        ),
        distill=replace(distill, **changes),
    )


def write_teacher(folder: Path, **changes: Any) -> None:
    """A tiny Llama and its tokenizer as a checkpoint in `folder/teacher`."""
    from tests.tiny import tiny_teacher
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(("<pad>", "<s>", "</s>", "<unk>", *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tiny_teacher(**changes).save_pretrained(folder / "teacher")
    fast.save_pretrained(folder / "teacher")


def write_texts(folder: Path) -> None:
    """Six training documents and a held-out one."""
    for name in ("text", "held"):
        (folder / name).mkdir()
    for number in range(6):
        (folder / "text" / f"{number}.txt").write_text(f"This is document {number}. " * (3 + number))
    (folder / "held" / "x.txt").write_text("Never seen in training. " * 4)


def prepare(folder: Path, recipe: Recipe | None = None) -> Recipe:
    """Writes teacher, texts and `folder/run/converted`; returns the recipe."""
    from hybridize.model.convert import convert
    from hybridize.plan import plan

    if not (folder / "teacher").exists():
        write_teacher(folder)
        write_texts(folder)
    recipe = tiny_recipe(folder) if recipe is None else recipe
    convert(plan(recipe, offline=True), folder / "run" / "converted")
    return recipe


def distil(folder: Path, recipe: Recipe, run: str = "run") -> Path:
    """Distils `folder/run`; the adapter's folder."""
    from hybridize.distillation.run import distill
    from hybridize.plan import plan

    return distill(recipe, folder / run, plan=plan(recipe, offline=True), base=folder, offline=True)


def metric_steps(folder: Path, run: str = "run") -> list[int]:
    lines = (folder / run / "distill" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def main() -> None:
    """Distils and exits as the command line does."""
    from hybridize.errors import HybridizeError

    folder, run = Path(sys.argv[1]), sys.argv[2]
    try:
        distil(folder, tiny_recipe(folder), run)
    except HybridizeError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
