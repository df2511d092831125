# All commands in the README and docs/. The first run creates .venv and installs the packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 5001
OPENAI_PORT ?= 8451
# --no-compile: Python compiles modules on first import, and most are never imported.
PIP = $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -c constraints.txt
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile
export HF_HUB_OFFLINE ?= 1

.PHONY: help install demo serve openai azure-local test test-long test-cpus coverage test-all check check-specs docs format bench clean
help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.developed ## Create .venv with the pins of conda.yaml and constraints.txt, including development tools
$(VENV)/.installed: pyproject.toml conda.yaml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV) (PyTorch is the large part; later runs skip this)"
	@$(PYTHON) -m venv $(VENV)
	@sed -n 's/^ *- \([A-Za-z0-9._-]*==[^ ]*\).*$$/\1/p' conda.yaml > $(VENV)/constraints.txt
	@$(PIP) -e '.[openai]'
	@touch $@
$(VENV)/.developed: $(VENV)/.installed
	@echo "installing what development needs: Azure's SDK, Ray, notebooks, clients, linters"
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed ## Start Azure's server on the embedded model, post the sample request, print the answer, stop
	@exec $(BIN)/mptserve demo --port $(PORT)

serve: $(VENV)/.installed ## Keep the server running; AZUREML_MODEL_DIR=/models/mpt-7b serves your own model
	@exec $(BIN)/mptserve serve --port $(PORT)

azure-local: install ## Run the local Azure emulator for the SDK and the notebooks; prints lines to paste into a notebook
	@PYTHONPATH=score:tools exec $(BIN)/python -m local_azure

openai: $(VENV)/.installed ## Serve OpenAI's API, /score and the playground
	@AZUREML_MODEL_DIR="$${AZUREML_MODEL_DIR:-samples/mpt-8m}" exec $(BIN)/python score/openai_app.py --port $(OPENAI_PORT)

test: install ## Run the fast tests (two minutes): CPU, offline
	@$(PYTEST)

test-long: install ## Run tests with real servers, browsers, batch jobs, and GPU kernels in an interpreter (five minutes)
	@$(PYTEST) -m 'long and not slow and not gpu and not azure'

test-cpus: install ## Test kernels, quantization, model, sampling and engine as this and as older processors (five minutes)
	@$(BIN)/python tests/support/cpus.py -n 2

coverage: install ## Run the fast tests and report which lines of the package they run; htmlcov/ has the details
	@$(PYTEST) --cov=mptserve --cov-report=html --cov-report=term:skip-covered

test-all: install ## Run all tests, the slow ones included (half an hour)
	@$(PYTEST) -m 'not gpu and not azure'

check: install ## Check format, lint, types and generated docs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python tools/docs.py --check

check-specs: install ## Check the YAML in endpoint/ with Microsoft's loader and our rules; PATHS=my-folder checks yours
	@$(BIN)/mptserve check $(or $(PATHS),endpoint)

docs: install $(VENV)/.documented docs/notebooks/.run ## Run the notebooks and build the documentation into site/; broken links fail
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
$(VENV)/.documented: pyproject.toml constraints.txt
	@$(PIP) -e '.[docs]'
	@touch $@
docs/notebooks/.run: tools/notebooks.py $(wildcard notebooks/*.ipynb) | install
	@$(BIN)/python tools/notebooks.py
	@touch $@

format: install ## Reformat, apply lint fixes, update generated docs
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/python tools/docs.py

bench: $(VENV)/.installed ## Benchmark this machine: engine, transformers, server under load; ARGS=--quick takes a minute
	@$(BIN)/python benchmarks/cpu.py $(ARGS)

clean: ## Remove everything that make created
	rm -rf $(VENV) site htmlcov .coverage docs/notebooks .pytest_cache .mypy_cache .ruff_cache .hypothesis score/mptserve.egg-info
