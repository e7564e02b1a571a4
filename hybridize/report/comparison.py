"""Several evaluations beside each other: models by measures, quality against memory, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hybridize.report.blocks import Block, Figure, Paragraphs, Section
from hybridize.report.charts.lines import Point, Series, line_chart
from hybridize.report.charts.scale import Axis
from hybridize.report.charts.style import NUM_COLOURS
from hybridize.report.differences import differences
from hybridize.report.names import distinct_names
from hybridize.report.numbers import ABSENT, ratio, share, tokens, with_error
from hybridize.report.pairs import Pair, chance_of, says_nothing
from hybridize.report.results import Results, probe
from hybridize.report.tables import Table, over_teacher
from hybridize.report.verdict import Z_95


@dataclass(frozen=True)
class _Measure:
    """A column: its heading, and what stands in it for a model (`ABSENT` where it was not measured)."""

    title: str
    write: Callable[[Results], str]


def comparison_sections(results: Sequence[Results]) -> list[Section]:
    """The differences in what was measured first, then the table and the charts."""
    names = distinct_names([one["model"] for one in results])
    return [
        Section("What can be compared", [*differences(names, results)]),
        Section("Measures", [_table(names, results)]),
        Section("Quality against memory", [*_charts(names, results)]),
    ]


def _table(names: Sequence[str], results: Sequence[Results]) -> Table:
    columns = [measure for measure in _measures(results) if any(measure.write(one) != ABSENT for one in results)]
    rows = [(name, *(measure.write(one) for measure in columns)) for name, one in zip(names, results, strict=True)]
    note = "× is student over its own teacher; ± is one standard error; brackets are 95 % intervals."
    return Table("Models and measures", ("model", *(measure.title for measure in columns)), rows, note)


def _measures(results: Sequence[Results]) -> Iterator[_Measure]:
    yield _Measure("perplexity", lambda one: with_error(probe(one, "perplexity") or {}, "student"))
    yield _Measure("perplexity ratio", lambda one: _times(with_error(probe(one, "perplexity") or {}, "ratio", 3)))
    yield _Measure("KL", lambda one: with_error(probe(one, "agreement") or {}, "kl", 3))
    yield _Measure("same next token (%)", lambda one: with_error(probe(one, "agreement") or {}, "top1", 1, 100.0))
    yield _Measure("same greedy tokens", lambda one: with_error(probe(one, "continuation") or {}, "same_tokens", 1))
    for length in sorted({int(n) for one in results for n in (probe(one, "recall") or {"by_length": ()})["by_length"]}):
        yield _Measure(f"recall, {tokens(length)}", partial(_recall, length=length))
    yield _Measure("reading", lambda one: _kept(probe(one, "reading")))
    yield _Measure("choices", lambda one: _kept(found := probe(one, "choices"), chance_of(found) if found else 0.0))
    yield _Measure("state bytes", _state)
    yield _Measure("decode time", _decode)


def _times(written: str) -> str:
    return written if written == ABSENT else f"× {written}"


def _recall(one: Results, *, length: int) -> str:
    return _kept((probe(one, "recall") or {"by_length": {}})["by_length"].get(str(length)))


def _kept(pair: Pair | None, chance: float = 0.0) -> str:
    """Student over teacher; the student's own share where there is no teacher to compare with."""
    if pair is None:
        return ABSENT
    return says_nothing(pair, chance) or (share(pair["student"]) if pair["kept"] is None else ratio(pair["kept"]))


def _state(one: Results) -> str:
    state = probe(one, "state_bytes")
    return f"× {state['ratio']:.3f} at {tokens(state['tokens'])}" if state else ABSENT


def _decode(one: Results) -> str:
    rows = (probe(one, "speed") or {"decode": []})["decode"]
    row = max(rows, key=lambda row: (row["tokens"], -row["sequences"]), default=None)
    written = ABSENT if row is None else over_teacher(row)
    return written if row is None or written == ABSENT else f"{written} after {tokens(row['tokens'])}"


def _charts(names: Sequence[str], results: Sequence[Results]) -> Iterator[Block]:
    found = {
        "recall-state-bytes": ("Recall kept against state bytes", "recall, student over teacher", _recall_point),
        "perplexity-state-bytes": ("Perplexity against state bytes", "perplexity, student over teacher", _ppl_point),
    }
    drawn = False
    for file, (title, label, point) in found.items():
        series = [
            Series(name, f"c{number % NUM_COLOURS}", [place], joined=False)
            for number, (name, one) in enumerate(zip(names, results, strict=True))
            if (place := _beside_state(one, point)) is not None
        ]
        if series:
            drawn = True
            x = Axis("state bytes, student over teacher", low=0.0, high=1.0, show=lambda value: f"{value:g}")
            y = Axis(label, low=0.0 if point is _recall_point else None, show=lambda value: f"{value:g}")
            yield Figure(file, title, line_chart(title, series, x, y, one=1.0))
    if not drawn:
        yield Paragraphs([("", "No model has both its quality and its state bytes measured beside a teacher.")])


Interval = Mapping[str, float | None]


def _beside_state(one: Results, quality: Callable[[Results], Interval | None]) -> Point | None:
    state, value = probe(one, "state_bytes"), quality(one)
    if state is None or value is None or value["value"] is None:
        return None
    return Point(state["ratio"], value["value"], value["low"], value["high"])


def _recall_point(one: Results) -> Interval | None:
    recall = probe(one, "recall")
    return recall["kept"] if recall is not None and not says_nothing(recall) else None


def _ppl_point(one: Results) -> Interval | None:
    ppl = probe(one, "perplexity")
    if ppl is None or ppl["ratio"] is None:
        return None
    reach = Z_95 * (ppl["ratio_se"] or 0.0)
    return {"value": ppl["ratio"], "low": ppl["ratio"] - reach, "high": ppl["ratio"] + reach}
