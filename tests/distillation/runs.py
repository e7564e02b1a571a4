"""A tiny run from end to end: a teacher with a byte-like tokenizer on disk, converted, ready to distil.

As a script it serves runs that tests can kill: it imports everything once, then forks a child for each line of its
standard input and answers with the child's exit status.
"""

from __future__ import annotations

import json
import os
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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import tiny_teacher

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


def child(folder: Path, run: str, fault: str) -> int:
    """Distils with a fault; the exit status that the command line would give."""
    from hybridize.errors import HybridizeError

    if fault:
        os.environ["HYBRIDIZE_FAULT"] = fault
    try:
        distil(folder, tiny_recipe(folder), run)
    except HybridizeError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


def serve() -> None:
    """`{"folder", "run", "fault"}` a line -> the exit status a line (negative: the signal that ended the child)."""
    import hybridize.distillation.run
    import hybridize.model.convert
    import hybridize.plan  # noqa: F401 - paid for once, before the forks

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = child(Path(request["folder"]), request["run"], request["fault"])
            finally:
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
