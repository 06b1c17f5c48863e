# make bench   measure this machine: reference beside ditfast, each row with a parity tick
# make test    lint, types, tests; some 20 minutes on two cores
# make quick   lint, types, and of every room the tests that a change needs most; ROOM=ops for one room
# make test-long  the soaks and full matrices that make test leaves out
# make readme  the table of docs/benchmark.md, rendered from bench/results
# make sample  a grid of images of a tiny random model, on a CPU in seconds
# They make the environment first, once; VENV=..., PYTHON=... and BENCH="--model DiT-B/4" are honoured.
#
# With the software of a GPU machine, in an environment of its own (torch's CUDA build: several GB, a few minutes once):
# (no NVIDIA driver may be there: the first two put a stub in its place)
# make gpu-stack       the kernels launched on an H100 and an A100 that are not there, and the tests of torch.compile
# make rehearsal       the same for every architecture, dtype, width and token count; 40 minutes on two cores
# make kernels-oldest  every kernel compiled ahead of time by the oldest triton supported

VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.10,$(shell command -v $(name) 2>/dev/null)))
BIN := $(VENV)/bin
STAMP := $(VENV)/.ditfast-env
BENCH ?=

GPU_STACK ?= .gpu-stack
# a pyenv shim may stand for a version that is not chosen: what answers is taken
GPU_PYTHON ?= $(or $(shell for name in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python3.12; do \
	"$$name" -c '' 2>/dev/null && echo "$$name" && break; done),$(PYTHON))
GPU_STAMP := $(GPU_STACK)/.ditfast-env
# triton 3.6's interpreter fails with numpy 2.4 and newer, torch 2.11 refuses setuptools 82 and newer
GPU_PINS := torch==2.11.0 triton==3.6.0 numpy==2.3.5 setuptools==81.0.0
GPU_PACKAGES := safetensors typer rich hypothesis matplotlib pytest pytest-timeout pytest-xdist
# from the checkout, as on a machine where nothing is installed
IN_GPU_STACK := OMP_WAIT_POLICY=PASSIVE PYTHONPATH=. "$(GPU_STACK)/bin/python" -m

.PHONY: env bench readme sample test quick test-long lint gpu-stack rehearsal kernels-oldest clean
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

# the table of docs/benchmark.md from the committed results
readme: env
	"$(BIN)/ditfast" bench readme docs/benchmark.md bench/results/*.json

sample: env
	"$(BIN)/python" examples/sample_tiny.py

# waiting threads sleep: tests run side by side, and start processes that would otherwise spin beside each other
TESTS := OMP_WAIT_POLICY=PASSIVE "$(BIN)/python" -m pytest -q -n 2 --dist loadfile
test: lint
	$(TESTS) --durations=12

ROOM ?=
quick: lint
	$(TESTS) -m quick "tests/$(ROOM)"

test-long: env
	$(TESTS) --dist load -m long
	$(TESTS) --dist load -m rehearsal

lint: env
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m mypy -n 2 ditfast

$(GPU_STAMP): constraints.txt Makefile
	"$(GPU_STACK)/bin/python" -m pip --version >/dev/null 2>&1 || "$(GPU_PYTHON)" -m venv "$(GPU_STACK)"
	grep -vE '^(torch|triton|numpy|setuptools)==' constraints.txt > "$(GPU_STACK)/constraints.txt"
	"$(GPU_STACK)/bin/python" -m pip install --quiet -c "$(GPU_STACK)/constraints.txt" pip
	"$(GPU_STACK)/bin/python" -m pip install --quiet -c "$(GPU_STACK)/constraints.txt" $(GPU_PINS) $(GPU_PACKAGES)
	@touch "$(GPU_STAMP)"

gpu-stack: $(GPU_STAMP)
	$(IN_GPU_STACK) ditfast rehearse
	$(IN_GPU_STACK) pytest -q -n 2 -m rehearsal
	@# torch 2.11's DTensors know no Linear of what is split along the tokens
	$(IN_GPU_STACK) pytest -q -n 2 -k "compile and not two_processes"

rehearsal: $(GPU_STAMP)
	$(IN_GPU_STACK) ditfast rehearse --full

# an architecture in each of two processes
kernels-oldest: $(GPU_STAMP)
	$(IN_GPU_STACK) ditfast kernels --arch sm_80 & other=$$!; \
	$(IN_GPU_STACK) ditfast kernels --arch sm_90; status=$$?; wait $$other && exit $$status

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
