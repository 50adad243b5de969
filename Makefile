# Every chore has a target; `make` alone lists them. All builds share the release profile, so that RocksDB is
# compiled once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export CARGO_TARGET_DIR ?= $(HOME)/.cache/leveret-target
export PATH := $(PATH):$(HOME)/.cargo/bin

DATA_DIR ?= $(or $(XDG_DATA_HOME),$(HOME)/.local/share)/leveret
CRASH_ROUNDS ?= 200
CRASH_FEATURE_ROUNDS ?= 50
POWER_CUTS ?= 200
SOAK_SECONDS ?= 3600
FUZZ_SECONDS ?= 600
DAMAGE_ROUNDS ?= 1000
ARGS ?=
RECORD ?=

RUST_NEEDED := 1.91
CARGO_FLAGS := --release --locked
BIN := $(CARGO_TARGET_DIR)/release/leveret

# $(call install,<packages>): the packages by apt-get, as root or through sudo.
define install
	if ! command -v apt-get >/dev/null; then
	    echo "Please install what these Debian packages hold, then try again: $(1)" >&2; exit 1
	fi
	as_root=
	if [ "$$(id -u)" -ne 0 ]; then
	    as_root=sudo
	    if ! command -v sudo >/dev/null; then
	        echo "Missing packages. As root: apt-get update && apt-get install --no-install-recommends $(1)" >&2; exit 1
	    fi
	fi
	echo "Installing $(1)"
	$$as_root apt-get update -q
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(1)
endef

