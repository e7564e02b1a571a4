"""Quality gates: conditions on results such as "perplexity.ratio<=1.5"."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hybridize.errors import UsageError, VerificationError

_CONDITION = re.compile(r"\s*([\w.:/-]+?)\s*(<=|>=|==|!=|<|>)\s*(-?[0-9][0-9_.eE+-]*)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


def gate(results: Mapping[str, Any], *conditions: str) -> None:
    """Holds results against conditions `PATH OPERATOR NUMBER`.

    A path leads through the probes by dots ("recall.kinds.niah_single_1.1024.student.share", list rows by number).

    Raises:
        UsageError: a condition cannot be parsed, or its path leads to no number; the message suggests those near.
        VerificationError: conditions do not hold, or the probe they ask about failed; all are named.
    """
    broken = []
    for condition in conditions:
        path, sign, limit = parse_condition(condition)
        probe = results["probes"].get(path.split(".")[0])
        if isinstance(probe, Mapping) and probe.get("status") == "failed":
            broken.append(f"{condition} (the probe failed: {probe['error']})")
            continue
        value = _look_up(results["probes"], path)
        if not _COMPARE[sign](value, limit):
            broken.append(f"{condition} (it is {value:.6g})")
    if broken:
        raise VerificationError(
            f"{len(broken)} of {len(conditions)} gates do not hold: {'; '.join(broken)}.",
            where="--gate",
            hint="Train longer, keep more full attention layers, or change the gate.",
        )


def parse_condition(condition: str) -> tuple[str, str, float]:
    """Path, operator and number of a condition.

    Raises:
        UsageError: it is none.
    """
    match = _CONDITION.fullmatch(condition)
    try:
        if match is None:
            raise ValueError
        return match[1], match[2], float(match[3])
    except ValueError:
        raise UsageError(
            f"{condition!r} is not a condition.",
            where="--gate",
            hint="Write PATH OPERATOR NUMBER, for example perplexity.ratio<=1.5.",
        ) from None


def _look_up(probes: Mapping[str, Any], path: str) -> float:
    numbers = dict(_numbers(probes, ""))
    if path in numbers:
        return numbers[path]
    near = difflib.get_close_matches(path, numbers, n=3, cutoff=0.5) or sorted(numbers, key=len)[:6]
    raise UsageError(f"the results have no number {path!r}.", where="--gate", hint=f"There are: {', '.join(near)}.")


def _numbers(node: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, Mapping):
        children: Sequence[tuple[Any, Any]] = list(node.items())
    elif isinstance(node, list):
        children = list(enumerate(node))
    else:
        if isinstance(node, int | float) and not isinstance(node, bool):
            yield path, float(node)
        return
    for key, child in children:
        yield from _numbers(child, f"{path}.{key}" if path else str(key))
