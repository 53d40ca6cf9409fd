#!/usr/bin/env bash
# Unit and integration tests of the packages named (default: those with unsafe code around guest memory) under
# AddressSanitizer, and that it is awake: mistakes planted in hostmem's and ioq's tests must be reported.
# Needs a nightly toolchain. Not under it: models run by loom, which switches stacks by itself, and doc tests.
# usage: ci/asan.sh [PACKAGE...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
packages=("$@")
[[ $# -gt 0 ]] || packages=(hostmem ioq)
if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "error: AddressSanitizer needs a nightly toolchain; run: rustup toolchain install nightly" >&2
    exit 1
fi
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
export RUSTFLAGS="-Zsanitizer=address -Cforce-frame-pointers=yes"
# Its own directory: flags differ from every other build's. With --target, so that build scripts have no sanitizer.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/target}/asan"
# The tests that send SIGBUS look at how the process ends; without a handler of the sanitizer's it ends as usual.
export ASAN_OPTIONS="handle_sigbus=0:detect_stack_use_after_return=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}"

asan() { cargo +nightly test -q --target "$host" "$@"; }

for package in "${packages[@]}"; do
    echo "== asan: $package"
    targets=()
    [[ -f $package/Cargo.toml ]] || { echo "error: no package $package" >&2; exit 1; }
    for test in "$package"/tests/*; do
        name=$(basename "$test" .rs)
        [[ $name != models && ( -f $test && $test == *.rs || -f $test/main.rs ) ]] || continue
        targets+=(--test "$name")
    done
    (
        # Instead of 256: threads are dear under the sanitizer, and ioq's random tests start many.
        [[ $package != ioq ]] || export PROPTEST_CASES=64
        asan -p "$package" --all-features --lib "${targets[@]}"
    )
done

# $1: package, $2: its test file, $3: a planted test in it, $4: what the report must say.
planted() {
    echo "== asan: $3 is found"
    local log status=0
    log=$(asan -p "$1" --test "$2" -- --ignored --exact "$3" 2>&1) || status=$?
    if [[ $status -eq 0 ]] || ! grep -q "ERROR: AddressSanitizer: $4" <<<"$log"; then
        printf '%s\n' "$log" >&2
        echo "error: AddressSanitizer did not report $4 (exit code $status)" >&2
        exit 1
    fi
}
planted hostmem in_use planted_use_of_a_freed_region heap-use-after-free
planted hostmem in_use planted_use_of_an_unmapped_region SEGV
planted ioq teardown planted_buffer_freed_before_its_read_completes heap-use-after-free
