"""Questions about documents: the forms of rows, the cut around the answer, package metadata, and the probe's row."""

from __future__ import annotations

import json
import random
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.errors import CheckpointError, RecipeError
from hybridize.evaluation.generation import prompt_ids
from hybridize.evaluation.items import score
from hybridize.evaluation.reading import make_reading_items, reading
from hybridize.evaluation.reading.packages import NOT_ASKED, RECORDS, package_passages, records
from hybridize.evaluation.reading.passage import Passage, place_of
from hybridize.evaluation.reading.prompt import SPARE_TOKENS, make_item
from hybridize.progress import SILENT
from hybridize.recipe.probes import ReadingProbe
from hybridize.recipe.sources import TextSource
from tests.evaluation.conftest import make_prose

TEXT = "The old king lost his silver ring. It lay under the stone of 1742."


def write_rows(path: Path, *rows: Any) -> TextSource:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return TextSource(path.name)


def items_of(
    tokenizer: Any, base: Path, *sources: TextSource, tokens: int = 200, seed: int = 0, most: int = 100
) -> Any:
    probe = ReadingProbe(sources=sources, max_tokens=tokens, max_questions=most)
    return make_reading_items(probe, tokenizer, base, seed=seed, offline=True)


@pytest.mark.parametrize(
    ("row", "tail", "answers"),
    [
        ({"text": TEXT, "key": "Metal", "value": "silver"}, ".\nMetal:", ("silver",)),
        ({"text": TEXT + " Metal", "key": "Metal", "value": "silver"}, "1742. Metal\nMetal:", ("silver",)),
        ({"document": TEXT + "\n\nMetal:", "key": "metal", "value": "silver"}, "1742.\nmetal:", ("silver",)),
        (
            {"context": TEXT, "question": "Which year?", "answer": "1742"},
            ".\nQuestion: Which year?\nAnswer:",
            ("1742",),
        ),
        ({"text": TEXT, "question": "What?", "answers": ["a crown", "ring"]}, "What?\nAnswer:", ("a crown", "ring")),
        (
            {"context": TEXT, "question": "What?", "answers": {"text": ["ring", "ring"], "answer_start": [29, 29]}},
            "What?\nAnswer:",
            ("ring",),
        ),
        ({"text": TEXT, "prompt": " So it was of", "answers": "silver"}, "1742. So it was of", ("silver",)),
        ({"text": TEXT + "\nThe ring was of", "value": "silver"}, "1742.\nThe ring was of", ("silver",)),
        # The set of Arora et al. has the question beside the text that breaks off; the text is what is continued.
        ({"text": TEXT + "\nIt was of", "question": "What of?", "value": "silver"}, "\nIt was of", ("silver",)),
    ],
)
def test_forms_of_rows(tmp_path: Path, tokenizer: Any, row: Any, tail: str, answers: tuple[str, ...]) -> None:
    (item,), (question,) = items_of(tokenizer, tmp_path, write_rows(tmp_path / "rows.jsonl", row))
    prompt = tokenizer.decode(item.prompt)
    assert prompt.startswith(TEXT)
    assert prompt.endswith(tail)
    assert (item.answers, item.needs, item.task, item.group) == (answers, "any", "rows", 200)
    assert question.strip() in tail
    longest = max(len(tokenizer(f" {answer}")["input_ids"]) for answer in answers)
    assert item.answer_tokens == longest + SPARE_TOKENS
    assert score(item, f" it is {answers[-1].upper()}.") == 1


@pytest.mark.parametrize(
    "row", [{"text": TEXT}, {"key": "a", "value": "b"}, ["text"], {"text": 3, "key": "a", "value": "b"}, {}]
)
def test_other_rows_are_refused_with_their_line_and_the_forms(tmp_path: Path, tokenizer: Any, row: Any) -> None:
    source = write_rows(tmp_path / "rows.jsonl", {"text": TEXT, "key": "Metal", "value": "silver"}, row)
    with pytest.raises(CheckpointError) as caught:
        items_of(tokenizer, tmp_path, source)
    assert caught.value.where.endswith("rows.jsonl:2")
    assert '"key", "value"' in caught.value.hint


def test_answers_that_do_not_stand_in_the_text_are_left_out(tmp_path: Path, tokenizer: Any) -> None:
    absent = {"text": TEXT, "key": "Metal", "value": "gold"}
    source = write_rows(tmp_path / "rows.jsonl", absent, {"text": TEXT, "key": "Year", "value": "1742"})
    assert items_of(tokenizer, tmp_path, source)[1] == ["Year:"]
    with pytest.raises(CheckpointError, match="Not one question"):
        items_of(tokenizer, tmp_path, write_rows(tmp_path / "none.jsonl", absent))


