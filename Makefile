# Every target does its own set-up: Python 3.11 or later, make and a package index are enough.
# All paths are relative, so that the checkout may lie anywhere, also below a name with spaces.

PYTHON ?= python3
# What the cluster in a box is made of, beyond the kernel: used by the tests marked "box".
# RETURNN, the caller in one of them, compiles a part of itself, as do large simulations.
BOX_PACKAGES = acl e2fsprogs fuse3 g++ iproute2 munge openssh-sftp-server python3-dev slurm-client \
    slurmctld slurmd sshfs xfsprogs
BOX_COMMANDS = c++ setfacl fusermount3 ip mkfs.ext4 mkfs.xfs munged sbatch slurmctld slurmd tc sshfs

# One process more than there are cores, since many tests wait most of the time. Each module stays in
# one process, for its fixtures. "make test TEST_PROCESSES=" for one process, whose output is in order.
TEST_PROCESSES ?= --numprocesses $(shell expr $$(nproc) + 1) --maxprocesses 4 --dist loadfile

APT_INSTALL = DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends
# Debian splits the means to make virtual environments off from Python.
INSTALL_VENV = { test "$$(id -u)" = 0 && apt-get update -qq && $(APT_INSTALL) python3-venv >/dev/null; }

.NOTPARALLEL:
.PHONY: help demo test check lint bench simulate box-packages clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

demo: .venv/.ready ## one real file through a swarm of four nodes on this machine
	.venv/bin/swarmcache demo

test: .venv/.ready box-packages ## the whole test suite; ARGS="-k name" for a part of it
	.venv/bin/python -m pytest $(TEST_PROCESSES) $(ARGS)

check: lint test ## what a change must pass: lint, then test

lint: .venv/.ready ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/.ready box-packages ## the benchmarks; each prints a ratio
	.venv/bin/python -m benchmarks $(ARGS)

simulate: .venv/.ready ## a flash crowd of 1,000 simulated nodes; ARGS="SCENARIO ..." for another
	.venv/bin/python -m simulations $(or $(ARGS),flash_crowd --nodes 1000 --size 1GiB --seed 1)

box-packages: ## the Debian packages that the tests marked "box" need (root only)
	@missing=; for command in $(BOX_COMMANDS); do \
	    command -v $$command >/dev/null || missing="$$missing $$command"; \
	done; \
	test -x /usr/lib/openssh/sftp-server || missing="$$missing sftp-server"; \
	include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	test -e "$$include/Python.h" || missing="$$missing Python.h"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "not installed:$$missing; tests marked box will be skipped"; exit 0; \
	fi; \
	apt-get update -qq && $(APT_INSTALL) $(BOX_PACKAGES) >/dev/null \
	    || echo "could not install:$$missing; tests marked box will be skipped"

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or later is needed; say which with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(INSTALL_VENV) \
	    || { echo "this Python lacks ensurepip; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
# The programs that an old pip writes import "re", which takes longer than to ask for a cached file.
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch .venv/.ready

clean: ## remove the virtual environment and everything generated
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
