# Each target is one script in ci/, which can as well be run by itself from any directory.

.PHONY: help test test-fast lint doc demo crash fuzz-build deny ci

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

fuzz-build: ## All fuzz targets
	@ci/fuzz-build.sh

deny: ## Licences, sources and vulnerabilities of the dependencies (needs the network)
	@ci/deny.sh

ci: ## What every change must pass
	@.ci/run
