"""The documents of one source as tokens, several tokenised at a time: a fast tokenizer does them on all cores.

One after the other they would be too slow for several GPUs, where every process reads the whole stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hybridize.errors import RecipeError
from hybridize.recipe.documents import Document

Encode = Callable[[Sequence[str]], list[list[int]]]
MOST_DOCUMENTS = 64
MOST_CHARACTERS = 2**19
"""What is tokenised at a time, unless one document is longer. It is done again when a run goes on."""


class Documents(Protocol):
    """A stream of documents that never ends and can be put back to a place."""

    def next(self) -> Document: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


class TokenStream:
    """(document's id, its tokens), in the order of a stream of documents.

    Its place is that of the documents handed out, whatever was tokenised beyond them.
    """

    def __init__(self, documents: Documents, encode: Encode) -> None:
        self.documents = documents
        self.encode = encode
        self._ready: deque[tuple[str, list[int], dict[str, int]]] = deque()
        self._place = documents.state_dict()
        self._failure: Exception | None = None
        """What came after the last document that is ready."""

    def next(self) -> tuple[str, list[int]]:
        """The next document.

        Raises:
            RecipeError: the source has no training document.
        """
        if not self._ready:
            if self._failure is not None:
                raise self._failure
            self._fill()
        identity, tokens, self._place = self._ready.popleft()
        return identity, tokens

    def _fill(self) -> None:
        texts: list[str] = []
        names: list[tuple[str, dict[str, int]]] = []
        characters = 0
        while not texts or (len(texts) < MOST_DOCUMENTS and characters < MOST_CHARACTERS):
            try:
                document = self.documents.next()
            except Exception as error:
                if not texts:
                    raise
                self._failure = error
                break
            texts.append(document.text)
            names.append((document.id, self.documents.state_dict()))
            characters += len(document.text)
        for (identity, place), tokens in zip(names, self.encode(texts), strict=True):
            self._ready.append((identity, tokens, place))

    def state_dict(self) -> dict[str, int]:
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._ready.clear()
        self._failure = None
        self.documents.load_state_dict(state)
        self._place = dict(state)


def document_encoder(tokenizer: Any) -> Encode:
    """Texts -> token ids of whole documents: the tokenizer's own opening token, if it sets one, and the closing one.

    Raises:
        RecipeError: the tokenizer has no end-of-sequence token to separate documents with.
    """
    closing = tokenizer.eos_token_id
    if closing is None:
        hint = "Add eos_token to tokenizer_config.json."
        raise RecipeError("The tokenizer has no end-of-sequence token.", where="model", hint=hint)
    first = tokenizer("a").input_ids[:1]
    opening = first if first and first[0] == tokenizer.bos_token_id else []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found = tokenizer(list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False).input_ids
        return [[*opening, *tokens, closing] for tokens in found]

    return encode
