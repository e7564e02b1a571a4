"""Names of the things that facts are about: made up, so that nothing is known of them but what the document says."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from functools import partial

from hybridize.corpus.facts import vocabulary as words

Draw = Callable[[random.Random], str]


def person(rng: random.Random) -> str:
    title = rng.choice(("", "", "", "", "", "Dr ", "Prof. "))
    return f"{title}{rng.choice(words.GIVEN_NAMES)} {rng.choice(words.HEADS)}{rng.choice(words.SURNAME_TAILS)}"


def place(rng: random.Random) -> str:
    before = rng.choice(("", "", "", "", "", "Old ", "Upper ", "Port ", "St. ", "Mount "))
    return f"{before}{_coined(rng, words.PLACE_TAILS)}"


def company(rng: random.Random) -> str:
    name = _coined(rng, rng.choice((words.COINED_TAILS, words.SURNAME_TAILS)))
    return f"{name} {rng.choice(('Ltd', 'AG', 'GmbH', 'Inc.', '& Sons', 'Group', 'Works', 'Trust', 'Foods', 'Lines'))}"


def product(rng: random.Random) -> str:
    after = rng.choice(
        ("", " Plus", " Mini", f" {rng.randint(2, 9)}00", f" {rng.choice('ABCEGKMRSTXZ')}{rng.randint(2, 95)}")
    )
    return f"{_coined(rng, words.COINED_TAILS)}{after}"


def coined(rng: random.Random) -> str:
    """A ship, a project, a star: one word that is in no dictionary."""
    return _coined(rng, words.COINED_TAILS)


def species(rng: random.Random) -> str:
    return f"{_coined(rng, words.GENUS_TAILS)} {rng.choice(words.SPECIES)}"


def host(rng: random.Random) -> str:
    name = f"{rng.choice(words.HOST_ROLES)}{rng.choice(('', '-'))}{rng.randint(1, 48):02d}"
    return rng.choice((name, f"{name}.{coined(rng).lower()}.{rng.choice(words.TOP_LEVELS)}"))


def path(rng: random.Random) -> str:
    folders = rng.sample(words.FOLDERS, rng.randint(1, 2))
    after = rng.choice((coined(rng).lower(), str(rng.randint(2, 99))))
    stem = f"{rng.choice(words.STEMS)}{rng.choice(('', '_', '-'))}{after}"
    root = rng.choice(("/", "/", "", "~/"))
    return f"{root}{'/'.join(folders)}/{stem}.{rng.choice(words.SUFFIXES)}"


def option(rng: random.Random) -> str:
    group, name = rng.choice(words.OPTION_GROUPS), rng.choice(words.OPTION_NAMES)
    return rng.choice((f"{group}.{name}", f"{group}_{name}", f"--{group}-{name.replace('_', '-')}", f"{group}/{name}"))


def meeting(rng: random.Random) -> str:
    return f"{_coined(rng, words.PLACE_TAILS)} {rng.choice(words.SUBJECTS)} {rng.choice(words.GATHERINGS)}"


def book(rng: random.Random) -> str:
    subject = _coined(rng, words.PLACE_TAILS)
    forms = ("A History of {}", "Letters from {}", "The Road to {}", "Winter in {}", "The Bells of {}", "Return to {}")
    return f'"{rng.choice(forms).format(subject)}"'


def numbered(rng: random.Random, *, prefixes: tuple[str, ...], low: int, high: int) -> str:
    """A prefix and a number, such as "INV-20418"."""
    return f"{rng.choice(prefixes)}{rng.randint(low, high)}"


def flight(rng: random.Random) -> str:
    return f"{''.join(rng.choices(string.ascii_uppercase, k=2))}{rng.choice((' ', ''))}{rng.randint(11, 4999)}"


def _coined(rng: random.Random, tails: tuple[str, ...]) -> str:
    return rng.choice(words.HEADS) + rng.choice(tails)


NAMES: dict[str, Draw] = {
    "person": person,
    "place": place,
    "company": company,
    "product": product,
    "coined": coined,
    "species": species,
    "host": host,
    "path": path,
    "option": option,
    "meeting": meeting,
    "book": book,
    "flight": flight,
    "train": partial(numbered, prefixes=("IC ", "RE ", "EC ", "S"), low=12, high=989),
    "invoice": partial(numbered, prefixes=("INV-", "no. ", "#", "R/"), low=1021, high=98999),
    "ticket": partial(numbered, prefixes=("BUG-", "#", "REQ-", "OPS-"), low=102, high=9899),
    "door": partial(numbered, prefixes=("", "A", "B", "C", "N-", "W-"), low=2, high=499),
    "sensor": partial(numbered, prefixes=("T-", "S", "probe ", "K/"), low=2, high=899),
    "sample": partial(numbered, prefixes=("S-", "batch ", "lot ", "specimen "), low=21, high=9899),
}
"""Every sort of thing, by the word that kinds of facts use for it."""
