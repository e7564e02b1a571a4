"""The whole way through the command line, for two families: run, again, changed, killed; what an export is good for.

What one run folder holds, command by command, is tested beside the commands (tests/cli/test_run.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from hybridize.cli.main import run as command_line
from tests.acceptance.project import RECIPE, SHARDS
from tests.cli.conftest import Invoke
from tests.distillation.runs import Server, write_teacher, write_texts

FAMILIES = ("llama", "qwen3")
MIXERS = ["full_attention", "token_eviction", "gated_delta_net", "full_attention"]


class Done(NamedTuple):
    """A project and its finished run."""

    project: Path
    run: Path

    def command(self, run: Path | None = None) -> list[str]:
        """The command that made it, for another folder if there is one."""
        model = str(self.project / "teacher")
        return ["run", str(self.project / "recipe.yaml"), "--model", model, "--out", str(run or self.run)]


@pytest.fixture(scope="module", params=FAMILIES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """From a folder with a model, texts and a recipe to a finished run, in one command."""
    project = tmp_path_factory.mktemp(request.param)
    write_teacher(project, model_type=request.param)
    write_texts(project)
    (project / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    made = Done(project, project / "run")
    assert command_line(["-q", *made.command()]) == 0
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report's, which is made anew each time."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "report" not in path.parts}


def test_everything_is_there(done: Done) -> None:
    assert sorted(path.name for path in done.run.iterdir()) == [
        "converted",
        "distill",
        "export",
        "plan.json",
        "recipe.lock.json",
        "recipe.yaml",
        "report",
        "results.json",
    ]
    results = json.loads((done.run / "results.json").read_text())
    assert results["probes"]["perplexity"]["status"] == "ok"
    assert (done.run / "report" / "report.md").stat().st_size > 0
    steps = (done.run / "distill" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in steps] == ["align", "distill"]


def test_training_changed_what_was_converted(done: Done) -> None:
    """New parameters and adapters both: an export of an untrained run would pass every other test here."""
    from safetensors.torch import load_file

    before = load_file(done.run / "converted" / "model.safetensors")
    after = load_file(done.run / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any("hz_new" in name for name in changed)
    assert any("mlp.up_proj" in name for name in changed)
    assert not any("embed_tokens" in name for name in changed)


def test_the_same_command_again_changes_nothing(done: Done, invoke: Invoke) -> None:
    before = contents(done.run)
    assert invoke(*done.command(), "-q").code == 0
    assert contents(done.run) == before


def test_a_changed_recipe_is_refused(done: Done, invoke: Invoke) -> None:
    before = contents(done.run)
    result = invoke(*done.command(), "--set", "distill.stages.1.learning_rate=2e-2")
    assert result.code == 3
    assert "distill.stages.1.learning_rate: 0.01 → 0.02" in result.err
    assert contents(done.run) == before


def test_the_export_is_a_model_for_every_command(done: Done, invoke: Invoke) -> None:
    export = done.run / "export"
    seen = invoke("inspect", export, "--context", 64, "--json").json
    assert [layer["mixer"] for layer in seen["layers"]] == MIXERS
    assert invoke("verify", export, "--json").json["manifest"] == "export"
    said = invoke("generate", export, "--prompt", "the sea", "--max-new-tokens", 4, "--json", "-q").json
    assert 0 < said["new_tokens"] <= 4


ELSEWHERE = """\
import json, sys
for name in ("hybridize", "hybridize_kernels"):
    sys.modules[name] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
for prompt in prompts:
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    print(json.dumps(tokenizer.decode(found[0, tokens.shape[1]:], skip_special_tokens=True)))
"""
PROMPTS = ("the sea", "This is document 3.", "ink", "Never seen in training. Never seen in training.")


def test_the_export_speaks_the_same_without_hybridize(done: Done, invoke: Invoke, tmp_path: Path) -> None:
    export = done.run / "export"
    options = ("--max-new-tokens", 6, "--dtype", "float32", "--json", "-q")
    here = [invoke("generate", export, "--prompt", prompt, *options).json["text"] for prompt in PROMPTS]
    assert any(text.strip() for text in here)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ELSEWHERE, str(export), *PROMPTS]
    there = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert there.returncode == 0, there.stderr
    assert [json.loads(line) for line in there.stdout.splitlines()] == here


# Where a run is cut off: in converting, before the second step, and when the export is whole but has no name yet (the
# last run checkpoint and the adapter are renamed before it).
CUTS = ("before-manifest:kill", "step-start:kill:2", "before-rename:kill:3")


@pytest.mark.parametrize("done", ["llama"], indirect=True)
def test_killed_again_and_again_it_ends_the_same(
    done: Done, invoke: Invoke, serving: subprocess.Popen[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    server = Server(done.project, serving)
    for fault in CUTS:
        assert server.command(done.command(run), fault) == -signal.SIGKILL, fault
        assert not (run / "export").exists()
    assert (run / "distill" / "adapter" / "manifest.json").is_file()
    assert invoke(*done.command(run), "-q").code == 0
    for name in ("converted", "distill/adapter", "export"):
        assert contents(run / name) == contents(done.run / name), name
    assert not list(run.rglob("*.partial-*")) + list(run.rglob("*.lock"))


def test_a_sharded_teacher_gives_the_same_hybrid(sound: Path, hybrid: Path, invoke: Invoke, tmp_path: Path) -> None:
    assert (sound / "sharded" / SHARDS[1]).is_file()
    command = ("convert", sound / "recipe.yaml", "--model", sound / "sharded", "--out", tmp_path / "out", "-q")
    assert invoke(*command).code == 0
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (hybrid / weights).read_bytes()


def test_a_run_can_be_moved(done: Done, invoke: Invoke, tmp_path: Path) -> None:
    shutil.copytree(done.run, tmp_path / "elsewhere")
    assert invoke(*done.command(tmp_path / "elsewhere"), "-q").code == 0
    assert contents(tmp_path / "elsewhere") == contents(done.run)
