# Each target does all its own set-up: a fresh machine needs Python 3.11 or later, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled where they are first imported, and kept: most of what is installed never is.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(PIP_INSTALL) -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
ROBO := .venv-robo
ROBO_PYTEST := OMP_NUM_THREADS=1 $(ROBO)/bin/python -m pytest -o addopts=-q -o filterwarnings=default
.PHONY: help demo docs smoke test test-all test-integrations test-observed test-optimizers test-oldest-triton \
	test-robo-orchard test-gpu gpu-check check format ways-in error-page bench bench-gpu experiments clean

help:  ## say what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo  ## train a small model without and with clipping, under a minute
	$(BIN)/gradclip demo

docs: $(VENV)/.docs  ## build the site, docs/_build/html, and check its reference, its links, its search
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python -m pytest tests/documentation

# One thread each: two processes with threads of their own on two cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: $(VENV)/.dev  ## run the tests; where arguments are independent, on every pair of their values
	$(PYTEST) --dist worksteal -m "not framework" \
		--ignore tests/integrations --ignore tests/documentation --ignore tests/observed --ignore tests/robo_orchard \
		--ignore tests/optimizers

test-all:  ## run the same tests on every combination of values
	ALL_COMBINATIONS=1 $(MAKE) test test-integrations

# The folders that have such tests: to collect the others takes longer than to run these.
smoke: $(VENV)/.dev  ## run one test of each kind, while you work: half a minute
	$(PYTEST) -m smoke tests/contract tests/distributed tests/unit

test-integrations: $(VENV)/.integrations  ## run the tests of the frameworks that gradclip meets
	$(PYTEST) --dist worksteal tests/integrations tests/contract/test_ways_in.py \
		tests/unit/clipping/test_arguments.py tests/unit/pipeline/hooks/test_tracker_hook.py

test-observed: $(VENV)/.integrations  ## run scripts of ten kinds with and without gradclip run: a few minutes
	$(PYTEST) --dist worksteal tests/observed

test-optimizers: $(VENV)/.optimizers  ## run the optimizers and the clippers of other libraries, and write docs/reference/optimizers.md
	PYTHONPATH=$(VENV)/optimizers $(PYTEST) tests/optimizers
	PYTHONPATH=$(VENV)/optimizers $(BIN)/python tests/optimizers/table.py

test-robo-orchard: $(ROBO)/.installed  ## run gradclip inside RoboOrchardLab 0.4.0, and its scripts under both
	$(ROBO_PYTEST) tests/robo_orchard
	PYTHONPATH=tests:tests/robo_orchard/scripts $(ROBO)/bin/python tests/robo_orchard/page.py
	$(ROBO_PYTEST) tests/contract/test_ways_in.py -k RoboOrchardLab

# That of torch 2.6. It compiles for a GPU without one; its interpreter asks for an older numpy.
test-oldest-triton: $(VENV)/.oldest-triton  ## compile the kernels with the oldest Triton that is supported
	PYTHONPATH=$(VENV)/oldest-triton $(PYTEST) -n 0 tests/unit/clipping/kernels/test_triton_compiles.py

# What needs a GPU runs on the machine's own python, whose torch knows the GPU. It finds src first, and
# then what PYTHONPATH names already: a machine without a network has its packages in a folder.
FROM_SRC := PYTHONUNBUFFERED=1 PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH}
GPU_PYTEST := $(PYTHON) -m pytest -p no:cacheprovider -o addopts= -o filterwarnings=default -q
IN_PARALLEL = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && printf '%s' '-n 8')
KERNELS := tests/unit/clipping/kernels/test_triton.py

test-gpu:  ## on a GPU: the kernels, no host waits, CUDA graphs; with SANITIZER=compute-sanitizer, checked
	$(FROM_SRC) $(SANITIZER) $(GPU_PYTEST) tests/gpu $(KERNELS) \
		tests/unit/clipping/kernels/test_triton_compiles.py

