#!/usr/bin/env bash
# All tests but those in a guest: for every save, on any machine with Rust.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== test-fast: workspace without guests"
cargo test --workspace --all-features --exclude blk-dataplane-cli
# Each bench once, quickly: so that they go on working. Times nothing.
echo "== test-fast: benches"
cargo test -q --workspace --all-features --exclude blk-dataplane-cli --bench '*'
# Every test target of the program but the one named guest.
tests=()
for file in blk-dataplane-cli/tests/*.rs blk-dataplane-cli/tests/*/main.rs; do
    [[ -e $file ]] || continue
    name=${file#blk-dataplane-cli/tests/}
    name=${name%.rs}
    name=${name%/main}
    [[ $name == guest ]] || tests+=(--test "$name")
done
cargo test -p blk-dataplane-cli --bins "${tests[@]}"
