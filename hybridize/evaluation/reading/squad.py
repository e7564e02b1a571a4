"""SQuAD's own files: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}.

Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822), version 1.1 and 2.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridize.errors import CheckpointError
from hybridize.evaluation.reading.passage import Passage
from hybridize.evaluation.reading.rows import question_passage
from hybridize.recipe.source_files import decode, find_files, label, read_bytes
from hybridize.recipe.sources import TextSource


def squad_passages(source: TextSource, base: Path) -> Iterator[Passage]:
    """The questions of SQuAD files; those without an answer are left out.

    Raises:
        RecipeError: no file matches.
        CheckpointError: a file that is not in SQuAD's form.
    """
    for path in find_files(source, base, "**/*.json"):
        content = decode(read_bytes(path), str(path))
        try:
            yield from _of_file(json.loads(content), label(source, path))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The file is not in SQuAD's form ({type(error).__name__}: {error}).",
                where=str(path),
                hint="Give a SQuAD file (data, paragraphs, qas), or JSON lines in a file that ends in .jsonl.",
            ) from None


def _of_file(content: Any, name: str) -> Iterator[Passage]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = [] if asked.get("is_impossible") else asked["answers"]
                columns = {
                    "text": [answer["text"] for answer in answers],
                    "answer_start": [answer["answer_start"] for answer in answers],
                }
                passage = question_passage(name, paragraph["context"], asked["question"], columns)
                if passage is not None:
                    yield passage
