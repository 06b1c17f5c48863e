# make bench   measure this machine: reference beside ditfast, each row with a parity tick
# make test    lint, types, tests
# make readme  the README's table, rendered from bench/results
# make sample  a grid of images of a tiny random model, on a CPU in seconds
# Both make the environment first, once; VENV=..., PYTHON=... and BENCH="--model DiT-B/4" are honoured.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.10,$(shell command -v $(name) 2>/dev/null)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.ditfast-env
BENCH ?=

.PHONY: env bench readme sample test lint kernels-oldest clean
.DEFAULT_GOAL := env

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.10-3.13 found; install one (e.g. python3.11) or give PYTHON=/path/to/python" >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: ditfast needs Python 3.10 or newer; $(PYTHON) is older" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments (no ensurepip);" \
		     "on Debian and Ubuntu: apt-get install $$(basename "$(PYTHON)")-venv" >&2; exit 1; }
	@# an environment that is there is brought up to date with the Python it was made with
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet -c constraints.txt pip setuptools wheel
	@# setuptools warns of folders named like the package; here they are the package
	PYTHONWARNINGS=ignore "$(BIN)/python" -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	@# tests/torchvision_stand_in.py says why without their requirements
	"$(BIN)/python" -m pip install --quiet --no-deps -c constraints.txt timm torch-fidelity
	@touch "$(STAMP)"

bench: env
	"$(BIN)/ditfast" bench $(BENCH)

# the README's table from the committed results
readme: env
	"$(BIN)/ditfast" bench readme README.md bench/results/*.json

sample: env
	"$(BIN)/python" examples/sample_tiny.py

# waiting threads sleep: tests start processes that would otherwise spin beside each other
test: lint
	OMP_WAIT_POLICY=PASSIVE "$(BIN)/python" -m pytest -q --durations=12

lint: env
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy ditfast

# the kernels once more with the oldest triton supported, beside the environment's own
kernels-oldest: env
	"$(BIN)/python" -m pip install --quiet --no-deps --upgrade --target "$(VENV)/triton-oldest" triton==3.6.0
	PYTHONPATH="$(VENV)/triton-oldest:." "$(BIN)/python" -m ditfast kernels

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
