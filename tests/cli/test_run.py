"""The commands that write: the whole way on a tiny model, and what happens the second time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridize.checkpoint import FolderLock, replace_in_manifest
from tests.cli.conftest import Invoke


def stamps(folder: Path) -> dict[str, int]:
    """When each file but those of the report was written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files if "report" not in path.parts}


def test_a_run_holds_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"recipe.yaml", "recipe.lock.json", "plan.json", "converted", "distill", "export", "results.json"} <= names
    assert (finished / "report" / "report.md").is_file()
    lock = json.loads((finished / "recipe.lock.json").read_text())
    assert lock["versions"]["torch"]
    assert lock["recipe"]["distill"]["stages"][0]["weight_decay"] == 0.0
    results = json.loads((finished / "results.json").read_text())
    assert results["probes"]["perplexity"]["status"] == "ok"
    assert results["provenance"]["recipe_sha256"] == lock["recipe_sha256"]


def test_the_same_command_again_writes_nothing(invoke: Invoke, finished: Path, recipe: Path) -> None:
    before = stamps(finished)
    result = invoke("run", recipe, "--out", finished, "--json")
    assert result.code == 0
    assert stamps(finished) == before
    assert result.json["results"]["probes"]["perplexity"]["status"] == "ok"
    assert "converted already" in result.err
    assert "exported already" in result.err
    assert "evaluated already" in result.err  # the card that the first run wrote last changes no record that counts


