"""Quality gates: conditions on results such as "recall@4096>=0.9,ppl_ratio<=1.05"."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridize.errors import UsageError, VerificationError

_CONDITION = re.compile(r"\s*([\w.:/@-]+?)\s*(<=|>=|==|!=|<|>)\s*(-?[0-9][0-9_.eE+-]*)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBERS = {
    "ppl": "perplexity.student",
    "ppl_ratio": "perplexity.ratio",
    "kl": "agreement.kl",
    "top1": "agreement.top1",
    "same_tokens": "continuation.same_tokens",
    "state_ratio": "state_bytes.ratio",
}
"""Short names of numbers."""
_PAIRS = ("recall", "reading", "choices")
"""Short names of what student and teacher were both asked: student over teacher, or the student's share alone."""


@dataclass(frozen=True)
class Condition:
    """A number of the results, how it is compared, and with what."""

    name: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.limit:g}"


class _UndefinedError(Exception):
    """A name that the results know but have no number for; the message says why."""


def gate(results: Mapping[str, Any], *gates: str) -> None:
    """Holds results against conditions `NAME OPERATOR NUMBER`; commas part several in one text.

    A name is short ("ppl", "ppl_ratio", "kl", "top1", "same_tokens", "state_ratio", "recall", "reading", "choices",
    "recall@TOKENS", "TASK@TOKENS") or a path through the probes by dots ("perplexity.by_position.1.ratio"). For what
    both models were asked a short name stands for student over teacher; without a teacher, for the student's share.

    Raises:
        UsageError: a condition cannot be parsed, or its name leads to no number; the message suggests those near.
        VerificationError: conditions do not hold, have no value (the teacher found nothing), or their probe was not
            finished; all are named.
    """
    conditions = parse_conditions(gates)
    broken = [f"{condition} ({why})" for condition in conditions if (why := _broken(results["probes"], condition))]
    if broken:
        raise VerificationError(
            f"{len(broken)} of {len(conditions)} gates do not hold: {'; '.join(broken)}.",
            where="--gate",
            hint="Train longer, keep more full attention layers, or change the gate.",
        )


def parse_conditions(gates: Iterable[str]) -> list[Condition]:
    """The conditions in texts that may hold several.

    Raises:
        UsageError: one is none.
    """
    return [parse_condition(part) for text in gates for part in text.split(",")]


def parse_condition(text: str) -> Condition:
    """One condition.

    Raises:
        UsageError: it is none.
    """
    match = _CONDITION.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        return Condition(match[1], match[2], float(match[3]))
    except ValueError:
        raise UsageError(
            f"{text!r} is not a condition.",
            where="--gate",
            hint="Write NAME OPERATOR NUMBER, for example ppl_ratio<=1.5; commas part several.",
        ) from None


def _broken(probes: Mapping[str, Any], condition: Condition) -> str:
    """Why a condition does not hold; "" if it does."""
    try:
        value = _look_up(probes, condition.name)
    except _UndefinedError as reason:
        return str(reason)
    return "" if _COMPARE[condition.sign](value, condition.limit) else f"it is {value:.6g}"


def _look_up(probes: Mapping[str, Any], name: str) -> float:
    if name in _PAIRS or "@" in name:
        return _kept(probes, name)
    path = _NUMBERS.get(name, name)
    _require_finished(probes, path.split(".")[0], name)
    node: Any = probes
    for step in path.split("."):
        if isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            node = node[int(step)]
        elif isinstance(node, Mapping) and step in node:
            node = node[step]
        else:
            raise _unknown(probes, name)
        if node is None:
            raise _UndefinedError("it has no value: there is no teacher, or too few samples")
    if isinstance(node, bool) or not isinstance(node, int | float):
        raise _unknown(probes, name)
    return float(node)


def _kept(probes: Mapping[str, Any], name: str) -> float:
    """Student over teacher of "recall", "recall@4096", "niah_single_2@4096"; the student's share without a teacher."""
    task, _, length = name.partition("@")
    probe = task if task in _PAIRS and not length else "recall"
    _require_finished(probes, probe, name)
    pair = probes[probe]
    if length:
        pair = (pair["by_length"] if task == "recall" else pair["tasks"].get(task, {})).get(length)
    if pair is None:
        raise _unknown(probes, name)
    if pair["teacher"] is None:
        return float(pair["student"]["share"])
    if pair["kept"] is None:
        raise _UndefinedError("the teacher finds nothing there, so there is nothing to keep")
    return float(pair["kept"]["value"])


def _require_finished(probes: Mapping[str, Any], probe: str, name: str) -> None:
    row = probes.get(probe)
    if not isinstance(row, Mapping):
        raise _unknown(probes, name)
    if row["status"] != "ok":
        raise _UndefinedError(f"the {probe} probe was not finished: {row['status']}, {row['error']}")


def _unknown(probes: Mapping[str, Any], name: str) -> UsageError:
    short = [*_short_names(probes)]
    known = [*short, *_paths(probes, "")]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or short or sorted(known, key=len)[:6]
    return UsageError(f"the results have no number {name!r}.", where="--gate", hint=f"There are: {', '.join(near)}.")


def _short_names(probes: Mapping[str, Any]) -> Iterator[str]:
    finished = {name: row for name, row in probes.items() if row["status"] == "ok"}
    yield from (name for name, path in _NUMBERS.items() if path.split(".")[0] in finished)
    yield from (name for name in _PAIRS if name in finished)
    recall = finished.get("recall", {})
    yield from (f"recall@{length}" for length in recall.get("by_length", {}))
    yield from (f"{task}@{length}" for task, lengths in recall.get("tasks", {}).items() for length in lengths)


def _paths(node: Any, path: str) -> Iterator[str]:
    """Dotted paths to every number."""
    if isinstance(node, Mapping):
        children: Sequence[tuple[Any, Any]] = list(node.items())
    elif isinstance(node, list):
        children = list(enumerate(node))
    else:
        if isinstance(node, int | float) and not isinstance(node, bool):
            yield path
        return
    for key, child in children:
        yield from _paths(child, f"{path}.{key}" if path else str(key))
