# Everything is run from the checkout's own virtual environment; the lock decides every version.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUIETLY := --quiet --disable-pip-version-check

.PHONY: demo test check suite lock clean

demo: $(READY)  ## the main job: reinforcement learning on the default models
	$(BIN)/ouroboros ddpo --config configs/ddpo/digits.yaml --config configs/recipes/five-calls.yaml training.steps=25

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
# build of torch may need more than another) comes in the second step. What most processes import is imported once, by two
# side by side, so that it is compiled before many do it at a time; the rest is compiled where it is first needed.
PIPS = $$($(BIN)/pip config list | sed -nE "s/.*\.(find-links|index-url)='(.*)'/--\1=\2/p")
MODELS = diffusers.models.unets.unet_2d_condition diffusers.models.autoencoders.autoencoder_kl transformers.models.clip.modeling_clip \
  transformers.models.blip.modeling_blip sentence_transformers sklearn.cluster sklearn.mixture matplotlib.figure PIL.Image
SERVICES = mlflow mlflow.store.tracking.sqlalchemy_store mlflow.server.fastapi_app uvicorn.main ray.tune ray.dashboard.agent \
  ray._private.workers.default_worker ray.dashboard.dashboard scipy.stats pytest
IMPORT = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -W ignore -c 'import importlib, sys; [*map(importlib.import_module, sys.argv[1:])]'
INSTALL = $(BIN)/uv pip install --quiet --native-tls --python=$(BIN)/python $(PIPS)
$(READY): requirements.lock pyproject.toml
	@echo "making $(VENV): one to three minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(QUIETLY) $$(grep ^uv== requirements.lock)
	@$(INSTALL) --no-deps --requirement=requirements.lock || $(BIN)/pip install $(QUIETLY) --no-deps --requirement requirements.lock
	@$(INSTALL) --requirement=requirements.lock || $(BIN)/pip install $(QUIETLY) --requirement requirements.lock
	@$(IMPORT) $(MODELS) & $(IMPORT) $(SERVICES) & wait
	@$(BIN)/pip install $(QUIETLY) --no-deps --editable .
	@touch $(READY)
