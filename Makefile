# Everything is run from the checkout's own virtual environment; the lock decides every version.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check suite lock clean

demo: $(READY)  ## the main job: reinforcement learning on the default models
	$(BIN)/ouroboros ddpo --config configs/ddpo/digits.yaml

test: $(READY)  ## every check that CI runs
	$(MAKE) --no-print-directory --jobs=2 check suite

check: $(READY)  ## style, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

suite: $(READY)  ## two files at a time: most of a test with Ray is waiting for processes
	$(BIN)/pytest --numprocesses=2 --dist=loadfile

lock: $(READY)  ## write requirements.lock from what is installed
	{ echo "# Written by 'make lock'; installed by 'make demo' and 'make test'."; \
	  $(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/; s/^torch @.*/torch==2.13.0/'; } > requirements.lock

# Rebuilt when a requirement changes, and only then.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(READY)
