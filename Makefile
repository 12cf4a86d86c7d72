# Needs python3 (3.11 or newer, with pip and venv) and make; every target does its own set-up in .venv.
# `make help` lists the targets; notebooks/reference/setup.md gives each as plain pip lines.
#
# torch: constraints.txt pins the release. On Linux, PyPI's build of it carries CUDA (gigabytes); without a GPU, take the CPU one:
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup
# To let pip choose newer releases within the ranges of pyproject.toml:   make setup CONSTRAINTS=
# To keep a torch that you already have, skip make:   pip install -e ".[notebooks]"   in its environment.

PY ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST_FLAGS ?= -n 2
# What `make quick` tests: what a new weighting or sampler can break. Another room: make quick QUICK=tests/test_schedule.py
QUICK ?= $(addprefix tests/test_,architecture.py bins.py objective.py samplers.py weightings.py) dysigma/weightings dysigma/samplers.py
# One imports the whole package in a process of its own; one reads every file for words of other rooms.
NOT_QUICK := $(addprefix --deselect tests/test_architecture.py::,test_importing_every_module_loads_nothing_slow \
	test_no_number_is_repaired_in_silence_and_nothing_is_unpickled_freely)
# Replaces lines of `make lowest`: torch==2.13.0 where the lowest torch has no small build.
LOWEST ?=

# One thread a process: a second one beside other processes makes tiny networks up to 20 times slower.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/pip.log
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help setup run test slow quick check-docs lowest lab notebooks docs browser bench faults mutants coverage

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## create .venv and install the package, the notebook and the test tools

run: $(STAMP)  ## execute all notebooks in fast mode: live tiny training, figures, samples
	$(BIN)/dysigma notebooks --fast --out runs/notebooks

test: $(STAMP)  ## lint, format check, types, tests of the code and of the examples in its docstrings, check-docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(PYTEST_FLAGS) -m "not slow" --ignore=tests/docs
	@$(MAKE) --no-print-directory check-docs

slow: $(STAMP)  ## the tests that train, race, compile or kill whole runs; before a release, and in CI after make test
	$(BIN)/python -m pytest -q $(PYTEST_FLAGS) -m slow

quick: $(STAMP)  ## lint, and the tests of the core without the slow ones: for the time between two edits
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q $(PYTEST_FLAGS) -m "not slow" $(NOT_QUICK) $(QUICK)

check-docs: $(STAMP)  ## rules of documents: commands of the README run, pages and sources agree, figures and links exist
	$(BIN)/python -m pytest -q $(PYTEST_FLAGS) -m "not slow" tests/docs

lowest:  ## the tests with the lowest versions that pyproject.toml allows, in .venv-lowest (with python3.11)
	$(PY) -m venv .venv-lowest
	$(PY) tests/tools/lowest.py $(LOWEST) > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install -q -c .venv-lowest/constraints.txt -e ".[notebooks,test]"
	.venv-lowest/bin/python -m pytest -q $(PYTEST_FLAGS)

lab: $(STAMP)  ## open the collection in JupyterLab
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

notebooks: $(STAMP)  ## execute all notebooks in full and write their outputs and figures
	$(BIN)/dysigma notebooks

docs: $(VENV)/.docs  ## build the site into build/site: notebooks, API, notation, glossary (offline)
	$(BIN)/sphinx-build -q -W --keep-going -c notebooks/reference notebooks build/site
	@echo "open build/site/index.html"

browser: $(VENV)/.browser  ## run notebooks 00 and 01 in JupyterLab in a headless Chromium, and take pictures
	$(BIN)/python tests/tools/browser.py --out runs/browser

faults: $(STAMP)  ## kill training runs at 50 moments and compare their ends with uninterrupted ones (long)
	$(BIN)/python tests/tools/faults.py --kills 50 --out runs/faults.json

mutants: $(STAMP)  ## change one operator or number at a time and see whether tests notice (an hour)
	$(BIN)/python tests/tools/mutants.py --each 30 --out runs/mutants.json

coverage: $(VENV)/.coverage  ## lines and branches that the tests run; below 90 % is an error
	$(BIN)/coverage run -m pytest -q $(PYTEST_FLAGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

bench: $(STAMP)  ## time training steps and weightings against hand-written ones
	$(BIN)/dysigma benchmark

# denoising-diffusion-pytorch is a test oracle. It requires torchvision, whose CUDA build does not import beside a CPU torch,
# so it comes without its requirements; its test stands in for the parts of torchvision that it imports.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PY) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "dysigma needs Python 3.11 or newer, and $(PY) is %d.%d: make PY=python3.11 ..." % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PY) -m venv $(VENV)
	@echo "Installing into $(VENV) (one to three minutes, more where torch must be downloaded)"
	@$(PIP) -e ".[notebooks,test]" > $(LOG) 2>&1 || { tail -n 15 $(LOG); exit 1; }
	@$(PIP) --no-deps denoising-diffusion-pytorch >> $(LOG) 2>&1 || { tail -n 15 $(LOG); exit 1; }
	@touch $@

$(VENV)/.docs $(VENV)/.browser $(VENV)/.coverage: $(VENV)/.%: $(STAMP)
	@$(PIP) -e ".[$*]" >> $(LOG) 2>&1 || { tail -n 15 $(LOG); exit 1; }
	@touch $@
