"""Corpora of text: nothing leaks, nothing is lost without being counted, the same bytes every time."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridize.corpus.card import recipe_lines
from hybridize.corpus.ingredients import CorpusOptions, parse_ingredient, parse_source
from hybridize.corpus.shingles import Shingler, normalised, resemblance
from hybridize.corpus.texts import text_corpus
from hybridize.errors import CheckpointError, RecipeError, UsageError
from hybridize.recipe.documents import Document
from tests.corpus.facts.conftest import FILLER
from tests.corpus.test_duplicates import WORDS, changed_copy


class WordTokenizer:
    """A token a word."""

    eos_token_id = 0
    bos_token_id = None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [list(range(len(text.split()))) for text in texts]}


def write(folder: Path, sources: dict[str, list[str]]) -> None:
    for name, texts in sources.items():
        (folder / f"{name}.txt").write_text("\0".join(texts), encoding="utf-8")


def make(folder: Path, out: str, *texts: str, held_out: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    wanted = CorpusOptions(
        tuple(map(parse_ingredient, texts)), tuple(map(parse_source, held_out)), **{"min_tokens": 0, **options}
    )
    return text_corpus(wanted, folder / out, tokenizer=WordTokenizer(), base=folder)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def documents(folder: Path, part: str) -> list[dict[str, str]]:
    return [row for path in sorted((folder / part).glob("*.jsonl")) for row in rows(path)]


def trained(made: dict[str, Any], name: str) -> dict[str, int]:
    """What corpus.json says of a source's training text."""
    return next(source["train"] for source in made["sources"] if source["name"] == name)


def random_texts(seed: int, count: int, words: int = 40) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=words)) for _ in range(count)]


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.5]))
def test_property_nothing_like_a_held_out_document_is_trained_on(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float
) -> None:
    folder = tmp_path_factory.mktemp("leak")
    generator = random.Random(seed)
    sources: dict[str, list[str]] = {name: random_texts(generator.random(), 8) for name in ("one", "two", "held")}
    everything = [text for texts in sources.values() for text in texts]
    for _ in range(12):
        copy = changed_copy(generator.choice(everything), generator.choice([0, 0, 1, 2, 6]), generator)
        sources[generator.choice(list(sources))].append(copy.upper() if generator.random() < 0.3 else copy)
    write(folder, sources)
    made = make(folder, "out", "one.txt", "two.txt", held_out=("held.txt",), held_out_share=share)

    shingler = Shingler()
    train, held_out = documents(folder / "out", "train"), documents(folder / "out", "held-out")
    sets = [(row, shingler(normalised(row["text"]))) for row in train + held_out]
    for number, (row, one) in enumerate(sets):
        for other_row, other in sets[:number]:
            assert resemblance(one, other) < 0.8, (row, other_row)
    for source in made["sources"]:
        left_out = sum(source[key] for key in ("exact_duplicates", "near_duplicates", "like_held_out", "short"))
        kept = source["held_out"]["documents"] + source["usable"]["documents"]
        assert source["documents"] == left_out + kept == len(sources[source["name"]])
    assert {row["source"] for row in train} <= {"one", "two"}
    read = {normalised(text) for texts in sources.values() for text in texts}
    assert {normalised(row["text"]) for row in train + held_out} <= read


def test_the_share_is_held_out_by_the_text_alone(tmp_path: Path) -> None:
    texts = random_texts(0, 300)
    write(tmp_path, {"a": texts, "b": texts[::-1] + random_texts(1, 50)})
    make(tmp_path, "one", "a.txt", held_out_share=0.2)
    make(tmp_path, "two", "b.txt", held_out_share=0.2)
    one = {row["text"] for row in documents(tmp_path / "one", "held-out")}
    two = {row["text"] for row in documents(tmp_path / "two", "held-out")}
    assert 40 <= len(one) <= 80
    assert two & set(texts) == one


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, {"a": random_texts(0, 60), "b": random_texts(1, 60), "h": random_texts(2, 5)})

    def made(out: str, seed: int) -> dict[str, bytes]:
        make(tmp_path, out, "a.txt", "b.txt=20%", held_out=("h.txt",), held_out_share=0.1, tokens=1500, seed=seed)
        folder = tmp_path / out
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = made("one", 3)
    assert first == made("two", 3)
    assert first["train/000.jsonl"] != made("three", 4)["train/000.jsonl"]
    assert set(first) == {
        "README.md",
        "corpus.json",
        "manifest.json",
        "train/000.jsonl",
        "held-out/a.jsonl",
        "held-out/b.jsonl",
        "held-out/h.jsonl",
    }


def test_weights_are_reached_within_half_a_document(tmp_path: Path) -> None:
    write(tmp_path, {"a": random_texts(0, 60, 40), "b": random_texts(1, 60, 25)})
    made = make(tmp_path, "out", "a.txt", "b.txt=20%", held_out_share=0.0, tokens=1000)
    assert trained(made, "a")["tokens"] == 800
    assert trained(made, "b")["tokens"] == 200
    assert made["notes"] == []


def test_what_falls_short_is_told_and_repeats_fill_it(tmp_path: Path) -> None:
    write(tmp_path, {"a": random_texts(0, 60), "b": random_texts(1, 3)})
    short = make(tmp_path, "one", "a.txt", "b.txt=20%", held_out_share=0.0, tokens=1200)
    assert trained(short, "b")["tokens"] == 120
    assert "b has 120 tokens where the mixture wants 240" in short["notes"][0]
    assert short["notes"][0] in (tmp_path / "one" / "README.md").read_text()
    filled = make(tmp_path, "two", "a.txt", "b.txt=20%", held_out_share=0.0, tokens=1200, max_repeats=2)
    assert trained(filled, "b") == {"documents": 6, "tokens": 240, "wanted": 240}
    assert filled["notes"] == []


def test_short_documents_are_dropped_and_long_ones_stay_whole(tmp_path: Path) -> None:
    texts = [random_texts(words, 1, words)[0] for words in (9, 10, 11, 500)]
    write(tmp_path, {"a": texts})
    made = make(tmp_path, "out", "a.txt", held_out_share=0.0, min_tokens=10)
    assert made["sources"][0]["short"] == 1
    assert sorted(row["text"] for row in documents(tmp_path / "out", "train")) == sorted(texts[1:])
    assert made["sources"][0]["lengths"] == {"min": 10, "p10": 10, "median": 11, "p90": 500, "max": 500}


def test_a_source_without_a_document_left_is_told(tmp_path: Path) -> None:
    texts = random_texts(0, 3)
    write(tmp_path, {"a": texts, "h": texts, "b": random_texts(1, 3)})
    made = make(tmp_path, "out", "a.txt", "b.txt", held_out=("h.txt",), held_out_share=0.0)
    assert made["notes"] == ["a: no document is left to train on."]
    assert {row["source"] for row in documents(tmp_path / "out", "train")} == {"b"}
    assert made["sources"][1]["like_held_out"] == 3


@pytest.mark.parametrize("weight", ["", "=20%"])
def test_a_corpus_without_a_document_left_is_refused(tmp_path: Path, weight: str) -> None:
    write(tmp_path, {"a": random_texts(0, 3)})
    with pytest.raises(UsageError, match="no document is left to train on"):
        make(tmp_path, "out", f"a.txt{weight}", min_tokens=1000)
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer_characters_are_counted(tmp_path: Path) -> None:
    write(tmp_path, {"a": ["x" * 255, "y" * 256]})
    made = text_corpus(CorpusOptions((parse_ingredient("a.txt"),), held_out_share=0.0), tmp_path / "out", base=tmp_path)
    assert made["unit"] == "characters"
    assert made["files"]["train/000.jsonl"]["characters"] == trained(made, "a")["characters"] == 256
    assert made["sources"][0]["short"] == 1


@pytest.mark.parametrize(("options", "where"), [({"tokens": 100}, "--tokens"), ({"facts": 0.1}, "--facts")])
def test_tokens_need_a_tokenizer(tmp_path: Path, options: dict[str, Any], where: str) -> None:
    write(tmp_path, {"a": ["text"]})
    with pytest.raises(UsageError, match="only be counted by a tokenizer") as refused:
        text_corpus(CorpusOptions((parse_ingredient("a.txt"),), **options), tmp_path / "out", base=tmp_path)
    assert refused.value.where == where


def test_documents_too_short_for_facts_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of 511 tokens are too short for facts"):
        make(tmp_path, "out", "none.txt", facts=0.1, sequence_tokens=511)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_there_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        make(tmp_path, "out", "none.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("content", "error"), [(None, RecipeError), (b"", CheckpointError), (b"\xff", CheckpointError)]
)
def test_unreadable_sources_leave_nothing_behind(tmp_path: Path, content: bytes | None, error: type[Exception]) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(error):
        make(tmp_path, "out", "a.txt")
    assert not list(tmp_path.glob("out*"))


def test_a_data_set_that_is_streamed_is_left_when_there_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    def read_documents(source: Any, base: Path, *, offline: bool, limit_bytes: int | None) -> Iterator[Document]:
        asked.append(limit_bytes)
        yield from (Document(text, "x", str(number)) for number, text in enumerate(random_texts(len(asked), 10)))

    monkeypatch.setattr("hybridize.corpus.gather.read_documents", read_documents)
    make(tmp_path, "one", "ada/endless", "a.txt", held_out=("held.txt",), held_out_share=0.0, tokens=100)
    assert asked == [None, 1600, None]
    with pytest.raises(UsageError, match=r"ada/endless: .*may have no end.*--tokens"):
        make(tmp_path, "two", "ada/endless", held_out_share=0.0)


