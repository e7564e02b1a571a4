"""Documents that teach to recall: running text in which facts are stated, and much later asked for and answered.

They are for distillation. A student whose layers see a window of a few hundred tokens must carry over what stands
before it, and text from books and manuals seldom asks for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hybridize.corpus.facts.documents import place_facts

__all__ = ["make_facts", "place_facts"]


def make_facts(
    filler: Sequence[str],
    tokenizer: Any,
    *,
    tokens: int,
    document_tokens: int,
    seed: int | str,
    length_jitter: float = 0.0,
) -> Iterator[str]:
    """Documents of running text with facts and questions, until they have `tokens` tokens in all.

    Every answer stands verbatim in the document before its question, most of them at least 600 tokens before, in a
    document of less than 1000 tokens six tenths of it; the distances spread log-uniformly up to the length of the
    document. The same arguments give the same documents.

    Args:
        filler: documents that the running text is taken from, a few hundred tokens at a time.
        tokenizer: of the model that is trained.
        document_tokens: of a document, at most; it has nine tenths of that or more.
        length_jitter: 0 to 1; by how much a document may be shorter than that, as a share of it.

    Raises:
        UsageError: documents too short for facts, or no text in `filler`.
    """
    for document in place_facts(
        filler, tokenizer, tokens=tokens, document_tokens=document_tokens, seed=seed, length_jitter=length_jitter
    ):
        yield document.text
