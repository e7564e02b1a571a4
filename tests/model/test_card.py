"""The model card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from hybridize.model.card import card
from hybridize.plan import plan
from tests.distillation.runs import tiny_recipe, write_teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private-home")
    write_teacher(folder)
    return plan(tiny_recipe(folder))


def test_the_front_matter_parses_as_hub_metadata(made):
    front = yaml.safe_load(card(made).split("---")[1])
    assert front["library_name"] == "transformers"
    assert {"hybridize", "token-eviction", "gated-delta-net"} <= set(front["tags"])
    assert "base_model" not in front


def test_a_hub_teacher_is_the_base_model(made):
    front = yaml.safe_load(card(replace(made, model="org/name@abc", revision="abc")).split("---")[1])
    assert front["base_model"] == "org/name"


def test_a_local_path_is_not_told(made):
    text = card(made)
    assert "private-home" not in text
    assert "# Hybrid of teacher" in text


def test_contexts_rise_and_hold_the_bill(made):
    rows = [line.split("|")[1:3] for line in card(made).splitlines() if line.startswith("| ") and "," in line]
    contexts = [int(context) for context, _ in rows if context.strip().isdigit()]
    assert contexts == sorted(made.bill.state_bytes)
    assert f"{made.bill.state_bytes[8192]['student']:,}" in card(made)


def test_settings_are_told_where_they_are_not_the_default(made):
    row = next(line for line in card(made).splitlines() if "`token_eviction`" in line)
    assert "window_tokens 14" in row
    assert "l1_every_steps 2" in row
    assert "scorer_kernel" not in row


def test_results_training_and_recipe_appear(made):
    text = card(made, recipe_text="model: x", tokens=12345, metrics={"kl": 0.5}, metrics_table="## Table\n| a |")
    assert "12,345 tokens" in text
    assert "kl 0.5" in text
    assert "## Table" in text
    assert "```yaml\nmodel: x\n```" in text


def test_results_in_the_card_change_no_other_record(tmp_path):
    from hybridize.checkpoint import read_manifest, verify_folder
    from hybridize.errors import VerificationError
    from hybridize.model.card import update_card
    from hybridize.model.convert import convert
    from hybridize.model.export import export

    write_teacher(tmp_path)
    convert(plan(tiny_recipe(tmp_path)), tmp_path / "converted")
    folder = export(tmp_path / "converted", tmp_path / "export")
    before = read_manifest(folder).files
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    update_card(folder, "## Table")
    assert "## Table" in (folder / "README.md").read_text()
    after = read_manifest(folder).files
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
    with pytest.raises(VerificationError, match=r"model\.safetensors"):
        verify_folder(folder)
