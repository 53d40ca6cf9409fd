# Each target is one script in ci/, which can as well be run by itself from any directory.

.PHONY: help test test-fast lint doc demo crash soak versus versus-peers fuzz fuzz-build fuzz-replay deny ci

# How long `make fuzz` gives each target.
SECONDS ?= 60

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

test: ## All tests, those in a Linux guest included; installs what they need or says what to install
	@ci/install-test-deps.sh
	@ci/guest-assets.sh
	@ci/test.sh

test-fast: ## The tests that need no guest
	@ci/test-fast.sh

lint: ## rustfmt and clippy
	@ci/lint.sh

doc: ## The documentation, warnings denied
	@ci/doc.sh

demo: ## A Linux guest's shell, with /dev/vda served by blk-dataplane
	@ci/demo.sh

crash: ## Loss of power at ROUNDS times some 400 moments, all outcomes of each: make crash ROUNDS=1000 SEED=1
	@CRASH_ROUNDS=$(or $(ROUNDS),1000) CRASH_SEED=$(or $(SEED),1) ci/crash.sh

soak: ## SIGKILL to the program under load, ROUNDS times; each block and completion is checked: make soak ROUNDS=200
	@ROUNDS=$(or $(ROUNDS),200) ci/soak.sh

versus: ## This back-end and its peers side by side, into docs/performance.md: make versus ARGS='--rows null --rounds 3'
	@ci/versus.sh $(ARGS)

versus-peers: ## Fetches a newer qemu-storage-daemon for `make versus`, without installing it
	@ci/versus-peers.sh

fuzz: ## Runs each fuzz target for a minute, or as long as told: make fuzz SECONDS=1800
	@ci/fuzz.sh $(SECONDS)

fuzz-build: ## Builds all fuzz targets
	@ci/fuzz-build.sh

fuzz-replay: ## Every committed fuzz input, without the fuzzer
	@ci/fuzz-replay.sh

deny: ## Licences, sources and vulnerabilities of the dependencies (needs the network)
	@ci/deny.sh

ci: ## What every change must pass
	@.ci/run
