"""A fact, and a text that states facts or asks for them."""

from __future__ import annotations

from dataclasses import dataclass

from hybridize.corpus.facts.kinds import Kind


@dataclass(frozen=True)
class Fact:
    """`entity` has `value` for the attribute that `kind` describes."""

    kind: Kind
    entity: str
    value: str

    def fill(self, form: str) -> str:
        """A form with the entity at `{e}`, the value at `{v}` and, at `{label}` and `{Label}`, what is asked for."""
        label = self.kind.label.format(e=self.entity)
        return form.format(e=self.entity, v=self.value, label=label, Label=label[0].upper() + label[1:])


@dataclass(frozen=True)
class Mention:
    """A text that states its facts (`asks` is false), or asks for all of them and answers.

    Attributes:
        text: holds the values of all facts verbatim.
    """

    text: str
    facts: tuple[Fact, ...]
    asks: bool


@dataclass(frozen=True)
class Placed:
    """A mention in a document: where it begins, in characters and in tokens."""

    mention: Mention
    character: int
    token: int


@dataclass(frozen=True)
class FactDocument:
    """A document, its length in tokens, and its mentions in their order."""

    text: str
    tokens: int
    mentions: tuple[Placed, ...]
