from __future__ import annotations

import re

from hybridize.report.blocks import HeatMap, Section
from hybridize.report.markdown import document, fenced
from hybridize.report.numbers import percent, ranges, ratio, rounded, share, size, tokens, with_error
from hybridize.report.render import summary_rows
from hybridize.report.sections import all_sections
from hybridize.report.sections.samples import samples
from hybridize.report.sections.training import training
from hybridize.report.sparkline import sparkline
from hybridize.report.tables import Table, markdown, summary
from tests.report.synthetic import PROBES, fail_probe, make_results, make_results_alone, pair


def sections(results: object) -> list[Section]:
    return all_sections(results, None)  # type: ignore[arg-type]


def table(title: str, results: object = None) -> Table:
    blocks = [block for section in sections(results or make_results()) for block in section.blocks]
    return next(block for block in blocks if isinstance(block, Table) and block.title == title)


def heat(title: str) -> dict[str, list[str]]:
    blocks = [block for section in sections(make_results()) for block in section.blocks]
    found = next(block for block in blocks if isinstance(block, HeatMap) and block.title == title)
    return {label: ["" if cell is None else cell.text for cell in cells] for label, cells in found.rows}


def test_the_summary_has_a_line_for_each_probe_with_intervals() -> None:
    assert summary_rows(make_results()) == [
        ("perplexity on held-out text", "24.00 ± 0.50", "20.00 ± 0.25", "× 1.200 ± 0.010"),
        ("same next token as the teacher", "80.0 ± 1.0 %", "-", "-"),
        ("KL from the teacher (nats a token)", "0.250 ± 0.020", "-", "-"),
        ("greedy tokens in common, of 64", "17.5 ± 2.5", "-", "-"),
        ("recall in 1k tokens", "96.7 % (89-99 %)", "98.3 % (91-100 %)", "× 0.98 (0.90-1.06)"),
        ("recall in 4k tokens", "38.3 % (27-51 %)", "66.7 % (54-77 %)", "× 0.58 (0.40-0.82)"),
        ("reading: answers found in documents", "30.0 % (22-40 %)", "60.0 % (50-69 %)", "× 0.50 (0.35-0.70)"),
        ("multiple choice (chance 25 %)", "55.0 % (48-62 %)", "60.5 % (54-67 %)", "× 0.91 (0.77-1.07)"),
        ("state bytes at 8k tokens", "1.0 MiB", "8.0 MiB", "× 0.125"),
        ("prefill of 2 × 4k tokens (tokens/s)", "12,346", "10,000", "× 1.23"),
        ("decode after 2 × 4k tokens (ms a step)", "21.5", "43", "× 0.50"),
    ]


def test_a_student_alone_and_failed_probes_are_said_to_be() -> None:
    results = make_results_alone()
    fail_probe(results, "inside")
    rows = summary(results)
    assert rows.rows[0] == ("perplexity on held-out text", "24.00 ± 0.50", "-", "-")
    assert rows.rows[2] == ("recall in 4k tokens", "38.3 % (27-51 %)", "-", "-")
    assert "No teacher was given" in rows.note
    assert "agreement (skipped: no teacher was given)" in rows.note
    assert "inside (failed: out of memory)" in rows.note


def test_a_teacher_that_finds_nothing_or_guesses_gives_no_ratio() -> None:
    results = make_results()
    results["probes"]["recall"]["by_length"]["4096"] = pair(4, 1, 20)
    results["probes"]["choices"] |= pair(50, 55, 200)
    found = {row[0]: row[3] for row in summary_rows(results)}
    assert found["recall in 4k tokens"] == "the teacher finds next to nothing"
    assert found["multiple choice (chance 25 %)"] == "the teacher is at chance (25.0 %)"


def test_a_broken_promise_of_state_bytes_is_in_the_table() -> None:
    results = make_results()
    results["probes"]["state_bytes"]["measured"]["student"]["as_promised"] = False
    assert "state of student is not what the configuration promises" in summary(results).note


def test_recall_by_task_length_and_depth() -> None:
    rows = {row[0]: row[1:] for row in table("Recall by task and length").rows}
    assert rows["niah_single_1, 4k"] == ("55.0 % (34-74 %)", "100.0 % (84-100 %)", "× 0.55 (0.34-0.78)", "20")
    assert rows["associative_recall, 4k"][2] == "the teacher finds next to nothing"
    depths = table("Recall by depth")
    assert depths.header == ("task, tokens", "10 %", "90 %")
    assert ("niah_single_1, 4k", "10 / 100", "100 / 100") in depths.rows
    assert not any("associative" in row[0] for row in depths.rows)
    assert heat("Recall kept, task by length")["associative_recall"] == ["95", ""]
    # 1 and 2 hits of 10 at the first depth and 4k tokens.
    assert heat("all tasks: student") == {"10 %": ["100", "15"], "90 %": ["100", "100"]}
    assert heat("niah_single_3: student")["10 %"] == ["100", "20"]
    assert heat("all tasks: teacher")["10 %"] == ["100", "100"]


