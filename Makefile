# Every target prepares .venv by itself: from requirements.lock, hashes checked, by uv where it is on PATH and by pip
# where it is not. Arguments: make train ARGS="data=mnist model=lenet". Another Python: make train PYTHON=python3.12.

# Bytecode is compiled when packages are installed; this variable would leave the project itself without.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: help train tracking-server test test-exhaustive lint format lock install clean FORCE

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
UV := $(shell command -v uv 2>/dev/null)
SUPPORTED := >=3.11,<3.14
CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
SAY := echo "boltlab needs Python 3.11, 3.12 or 3.13: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-15s %s\n", $$1, $$2}' Makefile

train: .venv/.installed ## train; ARGS="data=mnist optimizer.lr=0.01" are Hydra overrides
	@$(PY) -m boltlab train $(ARGS)

# MLflow tells its makers what is used, unless these variables say otherwise. HOST=0.0.0.0 serves the whole network:
# there is no password, so put it behind something that asks for one.
HOST := 127.0.0.1
PORT := 5000
tracking-server: .venv/.installed ## serve and show the runs of logger=mlflow; PORT=5000 HOST=127.0.0.1
	@mkdir -p logs/mlflow
	@MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m mlflow server --host $(HOST) --port $(PORT) --workers 1 \
	  --backend-store-uri sqlite:///logs/mlflow.db --serve-artifacts --artifacts-destination logs/mlflow $(ARGS)

test: .venv/.installed ## run every test and check the coverage; ARGS="-k config -x" goes to pytest, without coverage
	@$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal $(or $(ARGS),--cov)

test-exhaustive: .venv/.installed ## run the long matrices: every plain module, loader and option, killed at every kind of place
	@$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal -m exhaustive $(ARGS)

lint: .venv/.installed ## check style and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m yamllint --no-warnings -d relaxed configs .github .pre-commit-config.yaml
	@$(PY) -m mypy

format: .venv/.installed ## put the code into style
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

lock: ## renew requirements.lock (needs uv); ARGS="--upgrade-package wandb" leaves the rest as it is
	@test -n "$(UV)" || { echo "make lock needs uv: python3 -m pip install uv" >&2; exit 1; }
# Nothing younger than a week: packages with malware are mostly found and withdrawn within days.
# deepspeed is left out: it is built from source, against the torch that is installed.
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  $(addprefix --extra ,timm photos tensorboard mlflow sweep slurm ray dev) \
	  --no-emit-index-url --no-emit-find-links --exclude-newer "7 days" --output-file requirements.lock \
	  $(or $(ARGS),--upgrade) pyproject.toml

install: .venv/.installed ## only prepare .venv

clean: ## remove .venv, caches and builds; runs and data sets stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist htmlcov .coverage* coverage.xml
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# .locked: the packages. It is missing while they are being installed, so what was interrupted starts from nothing.
# It holds the folder's path: in a copied folder .venv would still run the code of the first one.
ifneq ($(shell cat .venv/.locked 2>/dev/null),$(CURDIR))
.venv/.locked: FORCE
endif
.venv/.locked: requirements.lock
ifneq ($(UV),)
	@test "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" || \
	  uv venv --quiet --clear --python "$(or $(PYTHON),$(SUPPORTED))" .venv && $(PY) -c '$(CHECK)' || { $(SAY); exit 1; }
	@rm -f $@ && echo "Installing requirements.lock into .venv with uv"
	@uv pip sync --python $(PY) --compile-bytecode --require-hashes --build-constraints requirements.lock requirements.lock
else
	@test "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" || { \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    "$$python" -c '$(CHECK)' 2>/dev/null && exec "$$python" -m venv --clear .venv; \
	  done; $(SAY); exit 1; }
	@rm -f $@ && echo "Installing requirements.lock into .venv with pip (uv on PATH would be faster)"
# One package has no wheel: it is built with the locked setuptools, not with whatever is newest.
	@$(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip >/dev/null
	@awk '/^[^ ]/ {p = /^setuptools==/} p' requirements.lock > .venv/build.txt
	@$(PIP) install --quiet --require-hashes --no-deps -r .venv/build.txt
	@$(PIP) install --require-hashes --no-deps --no-build-isolation --use-pep517 -r requirements.lock
endif
	@printf %s "$(CURDIR)" > $@

# .installed: the project itself, editable, built with the locked hatchling; then whether the lock fits pyproject.toml.
.venv/.installed: .venv/.locked pyproject.toml
ifneq ($(UV),)
	@uv pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@uv pip check --quiet --python $(PY) || { uv pip check --python $(PY); echo "Run: make lock" >&2; exit 1; }
else
	@$(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip >/dev/null
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@$(PIP) check || { echo "Run: make lock" >&2; exit 1; }
endif
	@$(PY) -m compileall -q src
	@touch $@
FORCE:
