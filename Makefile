# Everything the README promises. PYTHON is the interpreter the virtual environment is made with;
# set VENV to an existing environment to use the torch that is already there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.tca_fast

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/tca-fast demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first: setup.py and deepspeed look for it when they are installed, and a torch
# that is already there is kept if it fits.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[deepspeed,test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info tca_fast/*.so
