# Everything is run from the checkout's own virtual environment; the lock decides every version.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUIETLY := --quiet --disable-pip-version-check

.PHONY: demo test check suite lock clean

demo: $(READY)  ## the main job: reinforcement learning on the default models
	$(BIN)/ouroboros ddpo --config configs/ddpo/digits.yaml

test: $(READY)  ## every check that CI runs
	@began=$$(date +%s) && $(MAKE) --no-print-directory --jobs=2 check suite && echo "tests: $$(($$(date +%s) - began)) s"

check: $(READY)  ## style, layers and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

suite: $(READY)  ## three files at a time on two cores: most of a test with Ray is waiting for processes, which need not compile all of this anew
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

lock: $(READY)  ## write requirements.lock from what is installed
	{ echo "# Written by 'make lock'; installed by 'make demo' and 'make test'."; \
	  $(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/; s/^torch @.*/torch==2.13.0/'; } > requirements.lock

# uv unpacks in seconds what takes pip minutes. It is given pip's settings, as it has others of its own; where it fails, pip
# does it. Rebuilt when a requirement changes, and only then. What the lock leaves out (pip freezes no setuptools, and a
# build of torch may need more than another) comes in the second step. Of what is RARE, a process compiles what it needs.
PIPS = $$($(BIN)/pip config list | sed -nE "s/.*\.(find-links|index-url)='(.*)'/--\1=\2/p")
RARE = /(tests|testing|sympy|databricks|selenium|networkx|torchmetrics|fontTools|pip|transformers/models|diffusers/pipelines)/
INSTALL = $(BIN)/uv pip install --quiet --native-tls --python=$(BIN)/python $(PIPS)
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(QUIETLY) $$(grep ^uv== requirements.lock)
	$(INSTALL) --no-deps --requirement=requirements.lock || $(BIN)/pip install $(QUIETLY) --no-deps --requirement requirements.lock
	$(INSTALL) --requirement=requirements.lock || $(BIN)/pip install $(QUIETLY) --requirement requirements.lock
	$(BIN)/python -m compileall -q -j 2 -x '$(RARE)' $(VENV)/lib/python*/site-packages || true  # some packages ship old templates
	$(BIN)/pip install $(QUIETLY) --no-deps --editable .
	touch $(READY)
