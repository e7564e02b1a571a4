from __future__ import annotations

from hybridize.report.numbers import found, percent, size, tokens, with_error
from hybridize.report.prose import samples_section, training_section, verdict
from hybridize.report.render import summary_rows
from hybridize.report.sparkline import sparkline
from hybridize.report.tables import Table, all_tables, markdown, plain
from tests.report.synthetic import fail_probe, make_results


def test_the_summary_says_what_was_lost() -> None:
    assert summary_rows(make_results()) == [
        ("perplexity on held-out text", "24.00 ± 0.50", "20.00 ± 0.25", "× 1.200 ± 0.010"),
        ("same next token as the teacher", "80.0 ± 1.0 %", "-", "-"),
        ("KL from the teacher (nats a token)", "0.250 ± 0.020", "-", "-"),
        ("needles found in 1k tokens", "20/20 (10-90 %)", "20/20 (10-90 %)", "× 1.00"),
        ("needles found in 4k tokens", "10/20 (10-90 %)", "20/20 (10-90 %)", "× 0.50"),
        ("state bytes at 8k tokens", "1.0 MiB", "8.0 MiB", "× 0.125"),
    ]


def test_a_student_alone_and_failed_probes_are_said_to_be() -> None:
    results = make_results()
    results["teacher"] = None
    results["probes"]["perplexity"] |= {"teacher": None, "ratio": None, "teacher_se": None, "ratio_se": None}
    for parts in results["probes"]["recall"]["by_length"].values():
        parts["teacher"] = None
    results["probes"]["recall"]["teacher"] = None
    fail_probe(results, "agreement")
    (first, needles, *_) = summary_rows(results)
    assert first == ("perplexity on held-out text", "24.00 ± 0.50", "-", "-")
    assert needles[2:] == ("-", "-")
    note = all_tables(results)[0].note
    assert "No teacher was given" in note
    assert "agreement (failed: out of memory)" in note
    assert "Agreement with the teacher" not in [table.title for table in all_tables(results)]
    assert "100.0 % in 1k tokens" in verdict(results)


def test_a_broken_promise_of_state_bytes_is_in_the_table() -> None:
    results = make_results()
    results["probes"]["state_bytes"]["measured"]["student"]["as_promised"] = False
    assert "state of student is not what the configuration promises" in all_tables(results)[0].note


def test_tables_are_written_two_ways() -> None:
    table = Table("Title", ("name", "a|b"), [("long label", "1"), ("x", "100")], "A note.")
    assert markdown(table) == (
        "## Title\n\n| name | a\\|b |\n| --- | ---: |\n| long label | 1 |\n| x | 100 |\n\nA note.\n"
    )
    assert plain(table) == "Title\nname        a|b\nlong label    1\nx           100\nA note.\n"


def test_every_row_has_a_cell_for_every_heading() -> None:
    tables = all_tables(make_results())
    assert len(tables) == 6
    for table in tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_the_verdict_is_plain_words() -> None:
    text = verdict(make_results())
    assert "24.00 against the teacher's 20.00: 20.0 ± 1.0 % above it." in text
    assert "50.0 % in 4k tokens (teacher 100.0 %)" in text
    assert "1.0 MiB of state instead of 8.0 MiB (12.5 %)" in text
    better = make_results()
    better["probes"]["perplexity"] |= {"ratio": 0.9}
    assert "10.0 ± 1.0 % below it" in verdict(better)


def test_samples_cannot_leave_their_fence() -> None:
    text = samples_section(make_results())
    assert "````text\nThe old king ```<b>\n````" in text
    assert "```text\nThe old castle\n```" in text


def test_training_is_told_by_stage() -> None:
    rows = [{"step": 50 + 10 * n, "stage_step": 10 * n, "loss": 4.0 - n, "tokens_per_s": 100.0 * n} for n in (1, 2, 3)]
    line = training_section({"align": rows}).splitlines()[-1]
    assert line == "| align | 30 | █▅▁ | 3 | 1 | 200 |"
    assert training_section({}) == ""


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([]) == sparkline([float("nan")]) == sparkline([1.0], width=0) == ""
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"
    assert sparkline([1, float("inf"), 2]) == "▁█"


def test_numbers() -> None:
    assert [size(n) for n in (0, 1023, 1536, 2**20, 5 * 2**30, 2**41)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "5.0 GiB", "2.0 TiB",
    ]  # fmt: skip
    assert [tokens(n) for n in (256, 1000, 1024, 1536, 131072)] == ["256", "1000", "1k", "1536", "128k"]
    assert with_error({"a": 1.234, "a_se": None}, "a") == "1.23"
    assert with_error({"a": 1e9, "a_se": None}, "a") == "1.00e+09"
    assert with_error({"a": None}, "a") == percent(None) == found(None) == "-"
