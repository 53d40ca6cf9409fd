#!/usr/bin/env bash
# Kills the program with SIGKILL under load, ROUNDS times (200 if not told), with split and packed rings in turn, and
# holds every block and every completion against what the guest knows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== soak: ${ROUNDS:=200} kills"
export ROUNDS
cargo test --release -p blk-dataplane-cli --test killed -- --nocapture
