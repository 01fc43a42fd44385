PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check test-lowest clean

demo: $(VENV)/.installed  ## set up .venv and run the LangChain + Chroma example
	HF_HUB_OFFLINE=1 $(BIN)/python examples/rag_langchain_chroma.py

test: $(VENV)/.installed  ## set up .venv and run the test suite
	$(BIN)/python -m pytest

check: $(VENV)/.installed  ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test-lowest: .venv-lowest/.installed  ## run the suite on the lowest versions that pyproject.toml allows
	.venv-lowest/bin/python -m pytest

clean:  ## remove what the targets above made
	rm -rf $(VENV) .venv-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis examples/chroma

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "setting up $(VENV): some minutes, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

.venv-lowest/.installed: pyproject.toml
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  deps = p["dependencies"] + [d for extra in p["optional-dependencies"].values() for d in extra]; \
	  print("\n".join(d.replace(">=", "==") for d in deps if ">=" in d))' > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable ".[test,int8]"
	touch $@
