#!/usr/bin/env bash
# This back-end and every peer that is installed, side by side, into docs/performance.md. Arguments go to the program:
# ci/versus.sh --help. Takes about 20 minutes; leave the machine alone meanwhile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== versus: build"
cargo build -q --release -p blk-dataplane-cli -p benches --bins

# What ci/versus-peers.sh has fetched, if it was run.
for program in target/peers/*/usr/bin/qemu-storage-daemon; do
    [[ -x $program ]] || continue
    QEMU_STORAGE_DAEMON=${QEMU_STORAGE_DAEMON:+$QEMU_STORAGE_DAEMON:}$PWD/$program
done
export QEMU_STORAGE_DAEMON=${QEMU_STORAGE_DAEMON:-}
[[ -n $QEMU_STORAGE_DAEMON ]] || unset QEMU_STORAGE_DAEMON

# Gigabytes of images: removed however this ends.
shm=$(mktemp -d /dev/shm/versus-XXXXXX)
disk=$(mktemp -d /var/tmp/versus-XXXXXX)
trap 'rm -rf "$shm" "$disk"' EXIT
trap 'exit 130' INT TERM
echo "== versus: measure"
target/release/versus --shm "$shm" --disk "$disk" "$@"