def test_squad_files(tmp_path: Path, tokenizer: Any) -> None:
    asked = [
        {"question": "Which metal?", "answers": [{"text": "silver", "answer_start": 22}], "is_impossible": False},
        {"question": "Which queen?", "answers": [], "is_impossible": True},
    ]
    content = {"version": "v2.0", "data": [{"title": "x", "paragraphs": [{"context": TEXT, "qas": asked}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(content))
    items, questions = items_of(tokenizer, tmp_path, TextSource("dev.json", name="squad"))
    assert questions == ["Which metal?"]
    assert (items[0].task, items[0].answers) == ("squad", ("silver",))
    for broken in ('{"data": [{}]}', "[1]", '{"data":'):
        (tmp_path / "dev.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"SQuAD's form") as caught:
            items_of(tokenizer, tmp_path, TextSource("dev.json"))
        assert "dev.json" in caught.value.where


def test_the_place_that_a_row_names_counts_where_it_is_right() -> None:
    text = "ring and Ring"
    assert place_of(text, ["ring"], 9) == (9, 13)
    assert place_of(text, ["ring"], 5) == (0, 4)
    assert place_of(text, ["crown", "AND"]) == (5, 8)
    assert place_of("İ a ring", ["ring"]) == (4, 8)  # its lower case is two characters
    assert place_of(text, ["crown"]) is None


@given(place=st.integers(0, 59), max_tokens=st.integers(40, 900), seed=st.integers(0, 50))
def test_property_a_cut_document_keeps_its_answer_and_fills_the_prompt(
    tokenizer: Any, place: int, max_tokens: int, seed: int
) -> None:
    sentences = make_prose(60, seed=seed).split(". ")
    sentences[place] += " by 74219 men"
    document = ". ".join(sentences)
    start = document.index("74219")
    span = (start, start + 5)
    passage = Passage("s", document, "\nHow many?", ("74219",), span, span, "")
    item = make_item(passage, tokenizer, max_tokens, random.Random(seed))
    assert item is not None
    text = tokenizer.decode(item.prompt)
    assert prompt_ids(tokenizer, text) == list(item.prompt)
    assert text.endswith("\nHow many?")
    assert text.removesuffix("\nHow many?") in document
    ((first, last),) = item.evidence
    assert tokenizer.decode(item.prompt[first:last]).strip() == "74219"
    assert item.depth == first / len(item.prompt)
    whole = len(prompt_ids(tokenizer, document + passage.cue))
    assert len(item.prompt) <= max_tokens
    assert len(item.prompt) >= min(whole, max_tokens) - 4  # tokens at the cut may join


def test_where_the_answer_stands_after_the_cut_is_drawn(tokenizer: Any) -> None:
    document = make_prose(40, seed=1) + " It was 74219. " + make_prose(40, seed=2)
    span = place_of(document, ["74219"])
    assert span is not None
    passage = Passage("s", document, "\nHow many?", ("74219",), span, span, "")
    items = [make_item(passage, tokenizer, 120, random.Random(seed)) for seed in range(40)]
    depths = [item.depth for item in items if item is not None and item.depth is not None]
    assert min(depths) < 0.2
    assert max(depths) > 0.7


def test_questions_too_long_for_a_prompt(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="max_tokens"):
        items_of(
            tokenizer,
            tmp_path,
            write_rows(tmp_path / "a.jsonl", {"text": TEXT, "question": TEXT, "answer": "1742"}),
            tokens=20,
        )
    long = write_rows(tmp_path / "b.jsonl", {"text": TEXT, "key": "All", "value": TEXT})
    with pytest.raises(CheckpointError, match="Not one question"):
        items_of(tokenizer, tmp_path, long, tokens=20)


def test_max_questions_of_each_source_are_drawn_by_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"{TEXT} And {n} more.", "key": f"Number {n}", "value": f"{n} more"} for n in range(30)]
    sources = (write_rows(tmp_path / "a.jsonl", *rows), write_rows(tmp_path / "b.jsonl", *rows))
    items, questions = items_of(tokenizer, tmp_path, *sources, most=7)
    assert [item.task for item in items] == ["a"] * 7 + ["b"] * 7
    assert (items, questions) == items_of(tokenizer, tmp_path, *sources, most=7)
    assert questions != items_of(tokenizer, tmp_path, *sources, most=7, seed=1)[1]
    assert questions[:7] != [f"Number {n}:" for n in range(7)]


def distribution(name: str, readme: str = "", **fields: str | list[str]) -> Any:
    message = Message()
    message["Name"] = name
    message["Version"] = "1.0"
    for field, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            message[field.replace("_", "-")] = one
    message.set_payload(readme)
    return SimpleNamespace(metadata=message)


@pytest.fixture
def installed() -> list[Any]:
    fakes = [
        distribution(
            f"pack{n}",
            f"# Title\n\n[![badge](x)](y)\n{make_prose(12, seed=n)}",
            Summary=f"Does the thing of number {n:02d}",
            Author="One Author" if n < 4 else f"Author of {n:02d}",
            Requires_Python=">=3.10",
            License="A line\nand another",
            Home_page=[f"https://example.org/{n:02d}", "https://example.org/twice"],
        )
        for n in range(12)
    ]
    return [*reversed(fakes), distribution("Pack3", Summary="The same name again"), distribution("bare")]


def test_records_show_short_lines_and_ask_for_what_is_said_once(installed: list[Any]) -> None:
    found = records(installed, 40)
    assert [record.name for record in found] == sorted(f"pack{n}" for n in range(12))
    for record in found:
        assert [value.field for value in record.values] == ["Summary", "Author"]
        for value in record.values:
            assert record.text[value.start : value.start + len(value.text)] == value.text
        assert record.text.startswith(f"Name: {record.name}\nVersion: 1.0\nSummary: ")
        assert "another" not in record.text
        assert "badge" not in record.text
        assert "Title" not in record.text
        readme = record.text.split("\n\n")[1]
        assert 20 < len(readme) <= 40


def test_values_of_packages_stand_once_and_whole_in_their_prompts(tokenizer: Any, installed: list[Any]) -> None:
    def ask() -> list[Passage]:
        return list(package_passages(600, lambda text: len(prompt_ids(tokenizer, text)), random.Random(3), installed))

    passages = ask()
    assert passages == ask()
    fields = [passage.question.split(" of ")[0] for passage in passages]
    assert fields[:2] == ["Summary", "Author"]
    assert fields.count("Summary") == 12
    assert not set(fields) & set(NOT_ASKED)
    for passage in passages:
        (value,) = passage.answers
        field, _, name = passage.question.removesuffix(":").partition(" of ")
        assert (passage.document + passage.cue).count(value) == 1
        assert passage.document[slice(*passage.answer)] == value
        assert passage.document[passage.kept[0] :].startswith(f"Name: {name}\n")
        assert passage.cue.endswith(f"Name: {name}\n{field}:")
        assert 2 <= passage.document.count("Version: ") <= RECORDS
        item = make_item(passage, tokenizer, 600, random.Random(0))
        assert item is not None
        text = tokenizer.decode(item.prompt)
        assert f"Name: {name}\nVersion: 1.0\n" in text
        assert len(item.prompt) <= 600
    assert {passage.kept[0] == 0 for passage in passages} == {True, False}


def test_without_sources_the_installed_packages_are_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    items, questions = items_of(tokenizer, tmp_path, tokens=700, most=5)
    assert len(items) == len(questions) == 5
    assert {item.task for item in items} == {"package_metadata"}


def test_the_row_gathers_scores_by_source_and_shows_examples(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{TEXT} And {n} more.", "key": f"Number {n}", "value": f"{n} more"} for n in range(4)]
    sources = (
        write_rows(tmp_path / "a.jsonl", *rows),
        write_rows(tmp_path / "b.jsonl", {"text": TEXT, "key": "Year", "value": "1742"}),
    )
    items, questions = items_of(tokenizer, tmp_path, *sources)

    def answers(model: str, tokenizer: Any, items: Any, *, batch_tokens: int, task: Any) -> list[str]:
        return [f" {item.answers[0]}" if model == "knows" or item.task == "b" else " no" for item in items]

    monkeypatch.setattr("hybridize.evaluation.reading.row.answers", answers)
    with SILENT.task("", None) as task:
        row = reading({"student": "x", "teacher": "knows"}, tokenizer, items, questions, batch_tokens=1, task=task)
        alone = reading({"student": "x"}, tokenizer, items, questions, batch_tokens=1, task=task)
    assert (row["student"]["share"], row["teacher"]["share"], row["kept"]["value"]) == (0.2, 1.0, 0.2)
    assert row["sources"]["a"]["student"]["share"] == 0
    assert row["sources"]["b"]["student"]["share"] == 1
    a = row["sources"]["a"]
    assert (a["questions"], len(a["examples"])) == (4, 3)
    assert a["prompt_tokens"] == [min(len(i.prompt) for i in items[:4]), max(len(i.prompt) for i in items[:4])]
    assert a["examples"][0] == {
        "question": questions[0],
        "answers": list(items[0].answers),
        "student": " no",
        "teacher": f" {items[0].answers[0]}",
    }
    assert alone["sources"]["b"]["examples"][0]["teacher"] is None
    assert alone["kept"] is None
    json.dumps(row, allow_nan=False)
