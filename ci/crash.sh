#!/usr/bin/env bash
# Loses power under a simulated device, CRASH_ROUNDS rounds from seed CRASH_SEED on; each round is the same for the
# same seed. A plain test run does a few of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CRASH_ROUNDS=${CRASH_ROUNDS:-1000} CRASH_SEED=${CRASH_SEED:-1}
cargo test --release -p blk-dataplane --lib simulation -- --nocapture
