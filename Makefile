# make demo   label the shipped tickets, pictures and clips and print the accuracy against gold
# make test   everything that a change must pass: ruff, mypy, pytest
# make test-faults   the long form of the kill suite, about 25 minutes on two quiet cores; GLM_BATCH_FAULTS_SEED=N
#
# All make .venv on a fresh machine and use it again until pyproject.toml changes. PYTHON names the interpreter
# (3.11 or newer); pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) are respected.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := out/demo

.DELETE_ON_ERROR:
.PHONY: demo test test-faults clean

demo: $(VENV)/installed
	@rm -rf $(DEMO)
	@for job in route extract reply shape colour count motion; do \
		$(BIN)/glm-batch label examples/$$job.yaml --set output=$(DEMO)/$$job || exit $$?; echo; \
	done
	@echo "The labelled rows lie below $(DEMO)."

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

test-faults: $(VENV)/installed-test
	$(BIN)/pytest -v -m faults tests/faults

clean:
	rm -rf $(VENV) out

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing glm-batch into $(VENV); the first time takes some minutes"
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "Installing glm-batch and what its tests need into $(VENV); the first time takes some minutes"
	@$(PIP_INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/installed
