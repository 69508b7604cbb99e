# `make help` lists the targets. Everything but `build` wants root.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

CARGO_TARGET_DIR ?= target
BIN := $(CARGO_TARGET_DIR)/release/vmafx-bypass
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
FUZZ_SECONDS ?= 60
export RCLONE_NEW := $(abspath $(CARGO_TARGET_DIR)/rclone-new/rclone)

.PHONY: help setup build static deb arm64 demo test test-vm test-unit torture soak mutants lint doc bench bench-tracker bench-exec bench-mount bench-scale bench-micro fuzz deny install uninstall build-lib install-lib header clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## install the Debian packages that are missing
	scripts/setup.sh

build: ## build the program, optimised
	cargo build --release --locked

static: ## build the program so that it needs the C library alone: target/static
	scripts/static.sh

deb: setup build ## make the Debian package: target/debian
	scripts/deb.sh

arm64: ## build the program for arm64; docs/INSTALL.md says what that needs
	scripts/arm64.sh build --release --locked

build-lib: ## build the library for C, shared and static, optimised
	cargo build --release --locked -p vmafx-bypass-capi

header: ## write the library's C header anew, after a change of capi/src/abi.rs
	WRITE_HEADER=1 cargo test --locked -p vmafx-bypass-capi --test header the_header

demo: setup build ## show all of it on an rclone mount that it starts itself
	scripts/demo.sh $(BIN)

test: setup lint doc ## set up, and run every test; as root
	scripts/test.py --locked
	scripts/test.py --locked --no-default-features --lib --bins --test cli
	scripts/test.py --locked -p vmafx-bypass-capi

test-vm: setup ## run tests under Debian's kernels, in QEMU: KERNEL=6.12 for one
	scripts/vm/run.py $(KERNEL)

# One test for as long as wanted; `make test` runs it for a minute.
DURATION ?= 30m
RCLONE ?= $(RCLONE_NEW)
torture: setup ## torture bypassed reads: DURATION=30m RCLONE=path beside PATH's
	TORTURE_SECONDS=$(DURATION) RCLONE_NEW=$(RCLONE) \
		cargo test --locked --test torture -- --nocapture bypassed_reads_are_fuses

soak: setup ## run `run` under stress, and see it stay as it is: DURATION=30m
	SOAK_SECONDS=$(DURATION) cargo test --locked --test soak -- --nocapture

test-unit: ## run the tests that need no root
	cargo test --locked --lib --bins --doc
	cargo test --locked --test cli
	cargo test --locked -p vmafx-bypass-capi --lib --test header

mutants: setup ## take each gate out, and see its tests fail; takes long
	scripts/mutants.py

lint: ## check format and lints
	cargo fmt --all --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --no-default-features -- -D warnings
	cargo clippy --locked -p vmafx-bypass-capi --all-targets -- -D warnings

doc: ## build the library's documentation, warnings denied
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --lib

bench: setup build ## measure on a generated clip
	$(BIN) bench --generate 100MiB

bench-tracker: setup ## measure what `run` costs: ARGS='--json FILE --rounds 31'
	cargo bench --locked --bench tracker -- $(ARGS)

bench-exec: setup ## measure what `exec` gains and costs: ARGS='--rounds 9'
	cargo bench --locked --bench exec -- $(ARGS)

bench-scale: setup ## measure how the cost grows: ARGS='--rounds 9'
	cargo bench --locked --bench scale -- $(ARGS)

bench-mount: setup ## measure what `mount` gains and costs: ARGS='--rounds 9'
	cargo bench --locked --bench mount -- $(ARGS)

bench-micro: ## measure the hot paths by size: ARGS='table' for a part
	cargo bench --locked --bench micro -- $(ARGS)

fuzz: ## fuzz each parser for FUZZ_SECONDS (needs cargo-fuzz and g++)
	for target in metadata fingerprint mountinfo handover; do mkdir -p fuzz/corpus/$$target && \
	    RUSTC_BOOTSTRAP=1 cargo fuzz run $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

deny: ## check licences, bans and sources of dependencies (needs cargo-deny)
	cargo deny --workspace --all-features check licenses bans sources

SHARE := $(DESTDIR)$(PREFIX)/share
BASH_COMPLETIONS := $(SHARE)/bash-completion/completions/vmafx-bypass
ZSH_COMPLETIONS := $(SHARE)/zsh/site-functions/_vmafx-bypass
FISH_COMPLETIONS := $(SHARE)/fish/vendor_completions.d/vmafx-bypass.fish

install: build ## install the program, its man pages and completions: DESTDIR, PREFIX
	install -D -m 755 $(BIN) $(DESTDIR)$(PREFIX)/bin/vmafx-bypass
	$(BIN) generate man $(SHARE)/man/man1
	mkdir -p $(dir $(BASH_COMPLETIONS) $(ZSH_COMPLETIONS) $(FISH_COMPLETIONS))
	$(BIN) generate completions bash >$(BASH_COMPLETIONS)
	$(BIN) generate completions zsh >$(ZSH_COMPLETIONS)
	$(BIN) generate completions fish >$(FISH_COMPLETIONS)

uninstall: ## remove what `install` installed, by the same DESTDIR and PREFIX
	rm -f $(DESTDIR)$(PREFIX)/bin/vmafx-bypass $(SHARE)/man/man1/vmafx-bypass.1 \
	    $(SHARE)/man/man1/vmafx-bypass-*.1 \
	    $(BASH_COMPLETIONS) $(ZSH_COMPLETIONS) $(FISH_COMPLETIONS)

install-lib: build-lib ## install the library for C: DESTDIR, PREFIX, LIBDIR
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' LIBDIR='$(LIBDIR)' \
		scripts/install-lib.sh $(CARGO_TARGET_DIR)/release

clean: ## remove what was built
	cargo clean