def test_what_is_missing_is_made_again(invoke: Invoke, finished: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "results.json").unlink()
    before = stamps(run)
    assert invoke("-q", "run", recipe, "--out", run).code == 0
    assert (run / "results.json").is_file()
    assert {name: stamp for name, stamp in stamps(run).items() if name in before} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda results: "{torn",
        lambda results: json.dumps(results | {"schema": "hybridize/results/0"}),
        lambda results: json.dumps(
            results | {"probes": results["probes"] | {"samples": {"status": "failed", "reason": "out of memory"}}}
        ),
        lambda results: json.dumps(results | {"model": results["model"] | {"contents_sha256": "0" * 64}}),
    ],
    ids=["torn", "another form", "failed probe", "another model"],
)
def test_results_that_are_not_whole_or_of_another_model_are_measured_again(
    invoke: Invoke, finished: Path, recipe: Path, tmp_path: Path, change: Callable[[dict[str, Any]], str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(change(before))
    result = invoke("run", recipe, "--out", run)
    assert result.code == 0, result
    assert "evaluated already" not in result.err
    after = json.loads((run / "results.json").read_text())
    assert after["model"]["contents_sha256"] == before["model"]["contents_sha256"]
    assert all(probe["status"] == "ok" for probe in after["probes"].values())


def test_eval_takes_the_recipes_seed(invoke: Invoke, finished: Path, recipe: Path, project: Path) -> None:
    arguments = ("eval", finished / "converted", "--recipe", recipe, "--probe", "perplexity", "--alone", "--json", "-q")
    seeds = [
        invoke(*arguments, *more).json["results"]["provenance"]["seed"]
        for more in ((), ("--set", "seed=5"), ("--set", "seed=5", "--seed", "0"))
    ]
    assert seeds == [0, 5, 0]


def test_generate_continues_after_the_prompt_and_not_after_an_end(finished: Path, tmp_path: Path) -> None:
    """Some tokenizers end every text; and 0 is a token like others."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    from hybridize.cli.output import Output
    from hybridize.cli.talk import Talker, Talking

    folder = tmp_path / "model"
    shutil.copytree(finished / "converted", folder)
    talker = Talker(str(folder), Talking(4), output=Output(verbosity=-1, as_json=True), offline=True)
    expected = talker.complete("the sea")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token
    inner = tokenizer.backend_tokenizer
    inner.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    inner.save(str(folder / "tokenizer.json"))
    replace_in_manifest(folder, ["tokenizer.json"])
    ending = Talker(str(folder), Talking(4), output=Output(verbosity=-1, as_json=True), offline=True)
    assert ending.tokenizer("the sea")["input_ids"][-1] == tokenizer.eos_token_id
    said = ending.complete("the sea")
    assert (said["text"], said["prompt_tokens"]) == (expected["text"], expected["prompt_tokens"])


def test_verify_of_a_teacher_with_a_manifest_of_its_own(invoke: Invoke, project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(project / "teacher", folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "another", "files": []}))
    result = invoke("verify", folder, "--json")
    assert result.code == 0, result.err
    assert result.json["manifest"] is None
    assert result.json["tensors"] > 0


def test_a_changed_recipe_is_refused(invoke: Invoke, finished: Path, recipe: Path) -> None:
    before = stamps(finished)
    result = invoke("run", recipe, "--out", finished, "--set", "distill.stages.1.steps=9", "--json")
    assert result.code == 3
    assert result.json["error"]["problems"] == ["distill.stages.1.steps: 1 → 9"]
    assert stamps(finished) == before


def test_overwrite_starts_anew_and_leaves_foreign_files(
    invoke: Invoke, finished: Path, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "notes.txt").write_text("mine")
    changes = ("--set", "distill=null", "--set", "evaluate.samples=null")
    result = invoke("-q", "run", recipe, "--out", run, "--overwrite", *changes, "--json")
    assert result.code == 0, result
    assert result.json["model"] == str(run / "export")  # nothing was trained, and it is exported all the same
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "distill").exists()


def test_overwrite_is_refused_while_a_process_writes(invoke: Invoke, finished: Path, recipe: Path) -> None:
    before = stamps(finished)
    with FolderLock(finished / "distill"):
        result = invoke("run", recipe, "--out", finished, "--overwrite")
    assert result.code == 2
    assert "is being written by" in result.err
    assert stamps(finished) == before


def test_foreign_folder_is_refused(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        result = invoke("run", recipe, "--out", tmp_path, *extra)
        assert result.code == 2
        assert "holds no run" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_convert_refuses_to_overwrite(invoke: Invoke, finished: Path, recipe: Path) -> None:
    result = invoke("convert", recipe, "--out", finished / "converted")
    assert result.code == 2
    assert "--overwrite" in result.err


def test_dry_run_writes_nothing(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    for command in ("run", "convert", "distill"):
        assert invoke(command, recipe, "--out", tmp_path / "out", "--dry-run").code == 0
    assert not any(tmp_path.iterdir())


def test_resume_needs_a_run(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    assert invoke("distill", recipe, "--out", tmp_path / "none", "--resume").code == 2
    assert invoke("distill", recipe, "--out", tmp_path / "none", "--resume", "--overwrite").code == 2
    assert not any(tmp_path.iterdir())


def test_distill_needs_stages(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    result = invoke("distill", recipe, "--out", tmp_path / "none", "--set", "distill=null")
    assert result.code == 3
    assert "'distill'" in result.err


def test_distill_of_a_finished_run_is_a_no_op(invoke: Invoke, finished: Path, recipe: Path) -> None:
    before = stamps(finished)
    assert invoke("distill", recipe, "--out", finished, "--resume", "--json").code == 0
    assert stamps(finished) == before


def test_inspect_and_verify_a_hybrid(invoke: Invoke, finished: Path) -> None:
    for name in ("converted", "export"):
        values = invoke("inspect", finished / name, "--context", 64, "--json").json
        assert values["is_hybrid"]
        mixers = [layer["mixer"] for layer in values["layers"]]
        assert mixers == ["full_attention", "token_eviction", "gated_delta_net", "full_attention"]
        assert values["layers"][1]["window_tokens"] == 14
        assert values["state_bytes"]["64"]["student"] > 0
        verified = invoke("verify", finished / name, "--json").json
        assert verified["manifest"] == {"converted": "converted", "export": "export"}[name]
        assert verified["tensors"] == values["tensors"]


def test_generate_streams_and_speaks_json(invoke: Invoke, finished: Path) -> None:
    arguments = ("generate", finished / "export", "--prompt", "the sea", "--max-new-tokens", 5, "-q")
    plain = invoke(*arguments)
    assert plain.code == 0, plain.err
    assert plain.out.startswith("the sea")
    values = invoke(*arguments, "--json").json
    assert values["new_tokens"] <= 5
    assert values["text"].split() == plain.out.removeprefix("the sea").split()
    sampled = (*arguments, "--temperature", 1.5, "--seed", 3, "--json")
    assert invoke(*sampled).json["text"] == invoke(*sampled).json["text"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to continue"),
        (("--prompt", ""), "the prompt is empty"),
        (("--chat", "--json"), "no JSON form"),
        (("--prompt", "a", "--chat"), "no chat template"),
    ],
)
def test_generate_refuses(invoke: Invoke, finished: Path, arguments: tuple[str, ...], says: str) -> None:
    result = invoke("generate", finished / "export", *arguments)
    assert result.code == 2
    assert says in result.out + result.err


def test_chat_keeps_the_conversation(
    invoke: Invoke, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    folder = tmp_path / "chatty"
    shutil.copytree(finished / "converted", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    replace_in_manifest(folder, ["tokenizer_config.json"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nnever\n"))
    result = invoke("generate", folder, "--chat", "--max-new-tokens", 3, "-q")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 2


def test_eval_with_texts_probes_and_gates(invoke: Invoke, finished: Path, project: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = (
        *("eval", finished / "converted", "--text", project / "held" / "*.txt", "--probe", "perplexity", "-q"),
        *("--recipe", project / "recipe.yaml", "--out", out, "--gate", "perplexity.ratio<=1e9", "--json"),
    )
    result = invoke(*arguments)
    assert result.code == 0, result
    probes = result.json["results"]["probes"]
    assert probes["perplexity"]["ratio"] > 0
    assert "samples" not in probes
    assert json.loads(out.read_text()) == result.json["results"]
    assert invoke(*arguments).code == 2  # the file is there
    failed = invoke(*arguments, "--overwrite", "--gate", "perplexity.ratio<=0")
    assert failed.code == 7


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--set", "seed=1", "--text", "x"), 3, "others need --recipe"),
        (("--suite", "none"), 2, "'none' is not one of"),
        (("--text", "x", "--gate", "nonsense"), 2, "is not a condition"),
        (("--gate", "ppl_ratio<=1.05,recall@"), 2, "'recall@' is not a condition"),
    ],
)
def test_eval_refuses(invoke: Invoke, finished: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    result = invoke("eval", finished / "converted", *arguments)
    assert result.code == code
    assert says in result.err


def test_eval_without_texts_measures_on_those_that_come_with_it(invoke: Invoke, finished: Path) -> None:
    options = ("--probe", "perplexity", "--set", "evaluate.perplexity={context_tokens: 32, max_windows: 1}")
    result = invoke("eval", finished / "converted", *options, "--alone", "--json")
    assert result.code == 0, result.err
    assert "come with hybridize" in result.err
    assert set(result.json["results"]["probes"]["perplexity"]["by_source"]) == {
        "apache",
        "austen",
        "postgresql",
        "python",
    }


def test_several_conditions_of_a_gate(invoke: Invoke, finished: Path, project: Path) -> None:
    arguments = ("eval", finished / "converted", "--recipe", project / "recipe.yaml", "--probe", "perplexity", "-q")
    assert invoke(*arguments, "--gate", "ppl>1,ppl_ratio<=1e9").code == 0
    failed = invoke(*arguments, "--gate", "ppl>1,ppl_ratio<=0,ppl<0")
    assert failed.code == 7
    assert "2 of 3 gates do not hold" in failed.err


def test_export_of_a_run_with_other_settings(invoke: Invoke, finished: Path, tmp_path: Path) -> None:
    assert invoke("export", finished, "--out", tmp_path / "out", "--max-shard", "huge").code == 2
    assert invoke("export", tmp_path, "--out", tmp_path / "out").code == 4


def test_report_needs_no_torch(finished: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys; from hybridize.cli.main import run\n"
        f"assert run(['report', {str(finished)!r}, '--out', {str(tmp_path / 'report')!r}]) == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "report.md").is_file()
    assert "perplexity" in done.stdout.lower()


def test_report_without_results(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("report", tmp_path).code == 2