.PHONY: help
help: ## List these targets
	@echo "Leveret: make <target>"
	sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|' 2>/dev/null \
	    || sed -n 's/^\([a-z-]*\):[^#]*## /  \1: /p' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: build ## Build and start a broker on port 5672 (ARGS="--port 5673", DATA_DIR=...)
	@mkdir -p '$(DATA_DIR)'
	exec '$(BIN)' --data-dir '$(DATA_DIR)' $(ARGS)

.PHONY: build
build: deps ## Build the program
	cargo build $(CARGO_FLAGS) --bin leveret

.PHONY: test
test: deps python-deps ## Everything that must pass: format, lints, tests, interop
	@failed=()
	for step in fmt-check lint unit interop; do
	    printf '\n== make %s\n' "$$step"
	    $(MAKE) "$$step" || failed+=("$$step")
	done
	echo
	if [ $${#failed[@]} -ne 0 ]; then echo "FAILED: $${failed[*]}"; exit 1; fi
	echo "PASSED: format, lints, tests, interop"

.PHONY: test-fast
test-fast: deps ## Unit tests and one integration test file (TEST=name), without interop
	cargo test $(CARGO_FLAGS) --lib
	$(if $(TEST),cargo test $(CARGO_FLAGS) --test '$(TEST)')

.PHONY: unit
unit: deps ## All Rust tests, among them short crash and power cut loops, and three minutes of mixed load
	cargo test $(CARGO_FLAGS) --no-run
	# Most of the mixed load's time is waiting, so it runs beside the others; among them it only has a few seconds.
	soak_log=$$(mktemp)
	trap 'rm -f "$$soak_log"' EXIT
	SOAK_SECONDS=180 cargo test $(CARGO_FLAGS) --test soak -- --nocapture >"$$soak_log" 2>&1 &
	soak=$$!
	failed=0
	cargo test $(CARGO_FLAGS) --no-fail-fast || failed=1
	wait "$$soak" || failed=1
	cat "$$soak_log"
	exit "$$failed"

.PHONY: interop
interop: build python-deps ## Stock clients against a fresh broker (or against AMQP_URL, if it is set)
	@if [ -n "$${AMQP_URL:-}" ]; then
	    interop/run.sh $(ARGS)
	else
	    tests/with_broker.sh interop/run.sh $(or $(ARGS),--ignore=test_trace.py)
	    # Tracing takes every publish off the fast path, so it is on for these files only.
	    $(if $(ARGS),exit 0)
	    LEVERET_TRACING_VHOSTS=/ TRACING=1 tests/with_broker.sh interop/run.sh test_trace.py test_publish.py test_consume.py
	fi

.PHONY: crash-test
crash-test: deps ## Kill the broker under load, again and again (CRASH_ROUNDS=200, CRASH_FEATURE_ROUNDS=50)
	CRASH_ROUNDS=$(CRASH_ROUNDS) cargo test $(CARGO_FLAGS) --test crash -- --nocapture
	CRASH_FEATURE_ROUNDS=$(CRASH_FEATURE_ROUNDS) cargo test $(CARGO_FLAGS) --test crash_features -- --nocapture

.PHONY: power-cut
power-cut: deps ## Power cuts under load: the broker is killed, and what it had not synced thrown away (POWER_CUTS=200)
	POWER_CUTS=$(POWER_CUTS) cargo test $(CARGO_FLAGS) --test power_cut -- --nocapture

.PHONY: soak
soak: deps ## An hour of mixed load: counts, memory, disk and log at its end (SOAK_SECONDS=3600)
	SOAK_SECONDS=$(SOAK_SECONDS) cargo test $(CARGO_FLAGS) --test soak -- --nocapture

.PHONY: damage
damage: deps ## Damage the files of a data directory, again and again (DAMAGE_ROUNDS=1000)
	DAMAGE_ROUNDS=$(DAMAGE_ROUNDS) cargo test $(CARGO_FLAGS) --test damage -- --nocapture

.PHONY: scale
scale: deps ## Millions of messages: rules of queues, streams, backlogs, starts, disk: order, rates, memory (an hour)
	SCALE=full cargo test $(CARGO_FLAGS) --no-fail-fast --test scale --test backlog -- --nocapture --test-threads 1

.PHONY: scale-long
scale-long: deps ## A hundred million messages in one queue
	SCALE=full BACKLOG=100000000 cargo test $(CARGO_FLAGS) --test backlog memory -- --nocapture --test-threads 1

.PHONY: fuzz
fuzz: deps ## Feed random frames, tables and properties to the parsers (FUZZ_SECONDS=600)
	FUZZ_SECONDS=$(FUZZ_SECONDS) cargo test $(CARGO_FLAGS) --test fuzz -- --nocapture

.PHONY: bench
bench: build ## Measure the hot functions, then Leveret beside RabbitMQ and the floor; writes the figures into the docs
	cargo bench --locked
	LEVERET_BIN='$(BIN)' python3 benches/matrix.py $(ARGS)

.PHONY: instructions
instructions: deps valgrind-deps ## Count the instructions of the hot functions; 3 % more than recorded fail (RECORD=1 records)
	@benches/instructions.sh $(if $(RECORD),--record) $(ARGS)

.PHONY: lint
lint: deps ## Clippy, every warning an error
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

.PHONY: fmt
fmt: deps ## Format the code
	cargo fmt

.PHONY: fmt-check
fmt-check: deps ## Say whether the code is formatted
	cargo fmt --check

.PHONY: clean
clean: ## Remove what was built; data directories stay
	rm -rf '$(CARGO_TARGET_DIR)'

# What a build needs: a C++ compiler and libclang for RocksDB, and a Rust toolchain, which stays the user's choice.
# (libclang-cpp.so, which comes with clang alone, is another library.)
.PHONY: deps
deps:
	@missing=()
	command -v g++ >/dev/null || missing+=(g++)
	command -v clang >/dev/null || missing+=(clang)
	if [ -z "$${LIBCLANG_PATH:-}" ] && ! compgen -G '/usr/lib/llvm-*/lib/libclang.so*' >/dev/null \
	    && ! compgen -G '/usr/lib*/libclang.so*' >/dev/null; then missing+=(libclang-dev); fi
	if [ -z "$${SSL_CERT_FILE:-}$${CARGO_HTTP_CAINFO:-}" ] && [ ! -d /etc/ssl/certs ]; then missing+=(ca-certificates); fi
	if [ $${#missing[@]} -ne 0 ]; then
	$(call install,$${missing[*]})
	fi
	if ! command -v cargo >/dev/null || ! command -v rustc >/dev/null; then
	    echo "Rust is missing. Install it with" >&2
	    echo "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" >&2
	    exit 1
	fi
	found=$$(rustc --version | cut -d' ' -f2)
	if [ "$$(printf '%s\n' $(RUST_NEEDED) "$$found" | sort -V | head -n1)" != $(RUST_NEEDED) ]; then
	    echo "Rust $$found is too old, $(RUST_NEEDED) is needed. Update it with: rustup update stable" >&2
	    exit 1
	fi

# Debian's python3 cannot make virtual environments without python3-venv.
.PHONY: python-deps
python-deps:
	@if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
	$(call install,python3 python3-venv)
	fi

.PHONY: valgrind-deps
valgrind-deps:
	@if ! command -v valgrind >/dev/null || ! command -v python3 >/dev/null; then
	$(call install,valgrind python3)
	fi
