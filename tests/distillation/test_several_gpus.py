"""One run on two GPUs, as a user starts it: what it learns, how it stops, goes on, is exported, and loses a process.

    make gpu-test                                                                        two of the GPUs that are here
    HYBRIDIZE_TEST_DEVICE=cpu pytest -n 0 tests/distillation/test_several_gpus.py        the same on the CPU, by hand

All launches are begun when the first test is, and run side by side; a test waits for those that it is about.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distillation import runs
from tests.distillation.launched import NUM_DEVICES, ON_CPU, Ended, Form, Runs, last_step

pytestmark = [
    *([] if ON_CPU else [pytest.mark.gpu]),
    pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA GPUs"),
    pytest.mark.timeout(600),
]

RECIPE = """\
model: {folder}/teacher
layers: T G N T F
mixers:
  T:
    {{mixer: token_eviction, window_tokens: 14, sink_tokens: 2, budget_tokens: {budget_tokens}, l1_every_steps: 2,
      scorer_sharing: model, scorer_dropout: 0}}
  N:
    {{mixer: native_sparse_attention, block_tokens: 16, selected_blocks: {selected_blocks}, window_tokens: 24,
      compression: learned}}
data:
  train: [{train}]
  held_out: [held/*.txt]
  sequence_tokens: 128
  shuffle_documents: 4
  document_boundaries: {document_boundaries}
distill:
  lora: {{rank: 4}}
  precision: {precision}
  gradient_checkpointing: {gradient_checkpointing}
  save_every_steps: 1
  stages:
    - {{name: align, kind: align, steps: 2, accumulate: 2, learning_rate: 3e-3, passes: 2}}
    - name: distill
      kind: distill
      steps: 14
      accumulate: 2
      learning_rate: 3e-3
      projection_learning_rate: 1e-3
      budget_ramp: {{start: 0, end: 0.5}}
      loss: {{hidden: {hidden}, cross_entropy: 0.1}}
export: {{dtype: float32}}
"""
"""Every mixer, heads and blocks that the kernels take, and a scorer that two layers share: it is in no single part."""
TEACHER = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
RECIPES: dict[str, dict[str, Any]] = {
    "exact": {
        "train": "text/*.txt",
        "document_boundaries": "false",
        "precision": "float32",
        "gradient_checkpointing": "auto",
        "budget_tokens": 128,  # nothing is chosen among what scores alike: one bit could turn a choice
        "selected_blocks": 8,
        "hidden": 0.1,
    },
    "packed": {
        "train": "short/*.jsonl",
        "document_boundaries": "true",
        "precision": "bfloat16",
        "gradient_checkpointing": "true",
        "budget_tokens": 8,
        "selected_blocks": 4,
        "hidden": 0.1,
    },
}
RECIPES["cached"] = RECIPES["packed"] | {"hidden": 0}
"""Of one GPU; on two, `SHARED_OUT` gives a step the same micro-batches."""
SHARED_OUT = ("--set", "distill.stages.0.accumulate=1", "--set", "distill.stages.1.accumulate=1")
NUDGED = {
    name: ("--set", f"distill.stages.0.learning_rate={rate}", "--set", f"distill.stages.1.learning_rate={rate}")
    for name, rate in (("up", "3.00001e-3"), ("down", "2.99999e-3"))
}
STEPS = 16
STOP_STEP = 5
"""In the second stage; a launch that is stopped after it has ten more to hear of the signal."""
MOST_NOISE = 0.05
"""Nats: more would hide what the test is for."""
LOST_WITHIN_S = 60.0
LOSSES = ("loss", "error", "kl", "hidden", "cross_entropy")


def straight(made: Runs, name: str, form: Form, *changes: str) -> Ended:
    return made.distil(form, name, *changes, recipe="exact")


def packed(made: Runs, name: str, form: Form, *changes: str) -> Ended:
    return made.distil(form, name, *changes, recipe="packed", gpu=1)


def stopped(made: Runs, name: str, form: Form, *changes: str, everyone: bool = False) -> Ended:
    return made.stop(form, name, *changes, recipe="exact", from_step=STOP_STEP, everyone=everyone)


def sharded_replicated_sharded(made: Runs, name: str) -> Ended:
    """The second stop by SIGTERM to everything, as a batch system sends it; torchrun passes its own on."""
    made["begun sharded"]
    made.copy("begun sharded", name)
    ended = stopped(made, name, "replicated", *SHARED_OUT, everyone=True)
    straight(made, name, "sharded", *SHARED_OUT)
    return ended


def sharded_alone(made: Runs, name: str) -> Ended:
    made["begun sharded"]
    made.copy("begun sharded", name)
    return straight(made, name, "alone", *SHARED_OUT)


def alone_sharded(made: Runs, name: str) -> Ended:
    ended = stopped(made, name, "alone").expect(75)
    straight(made, name, "sharded")
    return ended


def sharded_written_again(made: Runs, name: str) -> Ended:
    """A finished sharded run whose adapter is lost: two GPUs with whole models write it from the last checkpoint."""
    made["sharded"]
    shutil.rmtree(made.folder / made.copy("sharded", name) / "distill" / "adapter")
    return straight(made, name, "replicated", *SHARED_OUT)


def exported(made: Runs, name: str, run: str) -> Path:
    made[run]
    with made.begin("alone", "export", made.folder / run, "--out", made.folder / name) as launched:
        launched.wait().expect(0)
    return made.folder / name


def kill_one(made: Runs, name: str) -> Ended:
    """How the launcher ends after `kill -9` of a worker in the middle. Then the same command again."""
    with made.begin("sharded", *made.arguments(name, "exact", *SHARED_OUT)) as launched:
        pid = launched.worker(1)
        launched.wait_for_step(made.metrics(name), STOP_STEP)
        launched.send(signal.SIGKILL, pid)
        ended = launched.wait(LOST_WITHIN_S)
        assert launched.left() == [], f"processes are left\n{ended}"
    assert ended.code != 0, f"it ended well without one of its processes\n{ended}"
    assert not (made.folder / name / "distill" / "adapter").exists()
    straight(made, name, "sharded", *SHARED_OUT)
    return ended


def refused(made: Runs, name: str, form: Form) -> Ended:
    """However accelerate is asked to shard; and so it is known that it was asked."""
    arguments = made.arguments(name, "cached", "--set", "distill.teacher_cache.top_k=4")
    with made.begin(form, *arguments) as launched:
        return launched.wait()


MADE: dict[str, Any] = {
    "sharded": (straight, "sharded", *SHARED_OUT),
    "begun sharded": (stopped, "sharded", *SHARED_OUT),
    "killed": (kill_one,),
    "alone, sharded": (alone_sharded,),
    "alone": (straight, "alone"),
    "replicated": (straight, "replicated", *SHARED_OUT),
    "packed alone": (packed, "alone"),
    "packed nudged up": (packed, "alone", *NUDGED["up"]),
    "packed nudged down": (packed, "alone", *NUDGED["down"]),
    "packed replicated": (packed, "replicated", *SHARED_OUT),
    "packed sharded": (packed, "sharded", *SHARED_OUT),
    "packed accelerate": (packed, "accelerate", *SHARED_OUT, "--set", "distill.gradient_checkpointing=false"),
    "refused sharded": (refused, "sharded"),
    "refused accelerate": (refused, "accelerate"),
    "sharded, replicated, sharded": (sharded_replicated_sharded,),
    "sharded, alone": (sharded_alone,),
    "sharded, replicated": (sharded_written_again,),
    "exported sharded": (exported, "sharded"),
    "exported replicated": (exported, "sharded, replicated"),
}
"""How each is made, and from what; those that others wait for come first."""


COMPILED_BY = ("alone", "packed alone")
"""Launches that meet every kernel; the others find them in Triton's cache."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The launches; on GPUs all of them begin now."""
    folder = tmp_path_factory.mktemp("several")
    runs.write_teacher(folder, **TEACHER)
    runs.write_texts(folder)
    for name, values in RECIPES.items():
        (folder / f"{name}.yaml").write_text(RECIPE.format(folder=folder, **values), encoding="utf-8")
    made = Runs(folder, MADE)
    try:
        if not ON_CPU:
            wait([made.start(name) for name in COMPILED_BY])
            for name in MADE:
                made.start(name)
        yield made
    finally:
        made.close()


def rows(folder: Path, run: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: each step once."""
    found = [json.loads(line) for line in (folder / run / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    return found


def losses(folder: Path, run: str) -> list[float]:
    return [row["loss"] for row in rows(folder, run)]


def adapter(folder: Path, run: str) -> Path:
    return folder / run / "distill" / "adapter" / "adapter_model.safetensors"


def assert_same_run(folder: Path, run: str) -> None:
    """Losses of every step and trained weights are those of one GPU, up to the order of fp32 sums.

    That order changes a loss by a few units in its last place (6e-8). Adam turns noise in a gradient that is almost
    zero into a step of the noise's sign, so that a single weight may be a learning rate away: all of them together
    are nearer than 1e-4, and a tensor that is not averaged or not restored is further than 1e-2.
    """
    for expected, found in zip(rows(folder, "alone"), rows(folder, run), strict=True):
        names = [name for name in LOSSES if name in expected]
        assert "loss" in names
        assert [found[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5), run
        assert found.get("layers", {}) == pytest.approx(expected.get("layers", {}), rel=1e-5), run
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), run
    one, other = (load_file(adapter(folder, name)) for name in ("alone", run))
    assert one.keys() == other.keys()
    apart: dict[str, tuple[float, float]] = {}
    for name, tensor in one.items():
        if tensor.is_floating_point():
            apart[name] = (float((other[name].double() - tensor.double()).norm()), float(tensor.double().norm()))
        else:
            assert other[name].equal(tensor), f"{run}: {name}"
    furthest = max(apart, key=lambda name: apart[name][0] / max(apart[name][1], 1e-30))
    assert apart[furthest][0] <= 1e-2 * apart[furthest][1], f"{run}: {furthest}, {apart[furthest]}"
    difference, size = (math.hypot(*parts) for parts in zip(*apart.values(), strict=True))
    print(f"{run}: weights {difference / size:.1e} apart, {apart[furthest][0] / apart[furthest][1]:.1e} in {furthest}")
    assert difference <= 1e-4 * size, f"{run}: {difference} of {size}"


# The same learning.


@pytest.mark.parametrize("form", ["replicated", "sharded"])
def test_two_learn_what_one_does(made: Runs, form: str) -> None:
    for run in ("alone", form):
        made[run]
    assert_same_run(made.folder, form)
    assert max(losses(made.folder, "alone")) < 10


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square over the steps, in nats."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


@pytest.mark.parametrize("run", ["packed replicated", "packed sharded", "packed accelerate"])
def test_packed_documents_in_bfloat16_are_learnt_within_the_noise(made: Runs, run: str) -> None:
    names = ("packed alone", "packed nudged up", "packed nudged down", run)
    for name in names:
        made[name]
    alone, up, down, found = (losses(made.folder, name) for name in names)
    assert all(map(math.isfinite, found))
    noise = max(distance(up, alone), distance(down, alone))
    print(f"{run}: {distance(found, alone):.2e} nats from one GPU; by a rate in the 6th digit {noise:.2e}")
    assert noise < MOST_NOISE
    assert distance(found, alone) <= 3 * noise


# Stopped, and on with another form.


@pytest.mark.parametrize("name", ["begun sharded", "sharded, replicated, sharded", "alone, sharded"])
def test_sigterm_saves_and_says_so(made: Runs, name: str) -> None:
    ended = made[name]
    said = re.search(r"Stopped by (SIGTERM|a signal) after step (\d+); the state is saved", ended.err)
    assert said, ended
    assert STOP_STEP <= int(said[2]) < STEPS
    assert ended.says("Run the same command again to go on."), ended
    if name == "begun sharded":
        assert last_step(made.metrics(name)) == int(said[2])
        latest = made.folder / name / "distill" / "checkpoints" / "latest"
        assert latest.read_text().strip().endswith(f"{int(said[2]):07d}")
        assert not adapter(made.folder, name).exists()


@pytest.mark.parametrize("run", ["sharded, alone", "alone, sharded", "sharded, replicated, sharded"])
def test_a_run_goes_on_in_another_form_as_if_it_had_not_stopped(made: Runs, run: str) -> None:
    for name in ("alone", run):
        made[name]
    assert_same_run(made.folder, run)


# Exported.


def test_exports_do_not_tell_how_many_gpus_wrote_the_adapter(made: Runs) -> None:
    sharded, replicated = made["exported sharded"], made["exported replicated"]
    weights = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert weights
    assert sorted(path.name for path in replicated.glob("*.safetensors")) == weights
    for name in (*weights, "config.json"):
        assert (sharded / name).read_bytes() == (replicated / name).read_bytes(), name
    files = [adapter(made.folder, run) for run in ("sharded", "sharded, replicated")]
    assert files[0].read_bytes() == files[1].read_bytes()


# Lost, refused.


def test_a_killed_worker_ends_the_run_which_then_goes_on(made: Runs) -> None:
    made["alone"]
    ended = made["killed"]
    assert ended.says("A process of this run was lost"), ended
    assert_same_run(made.folder, "killed")


@pytest.mark.parametrize("form", ["sharded", "accelerate"])
def test_a_teacher_cache_does_not_go_with_sharding(made: Runs, form: str) -> None:
    ended = made[f"refused {form}"]
    assert ended.code != 0, ended
    assert len(re.findall(r"^error: .*A teacher cache does not go with sharded weights", ended.err, re.M)) == 1, ended
    assert re.search(r"exitcode\s*: 3 ", ended.err), ended
    assert not made.metrics(f"refused {form}").exists()
