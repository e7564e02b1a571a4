"""Multiple-choice questions from JSON lines and from BIG-bench."""

from __future__ import annotations

import difflib
import json
import random
import string
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridize.errors import CheckpointError
from hybridize.recipe.documents import read_rows
from hybridize.recipe.probes import ChoicesProbe
from hybridize.recipe.rows import Row
from hybridize.recipe.source_files import decode, find_files, read_bytes
from hybridize.recipe.sources import TextSource

FORMS = (
    'Accepted are {"prompt", "choices", "answer"} with "question" or "input" for "prompt", "options" for "choices", '
    '"label" or "gold" for "answer" (a position from 0, a letter from A, or the text), and BIG-bench\'s task.json.'
)
_PROMPTS, _CHOICES, _ANSWERS = ("prompt", "question", "input"), ("choices", "options"), ("answer", "label", "gold")
_ARCHIVE = ".tar.gz:"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        task: name that scores are gathered under.
        prompt: what stands before an answer, without the blank between them.
        choices: two or more. answer: the number of the right one.
    """

    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(probe: ChoicesProbe, base: Path, *, seed: int, offline: bool = False) -> list[Question]:
    """The questions of every source, at most `max_questions` of a task, drawn by the seed.

    A source is JSON lines, a BIG-bench task.json, or `ARCHIVE.tar.gz:task,task` of the `bigbench` source package, which
    is read as it is.

    Raises:
        RecipeError: nothing matches a path.
        CheckpointError: a row that is no question, an unknown task, or a source without a question.
    """
    chosen: list[Question] = []
    for source in probe.sources:
        found = list(_of_source(source, base, seed, offline))
        if not found:
            raise CheckpointError("The source holds no question.", where=source.path, hint=FORMS)
        for task in dict.fromkeys(question.task for question in found):
            own = [question for question in found if question.task == task]
            random.Random(f"{seed}/choices/{task}").shuffle(own)
            chosen += own[: probe.max_questions]
    return chosen


def _of_source(source: TextSource, base: Path, seed: int, offline: bool) -> Iterator[Question]:
    archive, is_archive, tasks = source.path.partition(_ARCHIVE)
    if is_archive:
        wanted = [name.strip() for name in tasks.split(",") if name.strip()]
        if not wanted:
            hint = "Write ARCHIVE.tar.gz:task,task."
            raise CheckpointError("No task of the archive is named.", where=source.path, hint=hint)
        yield from _of_archive(base / (archive + _ARCHIVE[:-1]), wanted, seed)
    elif source.path.endswith(".json"):
        for path in find_files(source, base, "**/task.json"):
            name = source.name or (path.parent.name if path.name == "task.json" else path.stem)
            yield from _of_task(_parsed(read_bytes(path), str(path)), name, str(path), seed)
    else:
        for row in read_rows(source, base, offline=offline):
            yield _of_row(row)


def _of_row(row: Row) -> Question:
    values = row.values if isinstance(row.values, Mapping) else {}
    prompt, choices, answer = (
        next((values[name] for name in names if name in values), None) for names in (_PROMPTS, _CHOICES, _ANSWERS)
    )
    if isinstance(choices, Mapping):  # as in ARC: {"text": [...], "label": [...]}
        labels, choices = choices.get("label"), choices.get("text")
        if isinstance(labels, list) and answer in labels:
            answer = labels.index(answer)
    if isinstance(prompt, str) and isinstance(choices, Sequence) and not isinstance(choices, str):
        texts = tuple(str(choice) for choice in choices)
        place = _place(answer, texts)
        if len(texts) >= 2 and place is not None:
            return Question(row.label, prompt.rstrip(), texts, place)
    names = f"columns {', '.join(map(str, values))}" if values else "no columns"
    raise CheckpointError(f"The row has {names}, which is no multiple-choice question.", where=row.where, hint=FORMS)


def _place(answer: Any, choices: Sequence[str]) -> int | None:
    """Which choice an answer names; None: none."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    if answer in choices:
        return choices.index(answer)
    letter = string.ascii_uppercase.find(answer.strip().upper()) if len(answer.strip()) == 1 else -1
    if 0 <= letter < len(choices):
        return letter
    return int(answer) if answer.isdecimal() and int(answer) < len(choices) else None


def _of_archive(path: Path, wanted: Sequence[str], seed: int) -> Iterator[Question]:
    """Tasks of BIG-bench's source archive, in one pass and without unpacking it."""
    missing, seen = set(wanted), set()
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                parts = Path(member.name).parts
                if not member.isfile() or parts[-1:] != ("task.json",) or "benchmark_tasks" not in parts:
                    continue
                name = "/".join(parts[parts.index("benchmark_tasks") + 1 : -1])
                seen.add(name)
                if name in missing and (file := archive.extractfile(member)) is not None:
                    missing.discard(name)
                    yield from _of_task(_parsed(file.read(), f"{path}:{name}"), name, f"{path}:{name}", seed)
                    if not missing:
                        return
    except (OSError, tarfile.TarError, EOFError) as error:
        hint = "Download the `bigbench` source package again."
        raise CheckpointError(f"The archive cannot be read ({error}).", where=str(path), hint=hint) from None
    name = min(missing)
    near = difflib.get_close_matches(name, seen, 3) or sorted(seen)[:3]
    raise CheckpointError(f"There is no task {name!r}.", where=str(path), hint=f"Nearest: {', '.join(near)}.")


def _of_task(content: Any, name: str, where: str, seed: int) -> Iterator[Question]:
    """The examples of a BIG-bench task that have just one best answer.

    Choices come in an order drawn for each example, as in BIG-bench: in some files the right one is always the first.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("examples"), list):
        raise CheckpointError("The file is no BIG-bench task (it has no examples).", where=where, hint=FORMS)
    before, after = content.get("example_input_prefix", "\nQ: "), content.get("example_output_prefix", "\nA: ")
    head = str(content.get("task_prefix", ""))
    listed = content.get("append_choices_to_input", True)
    item = content.get("choice_prefix", "\n  choice: ")
    for number, example in enumerate(content["examples"]):
        example = example if isinstance(example, Mapping) else {}
        scores, asked = example.get("target_scores"), example.get("input")
        if not isinstance(scores, Mapping) or len(scores) < 2 or not isinstance(asked, str):
            continue
        best = [choice for choice, value in scores.items() if value == max(scores.values())]
        if len(best) != 1:
            continue
        choices = sorted(map(str, scores))
        random.Random(f"{seed}/choices/{name}/{number}").shuffle(choices)
        # BIG-bench shows the choices in the question unless a task says otherwise.
        shown = "".join(f"{item}{choice}" for choice in choices) if listed else ""
        prompt = f"{head}{before}{asked}{shown}{after}".strip()
        yield Question(name, prompt, tuple(choices), choices.index(str(best[0])))


def _parsed(content: bytes, where: str) -> Any:
    try:
        return json.loads(decode(content, where))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"The file is not JSON ({error}).", where=where, hint=FORMS) from None
