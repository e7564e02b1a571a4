"""What holds for every command: where output goes, JSON, colours, exit codes, messages."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hybridize import plan as plan_package
from hybridize.cli.main import SECTIONS, main, run
from hybridize.errors import NumbersError, StoppedError
from tests.cli.conftest import Invoke

COMMANDS = [name for names in SECTIONS.values() for name in names]


@pytest.mark.parametrize("arguments", [("--json", "plan"), ("plan", "--json"), ("plan",)], ids=str)
def test_global_options_stand_anywhere(invoke: Invoke, recipe: Path, arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments, recipe)
    assert result.code == 0
    assert result.out.startswith("{") == ("--json" in arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "RECIPE"),
        ("run", "RECIPE", "--out", "OUT", "--dry-run"),
        ("convert", "RECIPE", "--out", "OUT", "--dry-run"),
        ("distill", "RECIPE", "--out", "OUT", "--dry-run"),
        ("inspect", "TEACHER"),
        ("inspect", "TEACHER", "--tensors"),
        ("verify", "TEACHER"),
        ("recipes", "ls"),
        ("recipes", "show", "smollm2-135m--demo"),
        ("completion", "bash"),
        ("env",),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_json_and_plain_output(invoke: Invoke, project: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    places = {"RECIPE": project / "recipe.yaml", "OUT": tmp_path / "out", "TEACHER": project / "teacher"}
    filled = [str(places.get(argument, argument)) for argument in arguments]
    result = invoke(*filled, "--json")
    assert result.code == 0
    values = result.json
    assert values["schema"].startswith(f"hybridize/{arguments[0]}")
    assert values["schema"].endswith("/1")
    plain = invoke(*filled)
    assert plain.code == 0
    assert plain.out.strip()
    assert "\x1b" not in plain.out + plain.err
    assert not any((tmp_path).iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_errors_are_json_too(invoke: Invoke, name: str) -> None:
    result = invoke(name, "--no-such-option", "--json")
    assert result.code == 2
    assert result.json["schema"] == "hybridize/error/1"
    assert result.json["error"]["exit_code"] == 2
    assert result.err == ""


def test_unknown_command_suggests(invoke: Invoke) -> None:
    result = invoke("distil")
    assert result.code == 2
    assert "Did you mean 'distill'?" in result.err
    assert result.out == ""


def test_unknown_option_suggests(invoke: Invoke, recipe: Path) -> None:
    result = invoke("plan", recipe, "--sett", "seed=1")
    assert result.code == 2
    assert "--set" in result.err


def test_errors_have_three_parts_and_all_problems(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: a/b\nlayers: G F\nsed: 1\nseed: x\n")
    result = invoke("plan", path)
    assert result.code == 3
    assert "bad.yaml:3: sed: unknown key; did you mean 'seed'?" in result.err
    assert "bad.yaml:4: seed: expected a whole number" in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    error = invoke("plan", path, "--json").json["error"]
    assert len(error["problems"]) == 2
    assert error["type"] == "RecipeError"


def test_unknown_recipe_suggests(invoke: Invoke) -> None:
    result = invoke("plan", "smollm2-135m--dem")
    assert result.code == 3
    assert "smollm2-135m--demo" in result.err


def raising(error: BaseException) -> Any:
    def plan(*arguments: Any, **options: Any) -> None:
        raise error

    return plan


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ZeroDivisionError("x"), 1, "This is a bug in hybridize"),
        (MemoryError(), 5, "batch_sequences"),
        (OutOfMemoryError("CUDA out of memory. Tried"), 5, "batch_sequences"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "there"), 5, "there: No space left"),
        (OSError(errno.EMFILE, "Too many open files"), 5, "Too many open files"),
        (NumbersError("the loss is NaN.", where="stage align, step 3"), 6, "stage align, step 3"),
        (StoppedError("stopped by SIGTERM; the state is saved."), 75, "Run the same command again"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value)[:12],
)
def test_exit_codes(
    invoke: Invoke, recipe: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    monkeypatch.setattr(plan_package, "plan", raising(error))
    result = invoke("plan", recipe)
    assert result.code == code
    assert says in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert invoke("plan", recipe, "--json").json["error"]["exit_code"] == code
    assert "Traceback" in invoke("plan", recipe, "--debug").err


def test_a_bug_shows_the_environment(invoke: Invoke, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_package, "plan", raising(ZeroDivisionError("x")))
    result = invoke("plan", recipe)
    assert "torch" in result.err
    assert "python" in result.err
    assert str(Path.home()) not in result.err.replace(str(recipe), "")


def test_interrupt_signal_during_plan(invoke: Invoke, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # os.kill may reach another thread first, and this one return before it

    monkeypatch.setattr(plan_package, "plan", plan)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore it
    try:
        assert invoke("plan", recipe).code == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_ends_like_ctrl_c(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(plan_package, "plan", plan)
    monkeypatch.setattr("sys.argv", ["hybridize", "plan", str(recipe)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 130


def test_checkpoint_errors_are_4(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    missing = invoke("plan", recipe, "--model", tmp_path / "none", "--offline")
    assert missing.code == 4
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    unknown = invoke("plan", recipe, "--model", tmp_path)
    assert unknown.code == 4
    assert "llama, qwen2, qwen3, mistral" in unknown.err


def test_verify_of_a_changed_folder_is_7(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "hybrid"
    assert invoke("-q", "convert", recipe, "--out", out).code == 0
    assert invoke("verify", out).code == 0
    config = out / "config.json"
    config.write_text(config.read_text().replace("{", "{ ", 1))
    result = invoke("verify", out)
    assert result.code == 7
    assert "config.json" in result.err


@pytest.mark.parametrize("reason", ["EROFS", "ENOSPC"])
def test_unwritable_output_is_5_and_leaves_nothing(
    invoke: Invoke, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setenv("HYBRIDIZE_FAULT", f"before-manifest:{reason}")
    monkeypatch.setattr("hybridize.checkpoint.faults._passes", {})
    assert invoke("-q", "convert", recipe, "--out", tmp_path / "out").code == 5
    assert not any(tmp_path.iterdir())


def test_quiet_and_json_keep_stderr_silent(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    result = invoke("-q", "convert", recipe, "--out", tmp_path / "one", "--json")
    assert result.err == ""
    assert result.json["converted_layers"] == [1, 2]


def test_warnings_go_to_stderr(invoke: Invoke, recipe: Path) -> None:
    result = invoke("plan", recipe, "--set", "mixers.T.window_tokens=600")
    assert "warning:" in result.err
    assert "warning:" not in result.out
    assert invoke("plan", recipe, "--set", "mixers.T.window_tokens=600", "-q").err == ""
    plan = invoke("plan", recipe, "--set", "mixers.T.window_tokens=600", "--json")
    assert plan.err == ""
    assert plan.json["plan"]["warnings"]


def test_closed_pipe_is_no_error(recipe: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[2]
    command = f"{sys.executable} -m hybridize recipes show smollm2-135m--demo | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_plan_out_is_the_plan(invoke: Invoke, recipe: Path, tmp_path: Path) -> None:
    result = invoke("plan", recipe, "--out", tmp_path / "plan.json", "--json", "--context", 128)
    assert json.loads((tmp_path / "plan.json").read_text()) == result.json["plan"]
    assert list(result.json["plan"]["bill"]["state_bytes"]) == ["128"]


def test_model_and_seed_replace_the_recipes(invoke: Invoke, project: Path, recipe: Path) -> None:
    values = invoke("plan", recipe, "--model", project / "teacher", "--seed", 9, "--set", "layers=G F", "--json").json
    assert values["plan"]["seed"] == 9
    assert [layer["mixer"] for layer in values["plan"]["layers"]] == ["gated_delta_net", "full_attention"] * 2


def test_run_returns_a_code_for_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert run(["plan", "--help"]) == 0
