# Everything that the README says, as commands. `make help` lists them.

VENV ?= .venv
BIN := $(VENV)/bin
# The newest Python with a constraints file. Each is run, because a name may be there and not work
# (pyenv's shims) or lack venv (Debian's python3 without python3-venv).
PROBE := import sys; print("%d.%d" % sys.version_info[:2])
ifndef PYTHON
PYTHON := $(shell for python in python3.13 python3.12 python3.11 python3; do \
	version=$$($$python -c 'import ensurepip, venv; $(PROBE)' 2>/dev/null) && [ -f "constraints/py$$version.txt" ] && \
	echo $$python && break; done)
endif
# An environment that is there already keeps the Python that it was made with.
VERSION := $(shell $(or $(wildcard $(BIN)/python),$(PYTHON),false) -c '$(PROBE)' 2>/dev/null)
CONSTRAINTS := constraints/py$(or $(VERSION),-none).txt
RUN ?= runs/quickstart
STOP ?= 350
JOBS ?= 2
ARGS ?=

# XLA:CPU asks for its whole temporary memory anew at every step; huge pages make that cheap.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help setup train test bench lint goldens plans chaos soak clean

help:
	@echo "make train   install, train the quickstart, stop half-way, resume, sample, report ($(RUN))"
	@echo "make test    install everything and run the tests"
	@echo "make setup   only install: $(VENV) with everything the tests need"
	@echo "make bench   the benchmarks of docs/benchmarks.md (paired runs, one table each)"
	@echo "make lint    ruff and shellcheck"
	@echo "make plans   compile the stored plans that are missing or stale (1 to 4 CPU minutes each)"
	@echo "make chaos   eleven faults, each in a small run that must survive it (nine minutes)"
	@echo "make soak    the slow tests, every fault ten times, half an hour without a fault: hours;"
	@echo "             ARGS=tests/models runs the slow tests there, and nothing else"
	@echo "Variables: PYTHON=python3.12 VENV=.venv312 RUN=runs/x ARGS='--config.train.steps=200'"
	@echo "Python here: $(or $(VERSION),none that fits), with the versions of $(CONSTRAINTS)"

constraints/py%.txt:
	@echo "Torus needs Python 3.11, 3.12 or 3.13 with venv. Name one: make setup PYTHON=python3.12" >&2
	@exit 2

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Two stamps: training needs no test dependencies, and a newcomer should not wait for them.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[aot,dev]'
	@touch $@ $(VENV)/.installed

setup: $(VENV)/.installed-dev

train: $(VENV)/.installed
	$(BIN)/torus train --config=quickstart --workdir=$(RUN) --config.train.stop_at=$(STOP) $(ARGS)
	@echo "--- stopped half-way; the same command without stop_at resumes"
	$(BIN)/torus train --config=quickstart --workdir=$(RUN) $(ARGS)
	$(BIN)/torus eval $(RUN)
	$(BIN)/torus sample $(RUN) --prompt "def main(" --max-tokens 200
	$(BIN)/torus report $(RUN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.loader
	$(BIN)/python -m tests.benchmarks.step_cpu $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck tpu_scripts/*.sh tpu_scripts/*.sbatch

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --brief --out build/chaos.json $(ARGS)

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m soak $(ARGS)
ifeq ($(ARGS),)
	$(BIN)/python -m tests.chaos --seeds 10 --out build/chaos.json
	$(BIN)/python -m tests.chaos --minutes 30
	$(BIN)/python -m tests.network --seeds 5 --out build/network.json
endif

goldens: $(VENV)/.installed-dev
	TORUS_UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/configs

plans: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.plans $(ARGS)

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .hypothesis .ruff_cache
