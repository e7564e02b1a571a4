"""What can be said of one sort of thing, and in which words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """An attribute of things, in sentences with the thing at `{e}` and its value at `{v}`.

    Attributes:
        domain: where such facts are met.
        entity: sort of thing (`names.NAMES`). value: sort of value (`values.VALUES`).
        label: what is asked for, as a noun phrase that follows "the".
        statements: sentences that state the fact.
        questions: ask for the value.
        restatements: say it again; they close with the value.
        plural: the label for several values of one thing; "" where it has one.
    """

    domain: str
    entity: str
    value: str
    label: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    restatements: tuple[str, ...]
    plural: str = ""
