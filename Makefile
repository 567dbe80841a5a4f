# Everything here does its own set-up: it needs Python 3.11 to 3.13 and make, and nothing installed before.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# Tests write many small files, and wait until each is on the disk: not where there is room in memory, in GB.
ROOM := $(shell df --output=avail --block-size=1G /dev/shm 2>/dev/null | tail -n 1)
IN_MEMORY := $(if $(filter-out 0 1 2 3,$(ROOM)),TMPDIR=/dev/shm)
# Tests start many processes: they keep what they compile of Python, also where the surroundings say not to.
FOR_TESTS := $(IN_MEMORY) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
ON_THE_CPU := CUDA_VISIBLE_DEVICES= $(FOR_TESTS)
# Each worker begins with whole files, whose fixtures are then made once, and takes from the others when it has done.
WORKERS := -n $(JOBS) --dist worksteal
PLAIN := $(VENV)/.plain
READY := $(VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_PACKAGES := $(VLLM_VENV)/.packages
VLLM_READY := $(VLLM_VENV)/.ready
OLDEST_VENV := .venv-oldest
OLDEST_READY := $(OLDEST_VENV)/.ready
NEWEST_VENV := .venv-newest
NEWEST_READY := $(NEWEST_VENV)/.ready
DOCS_READY := $(VENV)/.docs
RELEASE_READY := $(VENV)/.release
CODE := parscale kernels checkpoints scaling_laws
ALL_CODE := $(CODE) $(wildcard examples benchmarks tests tools)

.DEFAULT_GOAL := help
.NOTPARALLEL: # the last thing that `make test` prints is the tests' summary
.PHONY: help setup quickstart test unit test-nightly test-vllm test-vllm-sources test-oldest test-newest lint format typecheck bench support gpu-check gpu-evidence docs build clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv with the pinned versions; the other targets do this by themselves

# $(call environment,FOLDER): a virtual environment, unless it is there
define environment
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	|| { echo "parscale needs Python 3.11, 3.12 or 3.13; name one as in: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

# The package, what it needs itself, and the adapters that the quickstart trains as a control; no more.
$(PLAIN): pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[peft]'
	@touch $@

$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $(PLAIN) $@

quickstart: $(PLAIN) ## Convert, post-train and compare a small model on this machine; a few minutes
	rm -rf build/quickstart
	$(BIN)/parscale quickstart --output build/quickstart

test: lint typecheck unit ## Everything that has to pass: lint, types, tests

unit: $(READY) ## The tests alone, on the CPU; JOBS of them at once
	$(ON_THE_CPU) $(BIN)/pytest $(WORKERS) -m "not gpu and not nightly"

test-nightly: $(READY) $(VLLM_READY) ## The tests that the others leave to the night: whole tables, full grids, every target
	$(FOR_TESTS) $(VLLM_VENV)/bin/pytest -n $(JOBS) --dist loadfile -m nightly tests/vllm
	$(ON_THE_CPU) $(BIN)/pytest $(WORKERS) -m "nightly and not gpu"

# An environment of its own: vLLM pins torch and much else. --no-deps, since its list asks for packages of GPUs.
$(VLLM_PACKAGES): constraints.txt requirements-vllm.txt
	$(call environment,$(VLLM_VENV))
	$(VLLM_VENV)/bin/python -m pip install --constraint constraints.txt torch
	$(VLLM_VENV)/bin/python -m pip install --no-deps --requirement requirements-vllm.txt
	@touch $@

$(VLLM_READY): pyproject.toml $(VLLM_PACKAGES)
	$(VLLM_VENV)/bin/python -m pip install --no-deps --editable .
	@touch $@

test-vllm: $(VLLM_READY) ## The tests of the vLLM plugin, with vLLM's build for CPUs
	$(FOR_TESTS) $(VLLM_VENV)/bin/pytest -n $(JOBS) --dist loadfile -m "not nightly" tests/vllm

# A version that has no build for CPUs is read and not imported: its Python files are taken out of the build for GPUs.
VLLM_READ := 0.33.0
VLLM_SOURCES := build/vllm-$(VLLM_READ)
UNPACK := import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); \
	z.extractall(sys.argv[2], [name for name in z.namelist() if name.endswith(".py")])
$(VLLM_SOURCES): | $(VLLM_PACKAGES)
	rm -rf $@.part
	$(VLLM_VENV)/bin/python -m pip download --no-deps --only-binary :all: --dest $@.part vllm==$(VLLM_READ)
	$(VLLM_VENV)/bin/python -c '$(UNPACK)' $@.part/*.whl $@.part
	rm $@.part/*.whl
	mv $@.part $@

test-vllm-sources: $(VLLM_READY) $(VLLM_SOURCES) ## What the plugin takes for granted, read in the newest vLLM; 340 MB to fetch
	$(FOR_TESTS) $(VLLM_VENV)/bin/pytest tests/vllm/test_attributes.py --vllm-sources $(VLLM_SOURCES)/vllm

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	$(call environment,$(OLDEST_VENV))
	$(OLDEST_VENV)/bin/python -m pip install --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

# Of the pinned versions is the table of what each compiler does; older ones lack some of the architectures' mends too.
OF_OTHERS := not gpu and (versions or not nightly)
OF_THE_PINNED := --ignore tests/kernels/test_compile_targets.py
test-oldest: $(OLDEST_READY) ## The tests with the oldest versions that pyproject.toml allows; several GB to fetch
	$(ON_THE_CPU) $(OLDEST_VENV)/bin/pytest $(WORKERS) -m "$(OF_OTHERS)" $(OF_THE_PINNED) --ignore tests/test_support.py

$(NEWEST_READY): pyproject.toml
	$(call environment,$(NEWEST_VENV))
	$(NEWEST_VENV)/bin/python -m pip install --upgrade --upgrade-strategy eager --editable '.[test]' trl
	@touch $@

test-newest: $(NEWEST_READY) ## The tests with the newest releases that pyproject.toml allows; several GB to fetch
	$(ON_THE_CPU) $(NEWEST_VENV)/bin/pytest $(WORKERS) -m "$(OF_OTHERS)" $(OF_THE_PINNED)

lint: $(READY) ## Look for faults of style
	$(BIN)/ruff check $(ALL_CODE)
	$(BIN)/ruff format --check $(ALL_CODE)

format: $(READY) ## Repair what can be repaired by a program
	$(BIN)/ruff check --fix $(ALL_CODE)
	$(BIN)/ruff format $(ALL_CODE)

# mypy does not read setuptools' map from parscale.kernels to kernels/ and so on: it gets a tree of links laid out as installed.
typecheck: $(READY) ## Check types
	@rm -rf build/types && mkdir -p build/types/parscale
	@ln -s $(CURDIR)/parscale/* $(addprefix $(CURDIR)/,$(filter-out parscale,$(CODE))) build/types/parscale/
	cd build/types && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
		--num-workers $(JOBS) -p parscale

bench: $(READY) ## Measure what the streams cost on this machine, into benchmarks/results/
	$(BIN)/python benchmarks/overhead.py $(if $(RELEASED),--released $(RELEASED)) --output benchmarks/results/overhead.json

support: $(READY) ## Examine every architecture and class, and write docs/architectures.md and docs/classes.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/support.py --jobs $(JOBS) --output docs/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/classes.py --jobs $(JOBS) --output docs/classes.md

# What has parscale and a torch that sees a GPU is used as it is; else .venv. -P: the root of the repository is no package.
# Eight minutes: six of figures, which do not wait for the tests, and two of tests. Tests are named by file, since others
# need packages that such an environment may lack; -v prints each as it comes.
SEES_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())
GPU_TESTS = $(shell grep -rlE 'mark\.(gpu|kernel)' tests --include='test_*.py')
gpu-check: ## The benchmarks and tests for a GPU, in eight minutes; RELEASED=FOLDER times the released code too
	@python=$(PYTHON); \
	$$python -P -c 'import parscale, pytest, xdist; $(SEES_GPU)' 2>/dev/null \
		|| { $(MAKE) --no-print-directory $(READY) && python=$(BIN)/python; } || exit 1; \
	$$python -P -c '$(SEES_GPU)' \
		|| { echo "make gpu-check needs a CUDA or ROCm device, and torch sees none." >&2; exit 1; }; \
	measured=0; $$python benchmarks/gpu_check.py --minutes 6 $(if $(RELEASED),--released $(RELEASED)) \
		--output benchmarks/results/gpu.json || measured=1; \
	timeout --signal INT --kill-after 10 120 $$python -P -m pytest -v -n 8 -m "gpu and not nightly" $(GPU_TESTS) \
		&& exit $$measured

gpu-evidence: ## The study of what streams are worth at the size of one GPU; started again, it goes on
	@python=$(PYTHON); \
	$$python -P -c 'import parscale, datasets, matplotlib, mpmath, networkx, nltk, pandas, pygments, scipy, sklearn, sympy; $(SEES_GPU)' 2>/dev/null \
		|| { $(MAKE) --no-print-directory $(READY) && python=$(BIN)/python; } || exit 1; \
	$$python -P -c '$(SEES_GPU)' \
		|| { echo "make gpu-evidence needs a CUDA or ROCm device, and torch sees none." >&2; exit 1; }; \
	trained=0; $$python -P benchmarks/evidence/work.py --gpu --work build/gpu-evidence \
		--results benchmarks/results/gpu-evidence || trained=1; \
	$$python -P benchmarks/evidence/report.py --rows benchmarks/results/gpu-evidence \
		--output benchmarks/results/gpu-evidence.json && exit $$trained

$(DOCS_READY): $(PLAIN)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[docs]'
	@touch $@

# The variable silences a notice about the builder's future, which is no fault of a page.
docs: $(DOCS_READY) ## The documentation, into build/docs; a broken link or an unknown name stops it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(RELEASE_READY): $(PLAIN)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[release]'
	@touch $@

# The same commit gives the same bytes, wherever and whenever: the archives bear the time of the commit.
build: $(RELEASE_READY) ## The wheel and the source distribution, into dist/, checked for an index
	rm -rf build/lib dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 315532800) $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## Remove what was built, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find $(ALL_CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
