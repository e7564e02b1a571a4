"""The scripts that make recipes/results: variants of a recipe side by side, and the rows of finished runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import conversion_charts, conversions, row_wise_keys, variants


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def spec(project: Path, tmp_path: Path) -> Path:
    """One variant as the recipe is, one that trains longer, one that cannot be."""
    path = tmp_path / "variants.yaml"
    path.write_text(
        f"""\
recipe: {project}/recipe.yaml
set: [distill.stages.0.steps=2]
measure: {{haystack: ["{project}/held/*.txt"], lengths: [1500], depths: [0.5], samples: 2, windows: 2}}
variants:
  plain: []
  longer: [distill.stages.1.steps=3]
  impossible: ["data.train=[none/*.txt]"]
""",
        encoding="utf-8",
    )
    return path


def test_every_variant_has_a_row_and_none_is_made_twice(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "rows.jsonl"
    arguments = [str(spec), "--out", str(out), "--keep", str(tmp_path / "kept")]
    variants.main(arguments)
    head, teacher, *rows = rows_of(out)
    assert "device" in head
    assert teacher["variant"] == "teacher"
    assert teacher["ratio"] == pytest.approx(1.0)
    assert [row["variant"] for row in rows] == ["plain", "longer", "impossible"]
    plain, longer, impossible = rows
    # Two aligned steps of 32 tokens, and one or three of the whole model.
    assert (plain["tokens"], longer["tokens"]) == (3 * 32, 5 * 32)
    assert plain["ratio"] != longer["ratio"] != 1.0
    for row in (plain, longer):
        assert row["ratio"] == pytest.approx(row["student"] / row["teacher"], rel=1e-6)
        assert row["needles"].keys() == {"niah_single_1@1500", "niah_single_2@1500"}
        assert row["needles"]["niah_single_1@1500"]["samples"] == 2
        assert (tmp_path / "kept" / row["variant"] / "adapter_model.safetensors").is_file()
    assert "none/*.txt" in impossible["error"]

    variants.main(arguments)
    assert [row.get("variant") for row in rows_of(out)[2:]] == ["plain", "longer", "impossible", "impossible"]


def a_run(folder: Path, name: str, *, seed: int) -> Path:
    """The files of a run folder that a row is made of."""
    run = folder / name
    (run / "distill").mkdir(parents=True)
    cell = {"student": {"share": 0.75, "low": 0.6, "high": 0.9, "samples": 48}, "teacher": {"share": 1.0}}
    places = [
        {"from": 0, "to": 2048, "ratio": 9.0, "ratio_se": 1.0, "teacher": 1.0},
        {"from": 2048, "to": 4096, "ratio": 1.5, "ratio_se": 0.1, "teacher": 22.0},
    ]
    results = {
        "probes": {
            "perplexity": {"by_position": places},
            "recall": {"tasks": {task: {"1024": {}, "4096": cell} for task in ("niah_single_1", "niah_single_2")}},
            "state_bytes": {"student": 10, "teacher": 40},
            "agreement": {"kl": 0.1, "top1": 0.9},
        },
        "provenance": {"device": "a GPU", "versions": {"torch": "2"}},
    }
    (run / "results.json").write_text(json.dumps(results))
    (run / "plan.json").write_text("{}")
    (run / "recipe.lock.json").write_text(json.dumps({"recipe": {"seed": seed}}))
    (run / "distill" / "metrics.jsonl").write_text('{"tokens": 5, "seconds": 1}\n{"tokens": 9, "seconds": 2}\n')
    return run


def test_a_run_has_one_row_and_its_files_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "results"
    out.mkdir()
    run, again = a_run(tmp_path, "lte", seed=3), a_run(tmp_path, "lte.again", seed=4)
    conversions.main([str(run), "--out", str(out)])
    conversions.main([str(run), str(again), "--out", str(out)])
    first, second = rows_of(out / "conversions.jsonl")
    assert (first["recipe"], first["run"], first["seed"]) == ("lte", "lte", 3)
    assert (second["recipe"], second["run"], second["seed"]) == ("lte", "lte.again", 4)
    assert (first["tokens"], first["train_seconds"]) == (9, 2)
    assert (first["ppl_ratio"], first["niah1_4k"], first["niah2_4k"], first["state_bytes_8k"]) == (1.5, 0.75, 0.75, 10)
    assert first["intervals"]["ppl_ratio"] == pytest.approx([1.304, 1.696])
    assert first["intervals"]["niah2_4k"] == [0.6, 0.9]
    assert first["teacher"] == {"ppl": 22.0, "niah1_4k": 1.0, "niah2_4k": 1.0, "state_bytes_8k": 40}
    assert sorted(path.name for path in (out / "conversions").iterdir()) == ["lte", "lte.again"]
    assert {path.name for path in (out / "conversions" / "lte").iterdir()} == {
        "metrics.jsonl",
        "plan.json",
        "recipe.lock.json",
        "results.json",
    }


def test_rows_are_drawn(tmp_path: Path) -> None:
    out = tmp_path / "results"
    out.mkdir()
    for number, name in enumerate(("lte.5M", "lte", "gdn", "lte.again")):
        run = a_run(tmp_path, name, seed=number)
        (run / "distill" / "metrics.jsonl").write_text(json.dumps({"tokens": 5_000_000 << number, "seconds": 1}))
        conversions.main([str(run), "--out", str(out)])
    rows = rows_of(out / "conversions.jsonl")
    drawn = [row for row in rows if conversion_charts.of_the_recipe(row)]
    assert [row["run"] for row in drawn] == ["lte.5M", "lte", "gdn"]
    assert [row["run"] for row in conversion_charts.most_trained(drawn)] == ["gdn", "lte"]
    by_tokens = (out / "conversions-recall-tokens.svg").read_text()
    assert by_tokens.count("<polyline") == 1
    assert by_tokens.count('class="mark"') == 2, "another seed is not another length"
    assert "gdn" not in by_tokens, "one run is no line"
    by_state = (out / "conversions-recall-state-bytes.svg").read_text()
    assert all(f">{name}<" in by_state for name in ("gdn", "lte", "teacher"))


def test_the_error_of_a_peer_is_made_on_purpose() -> None:
    from hybridize.families import family_of_config
    from hybridize.mixers.parts.own_keys import with_own_keys
    from tests.tiny import tiny_teacher

    model = tiny_teacher()
    adapter, geometry = family_of_config(model.config.to_dict())
    attention = adapter.attention(adapter.layers(model.model)[1])
    view = adapter.view(attention, 1, geometry)
    right, wrong = with_own_keys(view).k_proj.weight, row_wise_keys.scrambled(view).k_proj.weight
    group, rows = geometry.num_query_heads // geometry.num_key_heads, geometry.head_size
    assert right[:rows].equal(view.k_proj.weight[:rows])
    assert right[rows : 2 * rows].equal(view.k_proj.weight[:rows])
    assert wrong[:rows].equal(view.k_proj.weight[: rows // group].repeat_interleave(group, dim=0))
