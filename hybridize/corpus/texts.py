"""A corpus of text that is there: gathered, mixed and written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from hybridize.corpus.folder import HELD_OUT, TRAIN, CorpusFile, Record, corpus_folder, write_corpus
from hybridize.corpus.gather import Entry, Gathered, gather
from hybridize.corpus.ingredients import FACTS, CorpusOptions
from hybridize.corpus.lengths import Measure, quantiles
from hybridize.corpus.mixture import draw, wanted_tokens
from hybridize.errors import UsageError
from hybridize.progress import SILENT, Reporter

FILE_CHARACTERS = 2**26
"""Of a training file, about: none is so large that it must be read whole to be looked at."""
FACTS_JITTER = 0.75
"""Documents with facts have a quarter of the longest length or more."""
_SHORT_OF = 0.99
"""A source that gives less than this share of what was wanted of it is told."""


@dataclass(frozen=True)
class Mixed:
    """What the mixture takes of one source."""

    gathered: Gathered
    wanted: float
    entries: Sequence[Entry]

    @property
    def length(self) -> int:
        """All that is taken, in the measure's unit."""
        return sum(entry.length for entry in self.entries)


def text_corpus(
    options: CorpusOptions,
    out: str | Path,
    *,
    tokenizer: Any = None,
    base: Path = Path(),
    offline: bool = False,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Makes a corpus of text and writes its folder.

    Args:
        tokenizer: measures the documents; None: by characters.
        base: folder that relative paths start from.

    Returns:
        What corpus.json says.

    Raises:
        UsageError: the options ask for what cannot be, or the folder is not empty.
        RecipeError, CheckpointError: a source cannot be read.
    """
    _check(options, tokenizer)
    measure = Measure(tokenizer)
    with corpus_folder(out, overwrite=overwrite) as folder:
        gathered = gather(options, measure, base, offline=offline, reporter=reporter)
        if not any(source.train for source in gathered):
            hint = "Give more text, or lower --min-tokens or --held-out-share."
            raise UsageError("no document is left to train on.", where="--text", hint=hint)
        mixed = _mix(options, [source for source in gathered if not source.held_out_source])
        records = [record for part in mixed for record in _records(part.gathered, part.entries)]
        facts, held_out_facts = _facts(options, gathered, mixed, measure, reporter) if options.facts else ([], [])
        files = _shuffled_files([*records, *facts], options.seed)
        files += [CorpusFile(HELD_OUT, source.name, _records(source, source.held_out)) for source in gathered]
        files.append(CorpusFile(HELD_OUT, FACTS, held_out_facts))
        return write_corpus(
            folder, files, _about(options, gathered, mixed, (facts, held_out_facts), measure.unit), unit=measure.unit
        )


def _check(options: CorpusOptions, tokenizer: Any) -> None:
    from hybridize.corpus.facts.documents import FEWEST_TOKENS

    if tokenizer is None and (options.tokens is not None or options.facts):
        where = "--facts" if options.tokens is None else "--tokens"
        raise UsageError("tokens can only be counted by a tokenizer.", where=where, hint="Give --model MODEL.")
    if options.facts and options.sequence_tokens < FEWEST_TOKENS:
        what = f"documents of {options.sequence_tokens} tokens are too short for facts."
        raise UsageError(what, where="--sequence-tokens", hint=f"Give {FEWEST_TOKENS} or more.")


def _shuffled_files(records: Sequence[Record], seed: int) -> list[CorpusFile]:
    """The training files: documents of all sources in one drawn order, so that a reader meets the mixture anywhere."""
    order = list(records)
    random.Random(f"{seed}/order").shuffle(order)
    parts: list[list[Record]] = [[]]
    size = 0
    for record in order:
        if size >= FILE_CHARACTERS:
            parts.append([])
            size = 0
        parts[-1].append(record)
        size += len(record.text)
    return [CorpusFile(TRAIN, f"{number:03d}", part) for number, part in enumerate(parts)]


def _mix(options: CorpusOptions, sources: Sequence[Gathered]) -> list[Mixed]:
    sizes = [sum(entry.length for entry in source.train) for source in sources]
    weights = [ingredient.weight for ingredient in options.train]
    total = None if options.tokens is None else options.tokens * (1 - options.facts)
    wanted = wanted_tokens(sizes, weights, total=total, max_repeats=options.max_repeats)
    mixed = []
    for source, tokens in zip(sources, wanted, strict=True):
        lengths = [entry.length for entry in source.train]
        seed = f"{options.seed}:{source.name}"
        numbers = draw(lengths, tokens, max_repeats=options.max_repeats, seed=seed)
        mixed.append(Mixed(source, tokens, [source.train[number] for number in numbers]))
    return mixed


def _records(source: Gathered, entries: Sequence[Entry]) -> list[Record]:
    return [Record(entry.document.text, entry.document.id, source.name, entry.length) for entry in entries]


def _facts(
    options: CorpusOptions, gathered: Sequence[Gathered], mixed: Sequence[Mixed], measure: Measure, reporter: Reporter
) -> tuple[list[Record], list[Record]]:
    """Documents with facts to train on and to hold out, each in text of its own side where there is any."""
    from hybridize.corpus.facts import make_facts

    train = [entry.document.text for part in mixed for entry in part.entries]
    wanted = round(sum(part.length for part in mixed) * options.facts / (1 - options.facts))
    beside = round(wanted * options.held_out_share / (1 - options.held_out_share))
    number = count()
    with reporter.task("writing facts", wanted + beside) as task:

        def made(filler: Sequence[str], tokens: int, seed: int | str) -> list[Record]:
            records = []
            for text in make_facts(
                filler,
                measure.tokenizer,
                tokens=tokens,
                document_tokens=options.sequence_tokens,
                seed=seed,
                length_jitter=FACTS_JITTER,
            ):
                (length,) = measure.lengths([text])
                records.append(Record(text, f"{FACTS}#{next(number)}", FACTS, length))
                task.advance(length)
            return records

        held_out = _held_out_texts(gathered) or train
        return made(train, wanted, options.seed), made(held_out, beside, f"{options.seed}/held-out")


def _held_out_texts(gathered: Sequence[Gathered]) -> list[str]:
    return [entry.document.text for source in gathered for entry in source.held_out]


def _about(
    options: CorpusOptions,
    gathered: Sequence[Gathered],
    mixed: Sequence[Mixed],
    facts: tuple[Sequence[Record], Sequence[Record]],
    unit: str,
) -> dict[str, Any]:
    weights = {ingredient.name: str(ingredient.weight) for ingredient in options.train}
    taken = {part.gathered.name: part for part in mixed}
    return {
        "seed": options.seed,
        "made_of": "Documents that are there twice, or nearly so, are left out, and none is on both sides.",
        "options": options.to_json(),
        "sources": [
            *(_about_source(source, unit, weights.get(source.name), taken.get(source.name)) for source in gathered),
            *([_about_facts(*facts, unit)] if any(facts) else []),
        ],
        "notes": _notes(mixed, unit) + _notes_of_facts(facts[1], gathered),
    }


def _about_source(source: Gathered, unit: str, weight: str | None, mixed: Mixed | None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "name": source.name,
        "path": source.source.path,
        "weight": weight,
        "held_out_source": source.held_out_source,
        "documents": source.read,
        "exact_duplicates": source.exact_duplicates,
        "near_duplicates": source.near_duplicates,
        "like_held_out": source.like_held_out,
        "short": source.short,
        "held_out": {"documents": len(source.held_out), unit: sum(entry.length for entry in source.held_out)},
        "usable": {"documents": len(source.train), unit: sum(entry.length for entry in source.train)},
        "lengths": quantiles([entry.length for entry in (*source.train, *source.held_out)]),
    }
    if mixed is not None:
        about["train"] = {"documents": len(mixed.entries), unit: mixed.length, "wanted": round(mixed.wanted)}
    return about


def _about_facts(train: Sequence[Record], held_out: Sequence[Record], unit: str) -> dict[str, Any]:
    sides = {"train": train, "held_out": held_out}
    return {
        "name": FACTS,
        "lengths": quantiles([record.length for records in sides.values() for record in records]),
        **{
            side: {"documents": len(records), unit: sum(record.length for record in records)}
            for side, records in sides.items()
        },
    }


def _notes(mixed: Sequence[Mixed], unit: str) -> list[str]:
    notes = []
    for part in mixed:
        longest = max((entry.length for entry in part.entries), default=0)
        if not part.entries:
            notes.append(f"{part.gathered.name}: no document is left to train on.")
        elif part.length < part.wanted * _SHORT_OF and part.wanted - part.length > longest:
            notes.append(
                f"{part.gathered.name} has {part.length:,} {unit} where the mixture wants {part.wanted:,.0f}; "
                "more text, or a higher --max-repeats, fills the gap."
            )
    return notes


def _notes_of_facts(held_out: Sequence[Record], gathered: Sequence[Gathered]) -> list[str]:
    if not held_out or _held_out_texts(gathered):
        return []
    return [f"{FACTS}: no other text is held out; the held-out documents stand in text that is trained on."]