def test_questions() -> None:
    assert ("squad", "20.0 % (11-33 %)", "40.0 % (28-54 %)", "× 0.50 (0.26-0.94)", "50") in table("Reading").rows
    rows = {row[0]: row[1:] for row in table("Multiple choice").rows}
    assert rows["riddles"][3] == "the teacher is at chance (25.0 %)"
    assert (rows["proverbs"][0], rows["proverbs"][5]) == ("25.0 %", "70.0 %")
    assert table("lm-evaluation-harness").rows == [
        ("arc_easy, acc,none", "0.5125 ± 0.0103", "0.6150 ± 0.0101", "× 0.833")
    ]


def test_ablation_names_the_layers_that_matter_most_and_least() -> None:
    assert [row[0].split(",")[0] for row in table("Layers that matter most").rows] == ["11", "10", "9", "8", "7"]
    assert [row[0].split(",")[0] for row in table("Layers that matter least").rows] == ["0", "1", "2", "3", "4"]
    assert table("Ablation by mixer").rows[1] == (
        "gated_delta_net (layers 0-7)",
        "0.7500 ± 0.0030",
        "1.0000 ± 0.0200",
        "25.50",
    )


def test_what_the_mixers_do() -> None:
    assert table("Retained tokens").rows[0] == ("8", "128", "64", "60.5", "71.1 %", "46-96 %")
    assert heat("Budget use (%)")["layer 8"] == ["96", "71", "46"]
    assert heat("Where retained tokens lie")["layer 11"] == ["19", "9", "19", "9", *["7"] * 6]
    assert table("Who holds the needle").rows == [("8", "64.6 %", "100.0 %")]
    assert heat("Needle held (%)") == {"layer 8": ["6", "88", "100"]}
    assert heat("Half life (tokens)") == {"layer 0": ["3.5", "700"]}
    assert table("Decay and gates").rows == [("0", "3.5, 352, 700", "0.8123", "0.432", "0.234")]
    alone = table("Selected blocks", make_results_alone())
    assert alone.rows == [("5", "-", "-", "-", "0.111", "0.555", "0.777")]
    assert table("Selected blocks").rows == [("5", "42.0 %", "84.0 %", "50.0 %", "0.111", "0.555", "0.777")]


def test_baselines_stand_beside_the_learned_choice() -> None:
    found = table("Policies at equal budgets")
    assert found.rows[0] == ("full", "-", "20.00 ± 0.50", "100.0 % (72-100 %)")
    assert ("learned", "64", "22.25 ± 0.50", "80.0 % (49-94 %)") in found.rows
    assert "layers 8-9, 11" in found.note
    assert "from position 192 on" in found.note


def test_every_row_has_a_cell_for_every_heading() -> None:
    for results in (make_results(), make_results_alone()):
        tables = [block for section in sections(results) for block in section.blocks if isinstance(block, Table)]
        assert len(tables) > 12
        for found in tables:
            assert found.rows
            assert {len(row) for row in found.rows} == {len(found.header)}


def test_every_probe_has_a_part_of_the_text() -> None:
    whole = document("demo", sections(make_results()))
    for name in PROBES:
        results = make_results()
        del results["probes"][name]
        assert len(document("demo", sections(results))) < len(whole), name


def test_a_table_in_markdown() -> None:
    text = markdown(Table("Title", ("name", "a|b"), [("<b>", "1\n2"), ("x", "100")], "A note."))
    assert text == "## Title\n\n| name | a\\|b |\n| --- | ---: |\n| &lt;b> | 1 2 |\n| x | 100 |\n\nA note.\n"


def test_samples_cannot_leave_their_fence() -> None:
    section = samples(make_results())
    assert section is not None
    text = document("demo", [section])
    assert "````text\nThe old king ```<b>\n````" in text
    assert "```text\nThe old castle\n```" in text
    assert re.fullmatch(r"`{5}text\n````\n`{5}", fenced("````"))


def test_training_is_told_by_stage() -> None:
    rows = [{"step": 50 + 10 * n, "stage_step": 10 * n, "loss": 4.0 - n, "tokens_per_s": 100.0 * n} for n in (1, 2, 3)]
    section = training({"align": rows, "empty": []})
    assert section is not None
    (found,) = [block for block in section.blocks if isinstance(block, Table)]
    assert found.rows == [("align", "30", "█▅▁", "3", "1", "200")]
    assert training({}) is None


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
    assert with_error({"a": None}, "a") == percent(None) == share(None) == ratio(None) == rounded(None) == "-"
    assert ratio({"value": 0.5, "low": 0.25, "high": None}) == "× 0.50 (≥ 0.25)"
    assert [rounded(n) for n in (0.0, 0.01234, 12.34, 99.96, 1234.5, -5.0, 1e-7, 2e9)] == [
        "0", "0.0123", "12.3", "100", "1,234", "-5", "1.0e-07", "2.00e+09",
    ]  # fmt: skip
    assert ranges([5, 0, 1, 2]) == "0-2, 5"
