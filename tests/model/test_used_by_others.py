"""An exported folder in other people's programs, in processes that cannot import hybridize."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.model.convert import convert
from hybridize.model.export import export
from hybridize.model.load import load_hybrid, load_tokenizer
from hybridize.plan import plan
from hybridize.recipe.schema import LayerPlan, MixerChoice
from tests.distillation.runs import MIXERS, tiny_recipe, write_teacher

PROMPTS = ("the sea", "This is document 3. It is longer than a window.", "ink")
WITHOUT_US = """\
import json, sys
for name in ("hybridize", "hybridize_kernels"):
    sys.modules[name] = None  # importing it fails
import torch
folder, asked = sys.argv[1], json.loads(sys.argv[2])
"""

PIPELINE = """\
from transformers import pipeline
speaker = pipeline("text-generation", model=folder, trust_remote_code=True, dtype=torch.float32, device="cpu")
for options in asked["options"]:
    said = speaker(asked["prompts"], batch_size=len(asked["prompts"]), return_full_text=False, **options)
    print(json.dumps([one["generated_text"] for each in said for one in each]))
"""

HARNESS = """\
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model = HFLM(pretrained=folder, trust_remote_code=True, dtype="float32", device="cpu", batch_size=4)
found = lm_eval.simple_evaluate(
    model=model,
    tasks=["tiny_choice", "tiny_writing"],
    task_manager=TaskManager(include_path=asked["tasks"], include_defaults=False),
    log_samples=True,
)
samples = {name: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
           for name, rows in found["samples"].items()}
print(json.dumps({"results": found["results"], "samples": samples}, default=str))
"""

TASK = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WRITING = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["~"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICES = ("river", "stone", "ink")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid with every kind of state."""
    folder = tmp_path_factory.mktemp("project")
    write_teacher(folder)
    sparse = {"block_tokens": 4, "selected_blocks": 4, "window_tokens": 6}
    mixers = {**MIXERS, "N": MixerChoice("native_sparse_attention", sparse)}
    recipe = replace(tiny_recipe(folder), layers=LayerPlan(pattern="F T G N"), mixers=mixers)
    convert(plan(recipe), folder / "converted")
    return Path(export(folder / "converted", folder / "export"))


def run(code: str, folder: Path, asked: dict[str, Any], cache: Path) -> list[Any]:
    """The JSON lines that the program says."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache), "PYTHONPATH": ""}
    command = [sys.executable, "-c", WITHOUT_US + code, str(folder), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", "{"))]


def continuation(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
    return str(tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True))


def test_a_pipeline_says_of_a_padded_batch_what_we_say_of_each(exported: Path, tmp_path: Path) -> None:
    ways = [{"max_new_tokens": 12, "do_sample": False, "num_beams": beams} for beams in (1, 3)]
    there = run(PIPELINE, exported, {"prompts": PROMPTS, "options": ways}, tmp_path)
    model, tokenizer = load_hybrid(exported, dtype=torch.float32), load_tokenizer(exported)
    assert there == [[continuation(model, tokenizer, prompt, **way) for prompt in PROMPTS] for way in ways]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra `harness` is not installed")
def test_the_evaluation_harness_takes_an_export_by_its_folder(exported: Path, tmp_path: Path) -> None:
    rows = [{"question": prompt, "choices": CHOICES, "answer": i} for i, prompt in enumerate(PROMPTS)]
    data = tmp_path / "rows.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, text in (("tiny_choice", CHOICE), ("tiny_writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(task=name, data=data) + text)
    [there] = run(HARNESS, exported, {"tasks": str(tmp_path)}, tmp_path)
    model, tokenizer = load_hybrid(exported, dtype=torch.float32), load_tokenizer(exported)

    found = torch.tensor([[float(each[0][0]) for each in row] for row in there["samples"]["tiny_choice"]])
    expected = torch.tensor([[log_likelihood(model, tokenizer, p, f" {c}") for c in CHOICES] for p in PROMPTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    right = (expected.argmax(1) == torch.arange(len(PROMPTS))).float().mean().item()
    assert there["results"]["tiny_choice"]["acc,none"] == pytest.approx(right)

    said = [row[0][0] for row in there["samples"]["tiny_writing"]]
    assert said == [continuation(model, tokenizer, p, max_new_tokens=6, do_sample=False) for p in PROMPTS]


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, context: str, text: str) -> float:
    """Of `text` after the context, in nats."""
    tokens = tokenizer(context + text, return_tensors="pt").input_ids
    first = len(tokenizer(context).input_ids)
    scores = model(tokens, use_cache=False).logits[0].log_softmax(-1)
    return float(scores[first - 1 : -1].gather(1, tokens[0, first:, None]).sum())