# Each command has a time limit, and each runs whatever became of the one before. The test that is
# left out leads three programs through 2^31 elements. compute-sanitizer comes with CUDA.
gpu-check:  ## on a GPU, under 8 minutes: measurements (clip_gpu.csv), tests, and some under compute-sanitizer
	failed=; \
	$(FROM_SRC) timeout 270 $(PYTHON) benchmarks/gpu_check.py || failed="$$failed measurements"; \
	$(FROM_SRC) timeout 110 $(GPU_PYTEST) $(IN_PARALLEL) tests/gpu $(KERNELS) \
		--deselect $(KERNELS)::test_elements_beyond_two_to_the_31 || failed="$$failed tests"; \
	$(FROM_SRC) PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 90 compute-sanitizer --error-exitcode 9 \
		$(GPU_PYTEST) $(KERNELS) -k "(ragged or clamping or each_row) and dtype1" \
		|| failed="$$failed compute-sanitizer"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

check: $(VENV)/.dev  ## format, lint, types, layers: what a commit must pass
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## put the code into its format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

ways-in: $(VENV)/.dev  ## write the table of all ways in into docs/reference/integrations.md
	PYTHONPATH=tests $(BIN)/python tests/contract/ways_in.py

error-page: $(VENV)/.dev  ## write the explanations of the errors into docs/reference/errors.md
	$(BIN)/python tests/unit/cli/error_page.py

# Threads that wait do not compute: else what they spin would count as computing time.
BENCH := OMP_WAIT_POLICY=passive $(BIN)/python

bench: $(VENV)/.bench  ## measure on the CPU: benchmarks/results/*.csv, and the tables and the plot of the docs
	$(BENCH) benchmarks/hook_overhead.py
	$(BENCH) benchmarks/host.py
	$(BENCH) benchmarks/small.py
	$(BENCH) benchmarks/small.py --training
	$(BENCH) benchmarks/small.py --threads 2
	$(BENCH) benchmarks/clip.py --compile
	$(BENCH) benchmarks/training_step.py
	$(BENCH) benchmarks/pipeline_overhead.py
	$(BENCH) benchmarks/sharded.py
	$(BENCH) benchmarks/scale.py
	$(BENCH) benchmarks/policies.py
	$(BENCH) benchmarks/report.py

EXPERIMENTS := recurrent wrong_scale learning_rates price faults rescaled

experiments: $(VENV)/.dev  ## train small models under each policy, half an hour on one core: docs/explanation/experiments.md
	for name in $(EXPERIMENTS); do \
		OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/experiments/$$name.py || exit 1; \
	done
	$(BIN)/python benchmarks/report.py

bench-gpu:  ## measure on a CUDA device, with the machine's own python and its torch; under 8 minutes
	failed=; \
	$(FROM_SRC) timeout 270 $(PYTHON) benchmarks/gpu_check.py || failed="$$failed clipping"; \
	$(FROM_SRC) timeout 180 $(PYTHON) benchmarks/training_step.py --device cuda || failed="$$failed steps"; \
	$(FROM_SRC) $(PYTHON) benchmarks/report.py || failed="$$failed report"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) $(ROBO) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[dev,docs,transformers,lightning]'
	@touch $@

# Its source package looks for torch while it is built, and would compile its kernels. Accelerate
# needs transformers to use it.
$(VENV)/.integrations: $(VENV)/.dev
	$(PIP) setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-build-isolation deepspeed transformers trl lightning wandb
	@touch $@

# In a folder of their own, so that no other test meets them. They need less than they ask for.
# Compiled here: some warn of a wrong escape when they are compiled, and in a test that is an error.
$(VENV)/.optimizers: $(VENV)/.dev
	$(PIP) --compile --no-deps --upgrade --target $(VENV)/optimizers autoclip dadaptation heavyball lion-pytorch \
		muon-optimizer opacus opt_einsum prodigyopt pytorch_optimizer pytorch_ranger schedulefree scipy \
		smartclip timm torch-optimi torch-optimizer torchao zclip
	@touch $@

$(VENV)/.oldest-triton: $(VENV)/.dev
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/oldest-triton triton==3.2.0
	@touch $@

# It pins older releases of what the other tests use, so it has an environment of its own. It asks
# for numpy 1, and the newest pyarrow, which datasets would take, for numpy 2.
$(ROBO)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ROBO)
	$(ROBO)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1 \
		'transformers<5' robo-orchard-lab==0.4.0 'pyarrow<22' pytest pytest-timeout tensorboard -e '.[pipeline]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) -e '.[dev,transformers,lightning]' autoclip smartclip
	@touch $@
