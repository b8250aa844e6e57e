# Everything runs in .venv, which the first target you call creates from nothing but python3.
# `make PYTHON=python3.12 test` builds it with another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# The targets for a machine with a GPU run in its own python, which has torch and triton.
# `make gpu GPU_PYTHON=.venv/bin/python GPU_RESULTS=/tmp/results` takes others; `make gpu INSTALL=1`
# installs this checkout there first.
GPU_PYTHON ?= python3
GPU_RESULTS ?= benchmarks/results
GPU_JOBS ?= 8
# Parts of the benchmarks, of loss, step, scaling, plan, accuracy; all of them where none is named.
GPU_PARTS ?=

.PHONY: help demo test lint bench kernels gpu gpu-install gpu-tests gpu-sanitizer gpu-bench clean

help:
	@echo "make demo   distil a student on real data; prints where its report is"
	@echo "make test   run the tests"
	@echo "make test-old  the same on the oldest versions that are supported, in .venv-2.11"
	@echo "make lint   ruff and mypy"
	@echo "make bench  speed, memory and accuracy beside the naive ops on this machine; BENCH=--quick for less"
	@echo "make kernels  compile every kernel for all generations of GPUs; prints what it takes"
	@echo "make gpu    on a machine with an NVIDIA GPU: tests, compute-sanitizer, benchmarks with results;"
	@echo "            each alone: make gpu-tests, gpu-sanitizer, gpu-bench"
	@echo "make clean  remove .venv, caches, builds and runs/"

demo: .venv/installed
	$(BIN)/fsp-distill study --restart configs/network-minimisation-digits.yaml

test: .venv/installed
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH)

kernels: .venv/installed
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.extension

# All parts run, whatever becomes of an earlier one; the whole fails if any does.
gpu: $(if $(INSTALL),gpu-install)
	@status=0; \
	for part in gpu-tests gpu-sanitizer gpu-bench; do \
		$(MAKE) --no-print-directory $$part || status=1; \
	done; \
	exit $$status

# In place, since all of this runs in the checkout; the CUDA extension for the GPU at hand alone.
gpu-install: export CUDAARCHS ?= native
gpu-install:
	$(GPU_PYTHON) -m pip install --no-build-isolation --no-deps --editable .

# Compiling kernels takes most of the time and one core each: files side by side.
gpu-tests:
	printf '%s\n' tests/fused/test_*.py tests/triton/test_*.py tests/cuda/test_*.py tests/distill/test_gpu.py | xargs -P $(GPU_JOBS) -n 1 $(GPU_PYTHON) -m pytest -m gpu -q -ra

gpu-sanitizer:
	$(GPU_PYTHON) -m benchmarks.sanitize

gpu-bench:
	$(GPU_PYTHON) -m benchmarks $(GPU_PARTS) --device cuda --layout nchw --pass forward+backward --output $(GPU_RESULTS)

clean:
	rm -rf .venv .venv-2.11 .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache build runs *.egg-info
	rm -f fsp_kernels/cuda_build.txt fsp_kernels/_cuda*.so

# Without the CUDA extension, even where there is an nvcc: it takes minutes to compile and a GPU to
# run, while the tests compile its sources for the host.
.venv/installed: export FSP_KERNELS_CUDA ?= 0
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

# The oldest PyTorch and Triton that are supported. Everything else is as new as these allow, so
# constraints.txt, which pins newer versions, has no part in it.
OLD_PYTHON ?= python3.12
OLD := .venv-2.11
# The interpreter of Triton 3.6 makes integers of arrays of one element, which NumPy 2.4 refuses.
OLD_VERSIONS := 'torch==2.11.*' 'triton==3.6.*' 'torchvision==0.26.*' 'numpy<2.4'

.PHONY: test-old

test-old: $(OLD)/installed
	$(OLD)/bin/python -m pytest -n auto --dist worksteal

$(OLD)/installed: export FSP_KERNELS_CUDA ?= 0
$(OLD)/installed: pyproject.toml
	test -x $(OLD)/bin/python || $(OLD_PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(OLD_VERSIONS) --editable '.[test]'
	touch $@
