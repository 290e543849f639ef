# Every target prepares .venv by itself, with uv, which pip installs there where none is on PATH: from requirements.lock
# what a training needs, from requirements-dev.lock also tests, trackers, sweeps and clusters; hashes checked.
# Arguments: make train ARGS="data=mnist model=lenet". Another Python: make train PYTHON=python3.12.

# Bytecode is compiled when packages are installed; this variable would leave the project itself without.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: help train example tracking-server test test-all test-exhaustive lint format lock install clean FORCE

PY := .venv/bin/python
UV := $(if $(shell command -v uv 2>/dev/null),uv,.venv/bin/uv)
# What tests need stays where it was installed once.
KIND := $(if $(wildcard .venv/.dev),dev,core)
COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
  --no-emit-index-url --no-emit-find-links --exclude-newer "7 days"
SUPPORTED := >=3.11,<3.14
CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
SAY := echo "boltlab needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' Makefile

train: .venv/.$(KIND) ## train; ARGS="data=mnist optimizer.lr=0.01" are Hydra overrides
	@$(PY) -m boltlab train $(ARGS)

# An example is a project of its own: it is trusted once it is installed editable, and its runs stand in its own logs/,
# where every verb that is called in its folder finds them.
EXAMPLES := $(patsubst examples/%/pyproject.toml,%,$(wildcard examples/*/pyproject.toml))
ONE := $(if $(word 2,$(TASK)),,$(filter $(EXAMPLES),$(TASK)))
example: $(if $(ONE),.venv/.$(KIND)) ## train one of examples/: TASK=gan; ARGS="trainer.max_epochs=5" as above
	@$(if $(ONE),,echo "make example TASK=…, one of: $(EXAMPLES)" >&2; exit 2)
	@$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable examples/$(TASK)
	@cd examples/$(TASK) && ../../$(PY) -m boltlab train experiment=$(TASK) $(ARGS)

# MLflow tells its makers what is used, unless these variables say otherwise. HOST=0.0.0.0 serves the whole network:
# there is no password, so put it behind something that asks for one.
HOST := 127.0.0.1
PORT := 5000
tracking-server: .venv/.dev ## serve and show the runs of logger=mlflow; PORT=5000 HOST=127.0.0.1
	@mkdir -p logs/mlflow
	@MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m mlflow server --host $(HOST) --port $(PORT) --workers 1 \
	  --backend-store-uri sqlite:///logs/mlflow.db --serve-artifacts --artifacts-destination logs/mlflow $(ARGS)

# Markers of what takes longer: pyproject.toml explains them.
QUICK := not (faults or slurm or services or slow or exhaustive)
PYTEST := $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal
test: .venv/.dev ## run the quick tests; ARGS="-k config -x" goes to pytest instead
	@$(PYTEST) $(or $(ARGS),-m "$(QUICK)" $(COVER))

test-all: ## run also what kills runs, starts servers, clusters and browsers, and check the coverage; half an hour
	@$(MAKE) --no-print-directory test COVER="--cov --cov-report= --cov-fail-under=0"
	@$(PYTEST) -m "not exhaustive and not ($(QUICK))" --cov --cov-append

test-exhaustive: .venv/.dev ## run the long matrices
	@$(PYTEST) -m exhaustive

lint: .venv/.dev ## check style and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m yamllint --no-warnings -d relaxed configs examples/*/configs .github .pre-commit-config.yaml
	@$(PY) -m mypy
	@.venv/bin/lint-imports

format: .venv/.dev ## put the code into style
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

lock: ## renew both locks (needs uv on PATH); ARGS="--upgrade-package wandb" leaves the rest as it is
	@command -v uv >/dev/null || { echo "make lock needs uv: python3 -m pip install uv" >&2; exit 1; }
# Nothing younger than a week: packages with malware are mostly found and withdrawn within days.
# deepspeed is left out: it is built from source, against the torch that is installed.
	$(COMPILE) $(addprefix --extra ,install timm photos tensorboard mlflow sweep slurm ray dev) \
	  --output-file requirements-dev.lock $(or $(ARGS),--upgrade) pyproject.toml
	$(COMPILE) --extra install --constraints requirements-dev.lock --output-file requirements.lock --upgrade pyproject.toml

install: .venv/.dev ## prepare .venv for everything; make train alone needs half of it

clean: ## remove .venv, caches and builds; runs and data sets stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist htmlcov .coverage* coverage.xml
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# .made: an environment of this folder, with uv where none is on PATH. It is missing while packages are being installed,
# so what was interrupted starts from nothing, and holds the folder's path: in a copied folder .venv would still run the
# code of the first one.
ifneq ($(shell cat .venv/.made 2>/dev/null),$(CURDIR))
.venv/.made: FORCE
endif
.venv/.made:
ifeq ($(UV),uv)
	@uv venv --quiet --clear --python "$(or $(PYTHON),$(SUPPORTED))" .venv && $(PY) -c '$(CHECK)' || { $(SAY); exit 1; }
else
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  "$$python" -c '$(CHECK)' 2>/dev/null && exec "$$python" -m venv --clear .venv; \
	done; $(SAY); exit 1
	@awk '/^[^ ]/ {p = /^uv==/} p' requirements.lock > .venv/uv.txt
	@$(PY) -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r .venv/uv.txt
endif
	@printf %s "$(CURDIR)" > $@

# .core and .dev: the packages of a lock and the project itself, editable, built with the locked hatchling; then whether
# the lock fits pyproject.toml.
.venv/.core: LOCK := requirements.lock
.venv/.dev: LOCK := requirements-dev.lock
.venv/.core: requirements.lock
.venv/.dev: requirements-dev.lock
.venv/.core .venv/.dev: .venv/.made pyproject.toml
	@rm -f .venv/.made && echo "Installing $(LOCK) into .venv"
	@$(UV) pip sync --python $(PY) --compile-bytecode --require-hashes --build-constraints $(LOCK) $(LOCK)
	@$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@$(UV) pip check --quiet --python $(PY) || { $(UV) pip check --python $(PY); echo "Run: make lock" >&2; exit 1; }
	@$(PY) -m compileall -q src
	@printf %s "$(CURDIR)" > .venv/.made && touch $@
FORCE:
