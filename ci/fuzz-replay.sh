#!/usr/bin/env bash
# The fuzz targets' own code: formatting, clippy, and every committed input against its oracle, without the fuzzer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../fuzz"
echo "== fuzz-replay: rustfmt and clippy"
cargo fmt --check
cargo clippy --all-targets -- -D warnings
echo "== fuzz-replay: the committed corpora"
cargo test -q
