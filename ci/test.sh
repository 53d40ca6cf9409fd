#!/usr/bin/env bash
# Every crate's tests on its own features, then all together with every feature, the guest tests last.
# Arguments go to the last cargo test: ci/test.sh -- --skip guest_
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Alone, as a user who depends on one crate builds it. Within the workspace cargo joins the features that the
# members ask of each other, which would hide one that a crate forgot to ask for itself.
# The program has no features and no dependents: the run of everything below is its own.
for crate in vring hostmem event-poll ioq iosched blk-dataplane; do
    echo "== test: $crate alone, default features"
    cargo test -q -p "$crate"
done

# Optimised, since in a debug build the threads meet too seldom: there a missing barrier goes unnoticed.
echo "== test: vring's barriers, release"
cargo test -q --release -p vring --test barriers

# Of the code as it is shipped, counted by valgrind: what each crate costs beside what it did (benches/instructions.txt),
# and vring beside virtio-queue.
echo "== test: instructions per request, release"
cargo test -q --release -p benches --test instructions

# Named, since a plain `cargo test` here means the default member, the program, alone.
echo "== test: workspace, all features"
cargo test --workspace --all-features "$@"

# Times nothing.
echo "== test: benches, each once and quickly"
cargo test -q --workspace --all-features --bench '*'
