# Two commands matter: `make demo` and `make test`. Each prepares .venv on its first run.
#
# Another interpreter:        make test PYTHON=python3.12
# Your own build of torch:    install it into .venv, then  make demo CONSTRAINTS=/dev/null
# Further extras:             make test EXTRAS=test,cuda13 CONSTRAINTS=/dev/null

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS      ?= test
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadgroup
DEMO_ARGS   ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint wheel clean

help:
	@echo "make demo    generate the same prompts with softmax attention and with GSPN-2"
	@echo "make test    run the tests"
	@echo "make lint    run ruff"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove .venv, builds and caches (outputs/ stays)"

demo: $(STAMP)
	@$(BIN)/gspn2 demo $(DEMO_ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/python -m ruff --version >/dev/null 2>&1 \
		|| $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@$(BIN)/python -m ruff check .

wheel: $(STAMP)
	@$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: Python 3.10 or newer is needed; got: $$($(PYTHON) --version 2>&1)." \
		"Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(STAMP): setup.cfg pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/python
	@echo "Installing gspn2-diffusers and what it needs into $(VENV) (minutes on the first run) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@
