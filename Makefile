# make demo | make test | make test-fast | make lint | make bench-gpu      VENV=dir keeps the environment elsewhere, PYTHON=python3.12 chooses one
PYTHON ?= python3
VENV ?= .venv
override VENV := $(abspath $(VENV))
RUN := $(VENV)/bin/python

# An environment that runs is kept and brought up to date; the stamp's name says for which pins and which clone it is ready.
BASE := $(shell $(RUN) -c '' 2>/dev/null && echo '$(RUN)' || echo '$(PYTHON)')
KEY := $(shell { $(BASE) --version; echo '$(CURDIR)'; cat requirements.txt pyproject.toml; } 2>&1 | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready-$(KEY)

.PHONY: demo test test-fast lint bench-gpu env
demo: env
	$(RUN) main_pretrain.py --config-name all4one.yaml

# Two test processes of one thread each: torch otherwise takes every core for each of them.
test test-fast: export OMP_NUM_THREADS = 1
# Not as an environment may have it: every process would compile each file, and pytest rewrite each test, anew.
test test-fast: export PYTHONDONTWRITEBYTECODE =
# Many tests fork, and a fork copies the table of all pages: of huge ones, where the system gives them on request, it is short.
# Not for those that run alone: one counts kilobytes. They bound seconds, and mostly wait: three of them leave two cores time.
AT_ONCE := $(RUN) -m pytest --dist worksteal -n
TOGETHER := GLIBC_TUNABLES=$${GLIBC_TUNABLES:+$$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1 $(AT_ONCE) 2
test: env
	$(TOGETHER) -m "not alone" $(ARGS)
	$(AT_ONCE) 3 -m alone

test-fast: env
	$(TOGETHER) -m "not slow" $(ARGS)

# All that is measured on one GPU: make bench-gpu ARGS="--data cifar10.npz --tar images.tar --minutes 30"
# With RUN=python that interpreter runs it as it is: nothing is installed, for a machine without a network.
ifneq ($(origin RUN),command line)
bench-gpu: env
endif
bench-gpu:
	$(RUN) -m solo.bench gpu $(ARGS)

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m mypy

env: $(READY)

$(READY):
	@$(BASE) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	  || { echo "make: $(BASE) is not a Python 3.10 to 3.13: name one, e.g. make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 5; }
	@if [ '$(BASE)' != '$(RUN)' ]; then $(BASE) -m venv --clear '$(VENV)'; fi
	@echo "installing requirements.txt into $(VENV): a few minutes and about 6 GB the first time"
	@$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(RUN) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm -f '$(VENV)'/.ready-*; touch '$@'
