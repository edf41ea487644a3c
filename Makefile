# `make train` and `make test` create the environment on first use; later calls reuse it.
CANDIDATES := python3.11 python3.12 python3.13 python3.10 python3
FITS := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VENV_VERL ?= .venv-verl
READY_VERL := $(VENV_VERL)/.ready
NEEDS_PYTHON = @test -n "$(PYTHON)" || { echo "error: none of $(CANDIDATES) is Python 3.10 to 3.13; install one, or pass PYTHON=..."; exit 2; }
BFCL_PINS := 2025.6.14 2026.3.23

.PHONY: train train-real test slow test-verl lint wheel clean help
.DEFAULT_GOAL := help

help:
	@echo "make train      set up, then train the embedded model with ResT (pass options with ARGS='--set run.seed=1')"
	@echo "make train-real the same with SmolLM2-135M-Instruct and the tools of an office (downloads 93 MB)"
	@echo "make test       set up, then run the default tests (pass options with ARGS='-k formats')"
	@echo "make slow       run the slow tests: wheel in an empty environment, kill and resume, ..."
	@echo "make test-verl  set up $(VENV_VERL), then run the verl tests: whole runs on a CPU, one or two minutes each"
	@echo "make lint       run ruff, pyright and the import contracts"
	@echo "make wheel      build dist/*.whl"
	@echo "make clean      remove $(VENV), $(VENV_VERL), dist and caches, but keep runs/"

$(READY): pyproject.toml constraints.txt
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@for pin in $(BFCL_PINS); do $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/share/rest-rl/bfcl-eval-$$pin bfcl-eval==$$pin || exit 1; done
	@touch $@

$(READY_VERL): pyproject.toml constraints-verl.txt
	$(NEEDS_PYTHON)
	$(PYTHON) -m venv $(VENV_VERL)
	$(VENV_VERL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt -e '.[verl]' hypothesis psutil pytest
	@touch $@

train: $(READY)
	$(BIN)/rest-rl train $(ARGS)

train-real: $(READY)
	$(BIN)/rest-rl train --model smollm2 --data office $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-verl: $(READY_VERL)
	$(VENV_VERL)/bin/python -m pytest -m verl tests/verl_cpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf $(VENV) $(VENV_VERL) dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
