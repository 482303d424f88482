# What people type. `make` alone prints the targets; .ci/run calls the same ones.
#
#   make test PYTHON=python3.12                         another interpreter (for a new .venv)
#   make test PYTEST_ARGS="-k merge -m 'not slow'"      some of the tests
#   PL_PERSONALIZE_TEST_SEED=7 make test                with other random numbers

PYTHON ?= python3
PYTEST_ARGS ?=

# Targets are relative to this folder, so that its path may hold spaces; what is exported is absolute.
ROOT := $(CURDIR)
BIN := $(ROOT)/.venv/bin
CACHE := $(ROOT)/.cache
WHEEL_BIN := $(CACHE)/wheel-venv/bin
PIP := -m pip --disable-pip-version-check --no-input

# Nothing is written outside this folder, pip's cache excepted. Sockets live in TMPDIR, and a socket's path is limited to
# a hundred characters: below a long path the system's temporary folder has to do.
SYSTEM_TMP := $(or $(TMPDIR),/tmp)
TMPDIR := $(shell [ $$(printf '%s' "$(CACHE)" | wc -c) -le 60 ] && echo "$(CACHE)/tmp" || echo "$(SYSTEM_TMP)")
export TMPDIR
export WANDB_DIR := $(CACHE)/wandb
export WANDB_CACHE_DIR := $(CACHE)/wandb/cache
export WANDB_DATA_DIR := $(CACHE)/wandb/data
export WANDB_CONFIG_DIR := $(CACHE)/wandb/config
export MPLCONFIGDIR := $(CACHE)/matplotlib
export TORCH_HOME := $(CACHE)/torch
export RUFF_CACHE_DIR := $(CACHE)/ruff
export MYPY_CACHE_DIR := $(CACHE)/mypy
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
WRITABLE := $(addprefix .cache/,tmp torch matplotlib wandb/cache wandb/data wandb/config)

# Somebody's PYTHONPATH must not decide what is tested.
unexport PYTHONPATH
unexport PYTHONHOME

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench wheel wheel-test clean

help:
	@echo "make demo        the method on handwritten digits"
	@echo "make test        all tests (PYTEST_ARGS=... for some of them)"
	@echo "make lint        ruff, and mypy --strict on the installed package"
	@echo "make bench       what importances, a merge and a training step cost, as ratios"
	@echo "make wheel-test  the fast tests against the built wheel, in a fresh environment"
	@echo "make clean       remove the environments, caches and builds"

demo: .venv/.installed-experiments | $(WRITABLE)
	@"$(BIN)/python" experiments/run_digits.py

test: .venv/.installed-dev | $(WRITABLE)
	@echo "pytest"
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n 2 $(PYTEST_ARGS)

bench: .venv/.installed-dev | $(WRITABLE)
	@OMP_NUM_THREADS=1 "$(BIN)/python" experiments/bench_importance.py
	@OMP_NUM_THREADS=1 "$(BIN)/python" experiments/bench_memory.py
	@OMP_NUM_THREADS=1 "$(BIN)/python" experiments/bench_merge.py
	@OMP_NUM_THREADS=1 "$(BIN)/python" experiments/bench_training.py
	@OMP_NUM_THREADS=1 "$(BIN)/python" experiments/bench_heads.py

# The folders are not named as they are imported, so mypy reads an installed copy, where the sources are out of its
# sight. A build/ that is already there would bring deleted modules back.
lint: .venv/.installed-dev | $(WRITABLE)
	@echo "ruff check"
	@"$(BIN)/ruff" check --quiet .
	@echo "ruff format --check"
	@"$(BIN)/ruff" format --check --quiet . || { echo "to format: .venv/bin/ruff format ." >&2; exit 1; }
	@echo "mypy --strict"
	@rm -rf build .cache/lint
	@"$(BIN)/python" $(PIP) install -qq --no-deps --no-build-isolation --target .cache/lint .
	@rm -rf build
	@cd .cache/lint && "$(BIN)/python" -m mypy --config-file "$(ROOT)/pyproject.toml" -p pl_personalize

wheel: .venv/.installed-dev | $(WRITABLE)
	@echo "Building the wheel from the source distribution"
	@rm -rf build .cache/dist
	@"$(BIN)/python" -m build --no-isolation --outdir .cache/dist . >.cache/build.log 2>&1 || \
	{ cat .cache/build.log >&2; exit 1; }

# The tests run where the checkout is out of sight; the data that some of them use stays where it is.
wheel-test: wheel
	@echo "Installing the wheel into a fresh environment (about two minutes)"
	@rm -rf .cache/wheel-venv
	@"$(PYTHON)" -m venv .cache/wheel-venv
	@"$(WHEEL_BIN)/python" $(PIP) install -qq "$$(ls .cache/dist/*.whl)[dev]"
	@echo "pytest against the wheel"
	@outside=$$(mktemp -d "$(SYSTEM_TMP)/pl-personalize-XXXXXX") && trap 'rm -rf "$$outside"' EXIT && \
	cp -R tests pyproject.toml "$$outside" && \
	if [ -d experiments ]; then cp -R experiments "$$outside"; fi && \
	export PL_PERSONALIZE_DATA="$${PL_PERSONALIZE_DATA:-$(ROOT)/../shared/data}" && \
	cd "$$outside" && OMP_NUM_THREADS=1 "$(WHEEL_BIN)/python" -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

clean:
	rm -rf .venv .cache build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find pl_personalize callbacks datamodules experiments tests -name __pycache__ -prune -exec rm -rf {} +

# One call for everything: torchvision fits only the torch that is resolved together with it.
.venv/.installed-dev: setup.cfg pyproject.toml | .venv/pyvenv.cfg .cache/tmp
	@echo "Installing pl_personalize and its development tools into .venv (once, about two minutes)"
	@"$(BIN)/python" $(PIP) install -qq --editable '.[dev]'
	@touch .venv/.installed-experiments $@

.venv/.installed-experiments: setup.cfg pyproject.toml | .venv/pyvenv.cfg .cache/tmp
	@echo "Installing pl_personalize into .venv (once, about two minutes)"
	@"$(BIN)/python" $(PIP) install -qq --editable '.[experiments]'
	@touch $@

.venv/pyvenv.cfg:
	@"$(PYTHON)" -m venv .venv

$(WRITABLE):
	@mkdir -p $@
