"""The sink and the two ways to show progress."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hybridize.cli.format import bytes_text, count_text, ranges_text, seconds_text, table_lines
from hybridize.cli.output import Output
from hybridize.cli.reporter import LINE_EVERY_S, BarReporter, LineReporter
from hybridize.progress import SILENT


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_errors_are_red_on_a_terminal(terminal: Terminal) -> None:
    Output(stderr=terminal).error({}, "wrong")
    assert "\x1b[1;31m" in terminal.getvalue()


@pytest.mark.parametrize("how", ["NO_COLOR", "--no-color"])
def test_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    Output(color=False if how == "--no-color" else None, stderr=terminal).error({}, "wrong")
    assert "31m" not in terminal.getvalue()
    assert "error: wrong" in terminal.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")


def test_brackets_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result("x", {}, ["a [bold]b[/bold] :smile: [1]"])
    assert capsys.readouterr().out == "a [bold]b[/bold] :smile: [1]\n"


def test_long_lines_stay_whole_when_piped(capsys: pytest.CaptureFixture[str]) -> None:
    Output().result("x", {}, ["word " * 100])
    assert capsys.readouterr().out.count("\n") == 1


def test_reporter_by_stream(terminal: Terminal) -> None:
    assert isinstance(Output(stderr=terminal).reporter(), BarReporter)
    assert isinstance(Output(as_json=True, stderr=terminal).reporter(), LineReporter)
    assert Output(verbosity=-1, stderr=terminal).reporter() is SILENT


def test_lines_come_every_half_minute() -> None:
    now = [0.0]
    stream = io.StringIO()
    reporter = LineReporter(Console(file=stream, width=100), clock=lambda: now[0])
    with reporter.task("distill", total=100) as task:
        for _ in range(100):
            now[0] += 1
            task.advance(1, loss="2.31")
    lines = stream.getvalue().splitlines()
    assert LINE_EVERY_S == 30
    assert lines == [
        "distill ...",
        "distill: 30/100 loss 2.31 0:30 (left 1:10)",
        "distill: 60/100 loss 2.31 1:00 (left 0:40)",
        "distill: 90/100 loss 2.31 1:30 (left 0:10)",
        "distill: 100/100 loss 2.31 1:40 done",
    ]


def test_bars_nest_and_show_fields(terminal: Terminal) -> None:
    reporter = Output(stderr=terminal).reporter()
    with reporter.task("outer", total=2) as outer:
        with reporter.task("inner [x]", total=None) as inner:
            inner.advance(1, loss="1.5", kept="212")
            reporter.note("a note")
        outer.advance(2)
    text = terminal.getvalue()
    assert all(part in text for part in ("outer", "inner [x]", "loss 1.5 kept 212", "2/2", "a note"))


def test_a_bar_ends_when_its_work_fails(terminal: Terminal) -> None:
    reporter: Any = Output(stderr=terminal).reporter()
    with pytest.raises(KeyError), reporter.task("outer", total=1):
        raise KeyError
    with reporter.task("again", total=1) as task:
        task.advance()
    assert "again" in terminal.getvalue()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (bytes_text(0), "0 B"),
        (bytes_text(1536), "1.5 KiB"),
        (bytes_text(5 * 2**40), "5.0 TiB"),
        (count_text(999), "999"),
        (count_text(134515008), "134.5 M"),
        (count_text(8030261248), "8.03 B"),
        (seconds_text(63.9), "1:03"),
        (seconds_text(3723), "1:02:03"),
        (ranges_text([]), ""),
        (ranges_text([3]), "3"),
        (ranges_text([0, 1, 2, 5]), "0-2, 5"),
        (ranges_text([0, 3, 6, 9, 12]), "0, 3, ... 12"),
        (ranges_text([0, 1, 2, 3]), "0-3"),
    ],
)
def test_numbers_in_words(made: str, expected: str) -> None:
    assert made == expected


def test_table_lines_align() -> None:
    assert table_lines([["a", "1", "x"], ["long", "22"]], left=1) == ["a      1  x", "long  22"]
