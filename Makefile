# `make help` lists the targets. Everything is installed into a virtual environment inside the checkout.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= 2
# A file's tests share a worker: what they set up together is set up once.
XDIST := -n $(WORKERS) --dist loadfile

# `make test-compat TRANSFORMERS=4.57.6`: CPU only, one version of transformers, no torchvision, and peft as the only optional package.
TRANSFORMERS ?= 4.57.6
COMPAT_TORCH ?= 2.13.0
COMPAT_VENV := .venv-$(TRANSFORMERS)
# What older versions of transformers may do differently: models, processors, loading, generation, and what is written
# for others to load. The rest takes nothing of transformers (reading data, metrics, options, documents, files), or
# needs training, which wants newer versions than these.
COMPAT := $(addprefix tests/,modeling inference convert publish profiling evaluation/test_batches.py \
	demo/test_chat_session.py cli/test_commands.py)
# Of the slow ones, those where transformers loads and serves what we write.
COMPAT_SLOW := $(addprefix tests/,modeling/test_remote_code.py modeling/test_hub_loading.py modeling/test_serve.py \
	convert/test_checkpoint.py convert/test_hub_ids.py)

# lmms-eval brings sixty packages, so it gets an environment of its own, over the one with the test tools.
LMMS_EVAL_VENV := .venv-lmms-eval

BIN := $(VENV)/bin
# Compiling all of torch while installing takes longer than compiling what is imported.
PIP := -m pip --disable-pip-version-check --no-input install --quiet --no-compile
# What is imported is compiled once, and not in each of hundreds of processes, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help quickstart test test-slow test-miniature test-lmms-eval test-compat gpu gpu-bundle docs style format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed ## install, then make, train and evaluate a miniature ConvLLaVA: about ten minutes
	$(BIN)/convllava quickstart

test: $(VENV)/.installed-dev ## install with the test tools and run the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) -m 'not slow and not miniature' $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-dev ## the tests that take longer: servers, killed runs, several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST) -m slow $(PYTEST_ARGS)

test-miniature: $(VENV)/.installed-dev ## train a miniature model through all stages, and ask it: about four minutes
	$(BIN)/python -m pytest -m miniature $(PYTEST_ARGS)

test-lmms-eval: $(LMMS_EVAL_VENV)/.installed ## the tests against lmms-eval: its metrics, and its command with our model
	OMP_NUM_THREADS=1 $(LMMS_EVAL_VENV)/bin/python -m pytest tests/evaluation/test_lmms_eval_*.py $(PYTEST_ARGS)

# The slow ones talk to a fake Hub, whose address older versions of huggingface-hub read when they are imported: no forks.
test-compat: $(COMPAT_VENV)/.installed-compat ## the tests on one version of transformers: TRANSFORMERS=4.57.6
	OMP_NUM_THREADS=1 $(COMPAT_VENV)/bin/python -m pytest $(XDIST) -m 'not slow' $(COMPAT) $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 CONVLLAVA_TESTS_FRESH_PROCESSES=1 $(COMPAT_VENV)/bin/python -m pytest $(XDIST) -m slow $(COMPAT_SLOW) $(PYTEST_ARGS)

# With a bundle there is nothing to install first: an environment is made from it, over the interpreter's own packages.
gpu: $(if $(findstring --bundle,$(ARGS)),,$(VENV)/.installed-dev) ## test and measure on a GPU, in eight minutes; without one, ARGS=--tiny rehearses it
	$(if $(findstring --bundle,$(ARGS)),$(PYTHON),$(BIN)/python) benchmarks/gpu.py $(ARGS)

gpu-bundle: ## collect the packages that a GPU machine without a network lacks
	$(PYTHON) benchmarks/gpu_jobs/bundle.py gpu-bundle $(ARGS)

# The variable silences mkdocs-material's note about its successor.
docs: $(VENV)/.installed-dev ## build the documentation into build/site, and refuse broken links and names
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

style: $(VENV)/.installed-dev ## lint, and check the formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## fix what the linter and the formatter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed-dev ## build the wheel, and use it without the checkout
	rm -rf dist build
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python $(PIP) --no-deps --target build/wheel dist/*.whl
	cd build && $(abspath $(BIN))/python $(CURDIR)/tests/check_wheel.py wheel

clean: ## remove what the targets made, environments included
	rm -rf $(VENV) .venv-* build dist quickstart findings .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an environment is made again when pyproject.toml is newer.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --editable '.[quickstart]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --editable '.[dev]'
	touch $(VENV)/.installed $@

$(COMPAT_VENV)/.installed-compat: pyproject.toml
	$(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python $(PIP) torch==$(COMPAT_TORCH) transformers==$(TRANSFORMERS) pytest pytest-xdist peft --editable .
	touch $@

$(LMMS_EVAL_VENV)/.installed: pyproject.toml $(VENV)/.installed-dev
	rm -rf $(LMMS_EVAL_VENV)
	$(BIN)/python -m venv $(LMMS_EVAL_VENV)
	folder=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$folder')" > \
		"$$($(LMMS_EVAL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/over.pth"
	$(LMMS_EVAL_VENV)/bin/python $(PIP) --editable '.[lmms-eval]'
	touch $@
