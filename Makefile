# What a contributor runs. Every target installs what it needs first; the second time that is free.
#
#   make demo      build kernels for a small GGUF file, prove them, multiply with them
#   make test      formatting, types, and all tests but the slow ones
#   make test-all  all tests; first brings what they need: a browser, qemu, Oclgrind, node
#   make check     formatting, types, and whether generated/ is what the sources say

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# `make install SYSTEM_PACKAGES=no` leaves the system alone
SYSTEM_PACKAGES ?= yes

INSTALLED := $(VENV)/.installed
ALL_INSTALLED := $(VENV)/.all-installed
PYTEST := $(BIN)/python -m pytest -n 2

# the layer that speeds are quoted for: one row of activations, and many
BENCH_SHAPES := --shape 1x4096x14336 --shape 128x4096x14336
BENCH_FORMATS := $(foreach f,q2_K q3_K q4_0 q4_1 q4_K q5_0 q5_1 q5_K q6_K q8_0 iq4_nl mxfp4,--format $f)

.DEFAULT_GOAL := help
.PHONY: help install install-all demo lint types generated check test test-all bench format clean

help:
	@sed -n 's/^#   //p' Makefile

install: $(INSTALLED)

# kernelgen and all that tests and benchmarks need; the compiler is optional but faster than gcc
$(INSTALLED): pyproject.toml scripts/install_venv.sh scripts/debian_packages.sh
	@scripts/install_venv.sh $(PYTHON) $(VENV) dev,opencl,wgsl,triton,tune
ifeq ($(SYSTEM_PACKAGES),yes)
	@scripts/debian_packages.sh "another C compiler serves, somewhat slower" \
		clang-19 libomp-19-dev
	@scripts/debian_packages.sh "tests of WebGPU need another Vulkan driver" \
		libvulkan1 mesa-vulkan-drivers
endif
	@touch $@

install-all: $(ALL_INSTALLED)

# what the slow tests need besides; each says what is skipped without it
$(ALL_INSTALLED): $(INSTALLED) scripts/debian_packages.sh
ifeq ($(SYSTEM_PACKAGES),yes)
	@scripts/debian_packages.sh "tests of other instruction sets are skipped" \
		qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross libsimde-dev
	@scripts/debian_packages.sh "OpenCL kernels are not searched for races and stray reads" oclgrind
	@scripts/debian_packages.sh "no browser runs WGSL kernels" chromium
	@scripts/debian_packages.sh "studies that processes share in PostgreSQL are not tested" postgresql
	@command -v npm >/dev/null || scripts/debian_packages.sh \
		"Tint, the compiler of browsers, sees no WGSL kernel" nodejs npm
endif
	@touch $@

demo: install
	@$(BIN)/python -m kernelgen.demo

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/mypy

generated: install
	$(BIN)/kernelgen build --check

check: lint types generated

test: lint types
	$(PYTEST) -m "not slow"

test-all: check install-all
	$(PYTEST)

bench: install
	$(BIN)/kernelgen bench --target c $(BENCH_SHAPES) $(BENCH_FORMATS)

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# what was built and cached; the environment stays (rm -rf .venv to be rid of it)
clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
