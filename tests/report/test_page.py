from __future__ import annotations

import copy
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from hybridize.report.page.document import document
from hybridize.report.page.tokens import held, token_view
from hybridize.report.render import render
from hybridize.report.sections import all_sections
from tests.report.html import Page
from tests.report.synthetic import PROBES, fail_probe, inside, make_results, make_results_alone


def page_of(results: Any, folder: Path) -> tuple[str, Page]:
    text = render(results, folder)[1].read_text()
    return text, Page(text)


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    text, page = page_of(make_results(), tmp_path)
    assert page.problems == []
    assert text.startswith("<!DOCTYPE html>")
    assert 'name="viewport" content="width=device-width' in text
    assert page.tags.count("h1") == 1
    assert page.tags.count("svg") == 9
    assert {"main", "nav", "section", "caption"} <= set(page.tags)


def test_the_reader_of_pages_sees_faults() -> None:
    assert Page("<p><b>x</p>").problems
    assert Page('<a href="https://x">x</a>').problems
    assert Page('<img src="a.png">').problems
    assert Page("<style>a{background:url(x)}</style>").problems
    assert Page('<p id="a"></p><p id="a"></p>').problems
    assert Page('<a href="#b">x</a>').problems


@pytest.mark.parametrize("left_out", [*([name] for name in PROBES), *map(list, combinations(PROBES, len(PROBES) - 1))])
def test_any_probe_may_be_missing_failed_or_skipped(tmp_path: Path, left_out: list[str]) -> None:
    for end in ("missing", "failed", "skipped"):
        results = make_results()
        for name in left_out:
            fail_probe(results, name)
            results["probes"][name]["status"] = end
            if end == "missing":
                del results["probes"][name]
        _, page = page_of(results, tmp_path)
        assert page.problems == []
        assert ("out of memory" in page.text) == (end != "missing")


def test_nothing_at_all_still_makes_a_page(tmp_path: Path) -> None:
    results = make_results()
    results["probes"] = {}
    assert page_of(results, tmp_path)[1].problems == []


def test_a_student_alone(tmp_path: Path) -> None:
    _, page = page_of(make_results_alone(), tmp_path)
    assert page.problems == []
    assert "No teacher was given" in page.text
    assert "teacher: teacher" not in page.text
    assert "all tasks: student" in page.text


SHARES = re.compile(r"share|value|low|high|use|mass|beta|output_gate|compressed|selected|window")
UNSEEN = re.compile(
    r"seconds"
    r"|tasks\..*depths\..*(low|high|kept\.value)"  # depths have no room for intervals
    r"|tasks\.proverbs\.same\.(low|high)"
    r"|tasks\.riddles\.kept\..*"  # a ratio to a teacher at chance
    r"|layers\.[56]\.(kl|kl_se|perplexity)"  # layers that matter neither most nor least are bars
)


@pytest.mark.parametrize("name", PROBES)
def test_every_number_of_a_probe_is_on_the_page(name: str) -> None:
    """Each is changed alone, and the page must change with it."""
    results = make_results()
    before = document("demo", all_sections(results, None))
    paths = [*number_paths(results["probes"][name], ())]
    unseen = []
    for path in paths:
        changed = copy.deepcopy(results)
        node = changed["probes"][name]
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = 0.4375 if SHARES.fullmatch(str(path[-1])) else node[path[-1]] * 3 + 1
        if document("demo", all_sections(changed, None)) == before:
            unseen.append(".".join(map(str, path)))
    assert [path for path in unseen if not UNSEEN.fullmatch(path)] == []
    assert len(paths) > 1 or name == "samples"


def number_paths(node: Any, path: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    if isinstance(node, dict):
        children: list[tuple[Any, Any]] = list(node.items())
    elif isinstance(node, list):
        children = list(enumerate(node))
    else:
        return [path] if isinstance(node, float) and path else []
    return [found for key, child in children for found in number_paths(child, (*path, key))]


def test_everything_from_results_is_escaped(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>|[a](b)`"
    results = json.loads(json.dumps(make_results()).replace("austen", "EVIL").replace("niah_single_1", "EVIL"))
    results = json.loads(json.dumps(results).replace("EVIL", json.dumps(evil)[1:-1]))
    probes = results["probes"]
    results["model"]["spec"] = results["provenance"]["device"] = evil.replace("/", "")
    probes["samples"]["samples"][0] |= {"prompt": evil, "student": evil}
    probes["reading"]["sources"]["fda"]["examples"][0] |= {"question": evil, "answers": [evil], "student": evil}
    probes["inside"]["shown"]["pieces"][0] = evil
    for row in (probes["state_bytes"]["layers"][0], probes["ablation"]["layers"][0], probes["ablation"]["mixers"][0]):
        row["mixer"] = evil
    probes["baselines"]["rows"][1]["policy"] = evil
    fail_probe(results, "harness")
    probes["harness"]["error"] = evil
    _, page = page_of(results, tmp_path)
    assert page.problems == []
    assert "img" not in page.tags
    assert evil in "".join(page.words)
    for file in tmp_path.glob("*.svg"):
        assert "<img" not in file.read_text()
    for line in re.sub(r"(`{3,})text\n.*?\n\1", "", (tmp_path / "report.md").read_text(), flags=re.DOTALL).splitlines():
        assert "<img" not in line


def test_masks_are_read_from_the_most_significant_bit() -> None:
    assert held("8c", 6) == [True, False, False, False, True, True]
    assert held("01", 8) == [False] * 7 + [True]


def test_tokens_are_shaded_by_the_share_of_heads() -> None:
    shown = inside()["shown"]
    text = token_view(shown)
    page = Page(text)
    assert page.problems == []
    # 8c, cc and 0c: token 0 in two heads of three, token 1 in one, tokens 2 and 3 in none, 4 and 5 in all.
    counts = [re.search(r": (\d) of 3", title)[1] for title in page.titles]  # type: ignore[index]
    assert counts == ["2", "1", "0", "0", "3", "3"]
    assert re.findall(r"--v:([\d.]+)", text) == ["0.667", "0.333", "0.000", "0.000", "1.000", "1.000"]
    assert text.count('class="window"') == 2
    assert text.count('class="break"') == 1
    masks = re.search(r'id="masks">(.*?)</script>', text)
    assert masks is not None
    assert json.loads(masks[1]) == shown["layers"]
    assert text.count("<option") == 1 + 2 + 1 + 2
