"""A tiny teacher, a byte-level tokenizer of its size, and prose to measure on."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridize.recipe.documents import Document
from tests.tiny import tiny_teacher

VOCABULARY = 384
_WORDS = "the a quiet river stone garden old king walked slowly under tall trees and looked for his lost silver ring"


def make_prose(num_sentences: int, seed: int) -> str:
    """Sentences of 5 to 14 words from a small vocabulary, with capitals and stops."""
    rng = random.Random(seed)
    words = _WORDS.split()
    sentences = [" ".join(rng.choices(words, k=rng.randint(5, 14))) for _ in range(num_sentences)]
    return " ".join(f"{sentence.capitalize()}." for sentence in sentences)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE without a start token, as SmolLM2's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([make_prose(300, seed=0)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10**6
    )


@pytest.fixture(scope="session")
def teacher() -> Any:
    return tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=2)


@pytest.fixture(scope="session")
def other() -> Any:
    """A model that is not the teacher."""
    return tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=2, seed=9)


@pytest.fixture
def documents() -> list[Document]:
    return [
        Document(make_prose(60, seed=1), "garden", "garden--1.txt"),
        Document(make_prose(20, seed=2), "garden", "garden--2.txt"),
        Document(make_prose(40, seed=3), "river", "river--1.txt"),
        Document("Two words.", "river", "river--2.txt"),
    ]
