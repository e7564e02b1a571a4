"""What was lost, what was kept and what was saved, in sentences; losses come first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hybridize.report.numbers import percent, rounded, size, tokens, with_error
from hybridize.report.pairs import by_length, chance_of, says_nothing
from hybridize.report.results import Results, probe

GROUPS = ("Lost", "Not settled", "Kept", "Saved", "Says nothing", "Measured")
"""In the order in which they are told. "Not settled": the interval reaches both to a loss and to none."""

NEGLIGIBLE = 0.1
"""A loss of less than this share, at the lower end of the interval, counts as kept."""

Z_95 = 1.96

Finding = tuple[str, str]


def verdict(results: Results) -> list[Finding]:
    """(group, sentences) for each group that has something in it."""
    makers = (_perplexity, _recall, _reading, _choices, _agreement, _state, _speed)
    findings = [finding for maker in makers for finding in maker(results)]
    return [
        (group, " ".join(sentence for name, sentence in findings if name == group))
        for group in GROUPS
        if any(name == group for name, _ in findings)
    ]


def _perplexity(results: Results) -> Iterator[Finding]:
    ppl = probe(results, "perplexity")
    if ppl is None:
        return
    if ppl["ratio"] is None:
        yield "Measured", f"Perplexity on held-out text is {with_error(ppl, 'student')}."
        return
    change, error = (ppl["ratio"] - 1) * 100, ppl["ratio_se"]
    spread = "" if error is None else f" ± {error * 100:.1f}"
    word = "above" if change >= 0 else "below"
    reach = 0.0 if error is None else Z_95 * error * 100
    group = "Lost" if change > reach else "Kept"
    yield (
        group,
        (
            f"Perplexity on held-out text is {ppl['student']:.2f} against the teacher's {ppl['teacher']:.2f}: "
            f"{abs(change):.1f}{spread} % {word} it."
        ),
    )


def _recall(results: Results) -> Iterator[Finding]:
    recall = probe(results, "recall")
    for length, pair in by_length(recall["by_length"]) if recall else ():
        yield _answers(pair, f"what is hidden in {tokens(length)} tokens")


def _reading(results: Results) -> Iterator[Finding]:
    if reading := probe(results, "reading"):
        yield _answers(reading, "the values asked of documents")


def _choices(results: Results) -> Iterator[Finding]:
    if choices := probe(results, "choices"):
        yield _answers(choices, "the multiple-choice questions", chance_of(choices), verb="answers")


def _answers(pair: Mapping[str, Any], what: str, chance: float = 0.0, *, verb: str = "finds") -> Finding:
    student, teacher, kept = pair["student"], pair["teacher"], pair["kept"]
    found = f"Of {what} it {verb} {percent(student['share'])}"
    if teacher is None:
        return "Measured", f"{found} ({student['samples']} questions)."
    found += f", the teacher {percent(teacher['share'])}"
    if why := says_nothing(pair, chance):
        return "Says nothing", f"{found}: {why}, so this shows no loss and no gain."
    interval = f"at least {kept['low']:.2f}" if kept["high"] is None else f"{kept['low']:.2f}-{kept['high']:.2f}"
    at_chance = chance and student["low"] <= chance
    guessing = f" It may be guessing (chance {percent(chance)})." if at_chance else ""
    return _group(kept), f"{found}: × {kept['value']:.2f} ({interval}).{guessing}"


def _group(kept: Mapping[str, Any]) -> str:
    if kept["high"] is not None and kept["high"] < 1:
        return "Lost"
    return "Kept" if kept["low"] >= 1 - NEGLIGIBLE else "Not settled"


def _agreement(results: Results) -> Iterator[Finding]:
    if close := probe(results, "agreement"):
        yield (
            "Measured",
            (
                f"At {percent(close['top1'])} of the positions both models rank one token first; "
                f"KL {rounded(close['kl'])} nats a token."
            ),
        )
    if same := probe(results, "continuation"):
        yield (
            "Measured",
            (
                f"Greedy continuations have {same['same_tokens']:.1f} tokens of {same['new_tokens']} in common "
                "before they part."
            ),
        )


def _state(results: Results) -> Iterator[Finding]:
    if state := probe(results, "state_bytes"):
        yield (
            "Saved" if state["ratio"] < 1 else "Lost" if state["ratio"] > 1 else "Measured",
            (
                f"Decoding one sequence of {tokens(state['tokens'])} tokens takes {size(state['student'])} of state "
                f"instead of {size(state['teacher'])} ({percent(state['ratio'])})."
            ),
        )


def _speed(results: Results) -> Iterator[Finding]:
    speed = probe(results, "speed")
    rows = [row for row in speed["decode"] if row["student"] and row["teacher"]] if speed else []
    if not rows:
        return
    row = max(rows, key=lambda row: (row["tokens"], -row["sequences"]))
    faster = row["teacher"] / row["student"]
    sentence = (
        f"After {tokens(row['tokens'])} tokens a step of {row['sequences']} sequence{'s' * (row['sequences'] > 1)} "
        f"takes {rounded(row['student'])} ms here, the teacher's {rounded(row['teacher'])} ms."
    )
    yield ("Saved" if faster > 1.05 else "Lost" if faster < 0.95 else "Measured"), sentence
