"""`hybridize generate`: a document is read once, kept in a file, and asked many questions; conversations go on."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from hybridize.checkpoint import replace_in_manifest
from tests.cli.conftest import Invoke

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
DOCUMENT = "the sea was calm and the old man went out in the morning to look for fish " * 8


@pytest.fixture(scope="module")
def chatty(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(finished / "converted", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    replace_in_manifest(folder, ["tokenizer_config.json"])
    return folder


def test_a_document_is_read_once_and_questioned_many_times(invoke: Invoke, chatty: Path, tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text(DOCUMENT)
    state = tmp_path / "document.state"
    read = invoke("generate", chatty, "--prompt-file", tmp_path / "document.txt", "--save-state", state, "--json", "-q")
    assert read.code == 0, read.err
    assert "text" not in read.json
    for question in (" the old", " fish"):
        asked = invoke(
            "generate", chatty, "--state", state, "--prompt", question, "--max-new-tokens", 6, "--json", "-q"
        )
        whole = invoke(
            *("generate", chatty, "--prompt-file", tmp_path / "document.txt", "--prompt", question),
            *("--max-new-tokens", 6, "--json", "-q"),
        )
        assert asked.code == 0, asked.err
        assert asked.json["prompt_tokens"] < 10 < whole.json["prompt_tokens"]
        assert asked.json["new_tokens"] == whole.json["new_tokens"]


def test_what_was_written_is_part_of_the_state(invoke: Invoke, chatty: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--max-new-tokens", 4, "--json", "-q")
    begun = invoke("generate", chatty, "--prompt", "the sea", "--save-state", first, *options).json
    more = invoke("generate", chatty, "--state", first, "--prompt", " and", "--save-state", second, *options).json
    assert more["context_tokens"] == begun["context_tokens"] + begun["new_tokens"] + more["prompt_tokens"]
    goes_on = invoke("generate", chatty, "--state", second, *options)
    assert goes_on.code == 0, goes_on.err
    assert goes_on.json["prompt_tokens"] == 0


def test_a_conversation_goes_on_from_its_file(
    invoke: Invoke, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "talk.state"
    options = ("--max-new-tokens", 5, "-q")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\n"))
    whole = invoke("generate", chatty, "--chat", *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n"))
    first = invoke("generate", chatty, "--chat", "--save-state", state, *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\n\n"))
    second = invoke("generate", chatty, "--chat", "--state", state, *options)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out + second.out == whole.out


def test_a_document_opens_the_first_question(
    invoke: Invoke, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "document.txt").write_text(DOCUMENT)
    state, options = tmp_path / "state", ("--max-new-tokens", 5, "--json", "-q")
    document = ("--prompt-file", tmp_path / "document.txt")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    read = invoke("generate", chatty, "--chat", *document, "--save-state", state, *options)
    assert read.code == 0, read.err
    asked = invoke("generate", chatty, "--chat", "--state", state, "--prompt", "who?", *options)
    whole = invoke("generate", chatty, "--chat", *document, "--prompt", "who?", *options)
    assert asked.code == 0, asked.err
    assert asked.json["prompt_tokens"] < whole.json["prompt_tokens"]
    assert asked.json["context_tokens"] == whole.json["context_tokens"]
    assert asked.json["text"] == whole.json["text"]


def test_a_state_of_another_model_or_none_is_refused(
    invoke: Invoke, chatty: Path, project: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    options = ("--prompt", "the sea", "--max-new-tokens", 2, "-q")
    assert invoke("generate", chatty, *options, "--save-state", state).code == 0
    other = invoke("generate", project / "teacher", *options, "--state", state)
    assert (other.code, "another model" in other.err, other.out) == (4, True, "")
    none = invoke("generate", chatty, *options, "--state", tmp_path / "none")
    assert (none.code, "no such file" in none.err) == (4, True)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert invoke("generate", chatty, *options, "--prompt-file", empty).code == 2
    assert invoke("generate", chatty, *options, "--prompt-file", tmp_path / "nothing").code == 2


def test_another_document_may_follow_the_first(
    invoke: Invoke, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("one", DOCUMENT), ("two", "a fish was in the net")):
        (tmp_path / name).write_text(text)
    first, options = tmp_path / "first", ("--max-new-tokens", 4, "--json", "-q")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert (
        invoke("generate", chatty, "--chat", "--prompt-file", tmp_path / "one", "--save-state", first, *options).code
        == 0
    )
    both = invoke(
        "generate", chatty, "--chat", "--state", first, "--prompt-file", tmp_path / "two", "--prompt", "who?", *options
    )
    one = invoke("generate", chatty, "--chat", "--state", first, "--prompt", "who?", *options)
    assert both.json["prompt_tokens"] > one.json["prompt_tokens"] + 3


def test_nothing_said_is_nothing_kept(
    invoke: Invoke, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    result = invoke("generate", chatty, "--chat", "--save-state", tmp_path / "state", "-q")
    assert (result.code, result.err) == (0, "")
    assert not (tmp_path / "state").exists()


def test_where_a_state_cannot_be_kept_is_said_before_anything_is_read(
    invoke: Invoke, chatty: Path, tmp_path: Path
) -> None:
    for path, code in ((tmp_path, 2), (tmp_path / "none" / "state", 5)):
        result = invoke("generate", chatty, "--prompt", "the sea", "--save-state", path, "-q")
        assert (result.code, result.out) == (code, "")


def test_a_conversation_without_room_is_kept_as_far_as_it_went(
    invoke: Invoke, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one\n{DOCUMENT}\n"))
    options = ("--max-new-tokens", 4, "-q")
    full = invoke("generate", chatty, "--chat", "--context-tokens", 40, "--save-state", state, *options)
    assert full.code == 2
    assert "--context-tokens" in full.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\n\n"))
    goes_on = invoke("generate", chatty, "--chat", "--state", state, *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\n"))
    whole = invoke("generate", chatty, "--chat", *options)
    assert full.out + goes_on.out == whole.out


def test_a_long_question_to_a_kept_conversation_has_room(
    invoke: Invoke, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    options = ("--max-new-tokens", 2, "--json", "-q")
    begun = invoke("generate", chatty, "--chat", "--prompt", "one", "--save-state", state, *options)
    assert begun.code == 0, begun.err
    (tmp_path / "long").write_text(DOCUMENT * 40)
    asked = invoke(
        "generate", chatty, "--chat", "--state", state, "--prompt-file", tmp_path / "long", "--prompt", "two", *options
    )
    assert asked.code == 0, asked.err
    plain = invoke("generate", chatty, "--state", state, "--prompt", "two", *options)
    assert (plain.code, "--chat" in plain.err + plain.out) == (2, True)
