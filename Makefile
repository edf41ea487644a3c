# `make train` and `make test` set everything up by themselves; both are quick the second time.
PYTHON ?= $(shell for v in 3.11 3.12 3.13 3.10; do python$$v -c "" 2>/dev/null && echo python$$v && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

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
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(READY)
	$(BIN)/rest-rl train $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

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
