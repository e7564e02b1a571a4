"""Prose, and the tokenizers that prompts are made with."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from hybridize.evaluation.tasks.needles import NOISE
from hybridize.evaluation.tasks.vocabulary import plain_words
from hybridize.recipe.probes import RecallTask
from tests.evaluation.conftest import make_prose
from tests.evaluation.tasks.vocabularies import byte_level, sentence_piece

TASKS: tuple[str, ...] = get_args(RecallTask)
PROSE = [make_prose(60, seed=1), make_prose(20, seed=2), make_prose(40, seed=3)]
_NUMBERED = " ".join(f"{i}. {word}" for i, word in enumerate(plain_words()))
_TEXTS = [*PROSE, f"{NOISE}\n", f"{NOISE}\n\nThe number for a key is: 1234567.\n\nIt is.", _NUMBERED] * 3

MAKERS = {
    "byte-level": lambda: byte_level(_TEXTS),
    "byte-level with a start token": lambda: byte_level(_TEXTS, start=True),
    "sentence-piece": lambda: sentence_piece(_TEXTS),
    "sentence-piece that doubles blanks": lambda: sentence_piece(_TEXTS, start=True, doubles=True),
    "sentence-piece with two line ends in one": lambda: sentence_piece(_TEXTS, more=("\n", "\n\n")),
}
_made: dict[str, Any] = {}


def tokenizer_of(name: str) -> Any:
    """Made once."""
    if name not in _made:
        _made[name] = MAKERS[name]()
    return _made[name]


@pytest.fixture(params=list(MAKERS))
def spoken(request: pytest.FixtureRequest) -> Any:
    """Every kind of tokenizer, one after the other, with a token for every common word."""
    return tokenizer_of(request.param)
