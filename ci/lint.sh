#!/usr/bin/env bash
# Formatting, and clippy with every warning an error, on all targets and features.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== lint: rustfmt"
cargo fmt --all --check
echo "== lint: clippy"
cargo clippy --workspace --all-targets --all-features -- -D warnings
echo "== lint: clippy, default features"
cargo clippy --workspace --all-targets -- -D warnings
echo "== lint: shell scripts parse"
for script in ci/*.sh .ci/run; do
    bash -n "$script"
done
