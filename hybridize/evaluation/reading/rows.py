"""Questions about documents from rows of data sets, in the forms that are in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hybridize.errors import CheckpointError
from hybridize.evaluation.reading.passage import Passage, place_of
from hybridize.recipe.rows import Row

FORMS = (
    'Accepted are {"text", "key", "value"}, {"text", "question", "answers"}, {"text", "prompt", "answers"} and '
    '{"text", "value"}; "text" may be called "context" or "document", "answers" "answer".'
)

_Reader = Callable[[str, dict[str, Any], str], Passage | None]


def passages(rows: Iterator[Row]) -> Iterator[Passage]:
    """The questions of rows; those whose answer does not stand in their document are left out.

    Raises:
        CheckpointError: a row in none of the accepted forms.
    """
    for row in rows:
        passage = read_row(row)
        if passage is not None:
            yield passage


def read_row(row: Row) -> Passage | None:
    """The question of a row; None where its answer does not stand in its document, or it has none.

    Raises:
        CheckpointError: the row is in none of the accepted forms.
    """
    values = row.values if isinstance(row.values, dict) else {}
    document = next((v for name in ("context", "document", "text") if isinstance(v := values.get(name), str)), None)
    if document is not None:
        for columns, read in _FORMS:
            if all(name in values for name in columns):
                return read(document, values, row.label)
            if "answers" in columns and "answer" in values and all(n in values for n in columns if n != "answers"):
                return read(document, {**values, "answers": values["answer"]}, row.label)
    names = f"columns {', '.join(map(str, values))}" if values else "no columns"
    raise CheckpointError(f"The row has {names}, which is no question about a text.", where=row.where, hint=FORMS)


def question_passage(source: str, document: str, question: str, answers: Any) -> Passage | None:
    """A question in the words of its asker: the answer is what is written after it."""
    texts, start = _answers(answers)
    return _passage(source, document, f"\nQuestion: {question.strip()}\nAnswer:", texts, question.strip(), start)


def _extraction(document: str, values: dict[str, Any], source: str) -> Passage | None:
    key = str(values["key"]).strip().rstrip(":")
    # The sets of Arora et al. end with the key already.
    text = document.rstrip()
    if text.lower().endswith(f"{key}:".lower()):
        document = text[: -len(key) - 1].rstrip()
    return _passage(source, document, f"\n{key}:", _answers(values["value"])[0], f"{key}:")


def _question(document: str, values: dict[str, Any], source: str) -> Passage | None:
    return question_passage(source, document, str(values["question"]), values["answers"])


def _own_prompt(document: str, values: dict[str, Any], source: str) -> Passage | None:
    texts, start = _answers(values["answers"])
    prompt = str(values["prompt"])
    return _passage(source, document, prompt, texts, prompt.strip(), start)


def _cloze(document: str, values: dict[str, Any], source: str) -> Passage | None:
    """The last line of the text breaks off before the answer."""
    head, separator, last = document.rstrip().rpartition("\n")
    return _passage(source, head, separator + last, _answers(values["value"])[0], last)


_FORMS: tuple[tuple[tuple[str, ...], _Reader], ...] = (
    (("key", "value"), _extraction),
    (("question", "answers"), _question),
    (("prompt", "answers"), _own_prompt),
    (("value",), _cloze),
)
"""Columns, besides the document, and what they are read by; the first that a row has counts."""


def _answers(value: Any) -> tuple[list[str], int | None]:
    """Alternative answers, and where the first is said to stand; of a string, a list, or SQuAD's object of lists."""
    start = None
    if isinstance(value, dict):
        starts = value.get("answer_start")
        start = starts[0] if isinstance(starts, list) and starts and isinstance(starts[0], int) else None
        value = value.get("text", [])
    texts = [str(text) for text in (value if isinstance(value, list) else [value]) if text is not None]
    stripped = [text.strip() for text in texts if text.strip()]
    return list(dict.fromkeys(stripped)), start if stripped and texts[0] == stripped[0] else None


def _passage(
    source: str, document: str, cue: str, answers: list[str], question: str, start: int | None = None
) -> Passage | None:
    found = place_of(document, answers, start) if answers else None
    return None if found is None else Passage(source, document, cue, tuple(answers), found, found, question)
