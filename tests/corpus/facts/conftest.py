"""Running text whose sentences can be told apart, tokenizers, and documents with facts in it."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from hybridize.corpus.facts import place_facts
from hybridize.corpus.facts.drawing import Drawer
from hybridize.corpus.facts.fact import FactDocument
from hybridize.corpus.facts.kinds import KINDS
from tests.evaluation.tasks.vocabularies import byte_level, sentence_piece

WORDS = [
    "river",
    "barge",
    "canal",
    "lock",
    "keeper",
    "water",
    "level",
    "slow",
    "tow",
    "path",
    "morning",
    "fog",
    "bridge",
    "cargo",
    "rope",
    "wharf",
    "evening",
]


def sentence(rng: random.Random, document: int, number: int) -> str:
    words = " ".join(rng.choices(WORDS, k=rng.randint(5, 18)))
    return f"In chapter {document} at verse {number} the {words}."


def make_document(document: int, sentences: int) -> str:
    rng = random.Random(document)
    text = ""
    for number in range(sentences):
        text += sentence(rng, document, number) + rng.choice((" ", " ", "\n", "\n\n"))
    return text.strip()


FILLER = [make_document(document, random.Random(document).randint(5, 120)) for document in range(60)]


@cache
def tokenizer_of(kind: str) -> Any:
    rng = random.Random(7)
    threads = [thread for _ in range(150) for thread in Drawer(rng).threads(8)]
    said = [mention.text for thread in threads for mention in (*thread.statements, *thread.questions)]
    said += [form for kind in KINDS for form in (*kind.statements, *kind.questions)]
    texts = [*FILLER[:20], "\n\n".join(said), " ".join(said)]
    return byte_level(texts) if kind == "byte-level" else sentence_piece(texts)


@cache
def documents_of(kind: str, document_tokens: int, tokens: int = 60_000) -> tuple[FactDocument, ...]:
    made = place_facts(FILLER, tokenizer_of(kind), tokens=tokens, document_tokens=document_tokens, seed=3)
    return tuple(made)


@pytest.fixture(scope="module")
def documents() -> tuple[FactDocument, ...]:
    return documents_of("byte-level", 2048, 200_000)
