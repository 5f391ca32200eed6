# `make demo` and `make test` install what they need, once; the stamp makes a second call free.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_DIR ?= runs/demo
PROOF_DIR ?= runs/proof
# Tests side by side, by file: many of them wait for processes that they start.
JOBS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A GPU may be there, but tests and demo are defined on the CPU.
CPU_ENV := DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1

.PHONY: help install demo test test-slow proof proof-vae proof-dit proof-tiers lint format wheel clean

help:
	@echo "make demo       train a video VAE and a DiT from nothing on two cores, sample and score them"
	@echo "make test       the tests: CPU, gloo, no network"
	@echo "make test-slow  the long proofs"
	@echo "make proof      what VAEs (proof-vae), a DiT (proof-dit) and small ones over seeds (proof-tiers)"
	@echo "                learn in CPU minutes; writes docs/proof"
	@echo "make lint       ruff and pyright"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Longtake needs Python >= 3.11; point PYTHON at one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(CPU_ENV) $(BIN)/python -m longtake.launch.demo --out $(DEMO_DIR)

test: $(STAMP)
	$(CPU_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(STAMP)
	$(CPU_ENV) $(BIN)/python -m pytest -m slow --timeout 3600

proof: proof-vae proof-dit proof-tiers

proof-vae proof-dit proof-tiers: proof-%: $(STAMP)
	$(CPU_ENV) $(BIN)/python -m tests.proof.proof_$* --out $(PROOF_DIR)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist longtake.egg-info
