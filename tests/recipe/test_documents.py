"""Reading documents: every format, a fixed order, clear refusals, and a stable held-out share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import hybridize.recipe.documents as documents_module
from hybridize.errors import CheckpointError, HybridizeError, RecipeError
from hybridize.recipe.documents import (
    Document,
    held_out_documents,
    is_held_out,
    local_files,
    pin_revisions,
    read_documents,
    read_rows,
    training_documents,
)
from hybridize.recipe.schema import Data
from hybridize.recipe.sources import TextSource


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("b--two", "a--one", "a--three"):
        (folder / f"{name}.txt").write_text(f"Text of {name}.")
    return tmp_path


def test_text_glob_is_sorted_and_labelled_by_file_name(texts: Path) -> None:
    documents = list(read_documents(TextSource("text/*.txt"), texts))
    assert [d.id for d in documents] == ["text/a--one.txt", "text/a--three.txt", "text/b--two.txt"]
    assert [d.source_name for d in documents] == ["a", "a", "b"]
    assert list(read_documents(TextSource("text"), texts)) == [Document(d.text, d.source_name, d.id) for d in documents]
    assert {d.source_name for d in read_documents(TextSource("text/*.txt", name="mine"), texts)} == {"mine"}


def test_label_without_prefix_comes_from_the_path(tmp_path: Path) -> None:
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "1.txt").write_text("x")
    assert [d.source_name for d in read_documents(TextSource("news/*.txt"), tmp_path)] == ["news"]


def test_nul_separates_documents_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\0  \n\0two")
    documents = list(read_documents(TextSource("a.txt"), tmp_path))
    assert [(d.id, d.text) for d in documents] == [("a.txt#0", "one"), ("a.txt#2", "two")]


def test_limit_bytes_stops_early(texts: Path) -> None:
    assert len(list(read_documents(TextSource("text/*.txt"), texts, limit_bytes=5))) == 1


def test_jsonl_and_parquet_give_the_same_texts(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = ["first", "zwei — 2", "third"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": r}) for r in rows) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": rows, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert [d.text for d in read_documents(TextSource(name, column="body"), tmp_path)] == rows


@pytest.mark.parametrize(
    ("name", "content", "source", "says"),
    [
        ("a.txt", b"", TextSource("a.txt"), "empty"),
        ("a.txt", b" \n", TextSource("a.txt"), "no document"),
        ("a.txt", b"abc\xff", TextSource("a.txt"), "UTF-8 (byte 3)"),
        ("a.jsonl", b'{"text": "x"}\n{"text":', TextSource("a.jsonl"), "a.jsonl:2"),
        ("a.jsonl", b"", TextSource("a.jsonl"), "empty"),
        ("a.jsonl", b'{"body": "x"}', TextSource("a.jsonl"), "body"),
        ("a.jsonl", b"[1]", TextSource("a.jsonl"), "no column"),
        ("a.jsonl", b'{"text": 3}', TextSource("a.jsonl"), "holds a int"),
        ("a.parquet", b"PAR1 no", TextSource("a.parquet"), "Parquet"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, source: TextSource, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        list(read_documents(source, tmp_path))
    assert says in str(caught.value)
    assert name in caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize("path", ["none/*.txt", "data.csv", "/nowhere/x.jsonl"])
def test_bad_paths_are_recipe_errors(tmp_path: Path, path: str) -> None:
    with pytest.raises(RecipeError) as caught:
        list(read_documents(TextSource(path), tmp_path))
    assert caught.value.hint


def test_unknown_hub_data_set_offline(tmp_path: Path) -> None:
    source = TextSource("nobody/nothing-of-the-kind", format="hub")
    with pytest.raises(CheckpointError, match="Hub"):
        list(read_documents(source, tmp_path, offline=True))


def test_pin_revisions_leaves_files_and_commits_alone(texts: Path) -> None:
    sources = (TextSource("text/*.txt"), TextSource("org/name", format="hub", revision="0" * 40))
    assert pin_revisions(sources, texts) == sources


def test_held_out_share_is_stable_and_about_as_large_as_said() -> None:
    documents = [Document(f"text {i}", "s", str(i)) for i in range(400)]
    held_out = {d.text for d in documents if is_held_out(d, 0.25)}
    assert 60 < len(held_out) < 140
    renamed = [Document(d.text, "other", "elsewhere") for d in reversed(documents)]
    assert {d.text for d in renamed if is_held_out(d, 0.25)} == held_out
    assert not any(is_held_out(d, 0.0) for d in documents)


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_held_out_text_of_an_endless_source_comes_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    def endless(source: TextSource, base: Path, offline: bool) -> Iterator[Document]:
        for number in range(100_000):
            yield Document(f"text {number}", source.path, str(number))
        raise AssertionError("read on and on")

    monkeypatch.setitem(documents_module._FORMATS, "hub", endless)
    data = Data(train=(TextSource("org/a", format="hub"), TextSource("org/b", format="hub")), held_out_share=share)
    found = list(held_out_documents(data, tmp_path, limit_bytes=1000))
    assert all(is_held_out(document, share) for document in found)
    for name in ("org/a", "org/b") if share else ():
        num_bytes = sum(len(d.text.encode()) for d in found if d.source_name == name)
        assert 1000 <= num_bytes < 1020  # held-out text counts, not what was passed over


def test_training_never_sees_held_out_text(texts: Path) -> None:
    (texts / "held.txt").write_text("Text of b--two.")  # the same text under another name
    data = Data(train=(TextSource("text/*.txt"),), held_out=(TextSource("held.txt"),))
    assert [d.id for d in training_documents(data.train[0], data, texts)] == ["text/a--one.txt", "text/a--three.txt"]
    shared = Data(train=(TextSource("text/*.txt"),), held_out_share=0.5)
    train = {d.id for d in training_documents(shared.train[0], shared, texts)}
    held_out = {d.id for d in held_out_documents(shared, texts)}
    assert train.isdisjoint(held_out)
    assert len(train | held_out) == 3


def test_same_hub_split_trained_and_held_out_is_refused(tmp_path: Path) -> None:
    hub = TextSource("org/name", format="hub")
    data = Data(train=(hub,), held_out=(hub,))
    with pytest.raises(HybridizeError, match="also trained on"):
        list(training_documents(hub, data, tmp_path))


def test_hub_rows_are_read_at_the_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, config: str | None, **wish: object) -> object:
        asked.append((path, config, wish["split"], wish["revision"], wish["streaming"]))
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("hybridize.recipe.documents._hub_commit", lambda source: "c" * 40)
    (source,) = pin_revisions((TextSource("org/news", config="en", split="part", column="body"),), tmp_path)
    documents = list(read_documents(source, tmp_path))
    assert asked == [("org/news", "en", "part", "c" * 40, True)]
    assert [d.text for d in documents] == ["one", "two"]
    assert [d.source_name for d in documents] == ["news", "news"]
    assert documents[1].id == f"org/news@{'c' * 40}/part#1"
    with pytest.raises(CheckpointError, match=r"no column 'text'.*body"):
        list(read_documents(TextSource("org/news"), tmp_path))


def test_local_files_are_named_from_the_base(texts: Path) -> None:
    assert [name for name, _ in local_files(TextSource("text/b*.txt"), texts)] == ["text/b--two.txt"]
    assert local_files(TextSource("org/news"), texts) == []


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path whose import would fail."""
    folder = tmp_path / "site" / "stored_essays"
    (folder / "essays").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('files are read without importing')")
    for name in ("two", "one"):
        (folder / "essays" / f"{name}.txt").write_text(f"Essay {name}.")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


@pytest.mark.parametrize("path", ["package:stored-essays/essays/*.txt", "package:stored_essays/essays"])
def test_files_of_an_installed_package(package: Path, tmp_path: Path, path: str) -> None:
    documents = list(read_documents(TextSource(path), tmp_path / "elsewhere"))
    assert [d.text for d in documents] == ["Essay one.", "Essay two."]
    assert {d.source_name for d in documents} == {"essays"}
    name = path.split("/")[0]
    assert [d.id for d in documents] == [f"{name}/essays/one.txt", f"{name}/essays/two.txt"]
    assert [file for _, file in local_files(TextSource(path), tmp_path)] == [
        package / "essays" / "one.txt",
        package / "essays" / "two.txt",
    ]
    (whole,) = {d.source_name for d in read_documents(TextSource("package:stored_essays"), tmp_path)}
    assert whole == "stored_essays"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("package:no_such_package_/x/*.txt", "pip install --no-deps no-such-package-"),
        ("package:json.tool/*.txt", "package:NAME/FILES"),
        ("package:stored_essays/../*.txt", "leads out"),
        ("package:stored_essays/*.md", "No file matches"),
        ("package:stored_essays/none", "cannot be told"),
    ],
)
def test_bad_package_paths_are_recipe_errors(package: Path, tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        list(read_documents(TextSource(path), tmp_path))
    assert says in str(caught.value)
    assert path in caught.value.where


def test_rows_have_all_their_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"key": "a", "n": 1}, {"key": "b", "n": 2}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, places in (("a.jsonl", ["a.jsonl:1", "a.jsonl:3"]), ("a.parquet", ["a.parquet#0", "a.parquet#1"])):
        found = list(read_rows(TextSource(name), tmp_path))
        assert [row.values for row in found] == rows
        assert [Path(row.where).name for row in found] == places
    with pytest.raises(RecipeError, match="JSON lines"):
        read_rows(TextSource("a.txt"), tmp_path)
