# The front door. `make` says what there is. Everything installs what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help system-packages demo test test-full explore sim sim-mutants lint bench sixteen clean

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
FULL_MINUTES ?= 60
ROUNDS ?= 5
SEEDS ?= 1000
START ?= 0
MINUTES ?= 10
SEED ?= $(shell shuf -i 1-999999 -n 1)

# Build: what the native extension and pyfuse3 compile against. Run: mount, target, guest, workloads.
BUILD_PACKAGES := gcc pkg-config python3-dev python3-venv libiscsi-dev libfuse3-dev \
	libssl-dev
RUN_PACKAGES := fuse3 tgt fio qemu-system-x86 qemu-utils sqlite3 attr acl procps util-linux \
	git e2fsprogs busybox-static cpio syslinux syslinux-common mtools dosfstools systemd

help: ## say what there is (this)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

system-packages:
	@missing=$$(for package in $(BUILD_PACKAGES) $(RUN_PACKAGES); do \
	    dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || echo $$package; \
	done); \
	if [ -n "$$missing" ]; then \
	    echo "Installing Debian packages:" $$missing; \
	    log=$$(mktemp); \
	    { $(SUDO) apt-get update && \
	      $(SUDO) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
	          apt-get install -y --no-install-recommends $$missing; } >$$log 2>&1 || \
	        { tail -n 30 $$log; echo "apt-get failed; its whole output is in $$log"; exit 1; }; \
	    rm -f $$log; \
	fi

$(VENV)/.installed: pyproject.toml setup.py $(wildcard redirector/native/*.c redirector/native/*.h redirector/native/*.pyx) | system-packages
	@echo "Installing csvfs and its development tools into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed ## three hosts, one LUN: guests, one host frozen, one without power, verify
	@$(SUDO) $(BIN)/python -m tools.demo

test: lint ## lint, then every test that is quick (10 minutes at most)
	$(SUDO) $(BIN)/python -m pytest -q -m "not full" -n 3 --dist loadfile

test-full: $(VENV)/.installed ## the long tests, in random order, FULL_MINUTES=60 at most, SEED=...
	$(SUDO) $(BIN)/python -m pytest -q -m full --shuffle=$(SEED) --minutes=$(FULL_MINUTES)

explore: $(VENV)/.installed ## property tests with new examples, ROUNDS=5 times
	for round in $$(seq $(ROUNDS)); do \
	    $(SUDO) $(BIN)/python -m pytest -q -m "not full" -n 2 --explore || exit 1; \
	done

sim: $(VENV)/.installed ## whole clusters in simulation, one a seed, with a summary: SEEDS=1000, START=0
	$(BIN)/python -m tests.sim --seeds $(SEEDS) --start $(START)

sim-mutants: $(VENV)/.installed ## mistakes made on purpose: each must be found within SEEDS=1000
	$(BIN)/python -m tests.sim --mutants --seeds $(SEEDS) --start $(START)

lint: $(VENV)/.installed ## ruff, ruff format, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed ## the mount beside the raw LUN: a table and benchmarks/results/latest.json
	$(SUDO) $(BIN)/python -m benchmarks

sixteen: $(VENV)/.installed ## 16 hosts on this machine, all processors busy for MINUTES=10: nobody may be lost
	$(SUDO) $(BIN)/python -m benchmarks.sixteen --minutes $(MINUTES)

clean: ## remove what was built here
	$(SUDO) rm -rf $(VENV) build *.egg-info redirector/native/_native.c redirector/native/*.so \
	    .mypy_cache .ruff_cache .pytest_cache .hypothesis
	$(SUDO) find . -name __pycache__ -prune -exec rm -rf {} +
