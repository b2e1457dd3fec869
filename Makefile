# Everything a developer needs. `make demo` and `make test` work on a fresh clone with Python 3.11 and make alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help venv demo test check format clean
help:
	@echo "make demo         set up, then do the main job on real data (a few minutes)"
	@echo "make test         set up, then run the tests"
	@echo "make check        lint, types, import rules"
	@echo "make bench-NAME   run one benchmark, for example bench-export"
	@echo "make install      install the daemon on this Debian box (as root)"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foldd needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

venv: $(READY)

demo: $(READY)
	$(BIN)/foldd demo

test: $(READY)
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-%: $(READY)
	$(BIN)/python -m benchmarks.$(subst -,_,$*) $(ARGS)

clean:
	rm -rf $(VENV) build dist demo-state src/*.egg-info

include systemd/install.mk