def test_facts_are_their_share_of_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def make_facts(
        filler: list[str], tokenizer: Any, *, tokens: int, document_tokens: int, seed: Any, length_jitter: float
    ) -> Iterator[str]:
        asked.append((sorted(filler), tokens, document_tokens, seed))
        yield from ["a fact " * 10] * (tokens // 20)

    monkeypatch.setattr("hybridize.corpus.facts.make_facts", make_facts)
    write(tmp_path, {"a": random_texts(0, 50), "h": random_texts(1, 5)})
    made = make(
        tmp_path,
        "out",
        "a.txt",
        held_out=("h.txt",),
        held_out_share=0.1,
        tokens=1000,
        facts=0.2,
        sequence_tokens=700,
        seed=9,
    )
    assert trained(made, "a")["tokens"] == 800
    assert trained(made, "facts")["tokens"] == 200
    written = documents(tmp_path / "out", "train")
    assert sum(row["source"] == "facts" for row in written) == 10
    held_out = rows(tmp_path / "out" / "held-out" / "facts.jsonl")
    assert len(held_out) == 1
    ids = [row["id"] for row in (*written, *held_out)]
    assert len(set(ids)) == len(ids)
    trained_on = sorted(row["text"] for row in written if row["source"] == "a")
    never = sorted(row["text"] for name in "ah" for row in rows(tmp_path / "out" / "held-out" / f"{name}.jsonl"))
    assert asked == [(trained_on, 200, 700, 9), (never, 22, 700, "9/held-out")]
    assert made["notes"] == []


def test_held_out_facts_stand_in_text_that_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, {"a": FILLER[:40], "h": FILLER[40:]})
    options: dict[str, Any] = {"facts": 0.5, "sequence_tokens": 600}
    made = make(tmp_path, "out", "a.txt", held_out=("h.txt",), held_out_share=0.1, **options)
    held_out = rows(tmp_path / "out" / "held-out" / "facts.jsonl")
    text = "".join(row["text"] for row in documents(tmp_path / "out", "train"))
    sentences = {part for row in held_out for part in re.findall(r"In chapter \d+ at verse \d+ [^.]*\.", row["text"])}
    assert len(sentences) > 10
    assert not [sentence for sentence in sentences if sentence in text]
    assert made["notes"] == []
    alone = make(tmp_path, "alone", "h.txt", held_out_share=1e-9, **options)
    assert not any(source["name"] == "facts" and source["held_out"]["documents"] for source in alone["sources"])


def test_held_out_facts_without_held_out_text_are_told(tmp_path: Path) -> None:
    write(tmp_path, {"a": FILLER[:2]})
    made = make(tmp_path, "out", "a.txt", held_out_share=0.01, facts=0.9, sequence_tokens=600)
    (note,) = made["notes"]
    assert note == "facts: no other text is held out; the held-out documents stand in text that is trained on."


def test_facts_that_are_held_out_are_to_choose_layers_by(tmp_path: Path) -> None:
    """`choose` passes over what a recipe holds out."""
    write(tmp_path, {"a": FILLER[:40], "h": FILLER[40:]})
    made = make(tmp_path, "out", "a.txt", held_out=("h.txt",), facts=0.5, held_out_share=0.1, sequence_tokens=600)
    assert "held-out/facts.jsonl" in made["files"]
    assert [line.strip() for line in recipe_lines(made)][3:] == [
        "- corpus/held-out/h.jsonl",
        "- corpus/held-out/a.jsonl",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`hybridize choose RECIPE --text corpus/held-out/facts.jsonl`" in card
    write(tmp_path, {"facts": FILLER[40:]})
    named = make(tmp_path, "named", "a.txt", held_out=("facts.txt",), held_out_share=0.0)
    assert recipe_lines(named)[-1].strip() == "- corpus/held-out/facts.jsonl"
    assert "choose" not in (tmp_path / "named" / "README.md").read_text()


def test_the_card_holds_a_recipes_lines_that_can_be_read(tmp_path: Path) -> None:
    import yaml

    from hybridize.recipe.documents import read_documents
    from hybridize.recipe.sources import TextSource

    write(tmp_path, {"a": random_texts(0, 50), "b": random_texts(1, 25), "h": random_texts(2, 5)})
    made = make(tmp_path, "corpus", "a.txt", "b.txt", held_out=("h.txt",), held_out_share=0.0)
    lines = recipe_lines(made)
    assert "\n".join(lines) in (tmp_path / "corpus" / "README.md").read_text()
    data = yaml.safe_load("\n".join(lines))["data"]
    (train,) = data["train"]
    assert len(list(read_documents(TextSource(train), tmp_path))) == 75
    assert data["held_out"] == ["corpus/held-out/h.jsonl"]


def test_training_files_hold_the_mixture_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridize.corpus.texts.FILE_CHARACTERS", 4000)
    sources = {"a": random_texts(0, 90), "b": random_texts(1, 30)}
    write(tmp_path, sources)
    made = make(tmp_path, "out", "a.txt", "b.txt", held_out_share=0.0)
    files = [path for path in made["files"] if path.startswith("train/")]
    assert files == sorted(files)
    assert len(files) > 3
    found = [rows(tmp_path / "out" / path) for path in files]
    for part in found[:-1]:
        assert sum(len(row["text"]) for row in part) >= 4000
        assert {row["source"] for row in part} == {"a", "b"}
    assert sorted(row["text"] for part in found for row in part) == sorted(sources["a"] + sources["b"])
