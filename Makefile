# Everything runs in .venv beside this file; constraints.txt holds the versions the tests ran with.
PYTHON ?= python3
MODEL ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# What is imported is compiled then; all that is installed would take half a minute.
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
FILES := pyproject.toml constraints.txt

export JAX_PLATFORMS ?= cpu
# The tests start a hundred processes. Where no bytecode may be kept, each compiles what it imports: 2 s more for JAX alone.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint clean

# The embedded demo, or with MODEL=codefuse-ai/F2LLM-v2-80M a released model.
demo: $(VENV)/.demo
	$(VENV)/bin/f2llm demo $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Say make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# pip needs no compiler here, and the progress of a large install is better seen than guessed: only the summary is hidden.
$(VENV)/.demo: $(VENV)/bin/python $(FILES)
	@echo "installing into $(VENV) (a minute or two) ..."
	$(INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python $(FILES)
	@echo "installing with test requirements into $(VENV) (a few minutes) ..."
	$(INSTALL) --editable '.[train,eval,test]'
	@touch $@ $(VENV)/.demo
