"""What texts of the teacher begin and end with, and how many are written side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybridize.corpus.sampling.choice import Sampling
from hybridize.corpus.teacher import (
    CPU_BATCH,
    MOST_ROWS,
    TeacherOptions,
    default_batch,
    openings_of,
    read_prompts,
    teacher_corpus,
)
from hybridize.errors import CheckpointError, UsageError
from tests.tiny import tiny_teacher


class Letters:
    """Tokens 3 and above are characters from "a" on."""

    eos_token_id: int | None = 2
    bos_token_id = 1

    def __init__(self, *, opens: bool = False) -> None:
        self.opens = opens

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        opening = [self.bos_token_id] if self.opens and add_special_tokens else []
        return SimpleNamespace(input_ids=[*opening, *(ord(letter) - ord("a") + 3 for letter in text)])

    def decode(self, tokens: Iterable[int], clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return "".join("\ufffd" if token < 3 else chr(ord("a") + token - 3) for token in tokens)


def test_texts_begin_after_what_stands_between_documents() -> None:
    model = tiny_teacher()
    assert openings_of(model, Letters(), [], 9).tokens == [[2]]
    assert openings_of(model, Letters(opens=True), [], 9).tokens == [[1]]
    assert openings_of(model, Letters(), ["b", "ca"], 9).tokens == [[2, 4], [2, 5, 3]]


def test_texts_end_with_the_separator_or_what_the_model_says() -> None:
    model = tiny_teacher()
    assert openings_of(model, Letters(), [], 9).ends == [2]
    model.generation_config.eos_token_id = [7, 0]
    assert openings_of(model, Letters(), [], 9).ends == [0, 2, 7]


def test_openings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="a prompt of 8 tokens leaves no room in texts of 9"):
        openings_of(tiny_teacher(), Letters(), ["a", "abcdefgh"], 9)
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    with pytest.raises(CheckpointError, match="no end-of-sequence token"):
        openings_of(tiny_teacher(), tokenizer, [], 9)


def test_prompts_are_the_lines_with_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one \n\n  \ntwo\\nthree\n")
    assert read_prompts(path) == ["one ", "two\nthree"]
    path.write_text("\n \n")
    with pytest.raises(CheckpointError, match="holds no prompt"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("free_bytes", "tokens", "expected"),
    [(10**12, 10**9, MOST_ROWS), (10**12, 10**6, 122), (10**12, 100, CPU_BATCH), (10**9, 10**9, 14), (0, 10**9, 1)],
)
def test_a_gpus_rows_fit_its_memory(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int, tokens: int, expected: int
) -> None:
    """With the sizes of SmolLM2-135M in bf16 a token takes 23,040 bytes of caches."""
    sizes = {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152}
    config = SimpleNamespace(**sizes)
    model = SimpleNamespace(device=torch.device("cuda"), config=config, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 10**12))
    options = TeacherOptions(tokens, Sampling())
    assert default_batch(model, options) == expected


def test_the_corpus_of_a_teacher(tmp_path: Path) -> None:
    options = TeacherOptions(300, Sampling(), sequence_tokens=20, min_tokens=3, batch=4, seed=1)
    made = teacher_corpus(tiny_teacher(), Letters(), options, tmp_path / "out", name="tiny", prompts=["abc"])
    lines = (tmp_path / "out" / "train" / "teacher.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row["text"].startswith("abc"[: len(row["text"])]) for row in rows)
    assert all(not row["text"].endswith("\ufffd") for row in rows)
    (source,) = made["sources"]
    assert source["documents"] == source["short"] + source["train"]["documents"] == source["short"] + len(rows)
    assert 250 <= source["train"]["tokens"] <= 300
    assert source["lengths"]["max"] == 19
    assert made["options"] == options.to_json() | {"batch": 4, "prompts": 1}
    assert "Texts that tiny wrote by itself." in (tmp_path / "out" / "README.md").read_text()
