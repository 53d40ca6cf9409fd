#!/usr/bin/env bash
# All fuzz targets build. Needs a nightly toolchain, which cargo-fuzz asks for; installs cargo-fuzz if missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== fuzz-build: every target in fuzz/"
if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "error: cargo-fuzz needs a nightly toolchain; run: rustup toolchain install nightly" >&2
    exit 1
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
    cargo install cargo-fuzz --locked
fi
targets=$(cargo fuzz list)
[[ -n $targets ]] || { echo "error: fuzz/ has no targets" >&2; exit 1; }
# Its own workspace and profile, so its own directory: sharing one would only make each rebuild the other's.
cargo +nightly fuzz build
# Word splitting is wanted: one word a target.
# shellcheck disable=SC2086
printf 'built: %s\n' $targets
