# `make train` and `make test` set everything up by themselves; both are quick the second time.
CANDIDATES := python3.11 python3.12 python3.13 python3.10 python3
FITS := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BFCL_PINS := 2025.6.14 2026.3.23

.PHONY: train test slow lint wheel clean help
.DEFAULT_GOAL := help

help:
	@echo "make train   set up, then train the embedded model with ResT (ARGS='--set run.seed=1' and the like pass through)"
	@echo "make test    set up, then run the default tests (ARGS='-k formats' and the like pass through)"
	@echo "make slow    the slow tests: wheel in an empty environment, kill and resume, ..."
	@echo "make lint    ruff, pyright, import contract"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove $(VENV), dist and caches (runs/ stays)"

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "got none of $(CANDIDATES) in versions 3.10 to 3.13; install one or pass PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@for pin in $(BFCL_PINS); do $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target $(VENV)/share/rest-rl/bfcl-eval-$$pin bfcl-eval==$$pin || exit 1; done
	@touch $@

train: $(READY)
	$(BIN)/rest-rl train $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
