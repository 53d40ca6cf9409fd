#!/usr/bin/env bash
# Boots the test guest to a shell, with /dev/vda served by blk-dataplane.
# With commands on standard input (echo 'fdisk -l /dev/vda' | ci/demo.sh) it runs these and ends.
#
#   PROGRAM          the program to run (default: built from this tree, release)
#   DEMO_DIRECTORY   where image and socket go; the image stays from one demo to the next
#   GUEST_ACCEL      tcg (default) or kvm
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
directory=${DEMO_DIRECTORY:-$target/demo}
echo "== demo: a Linux guest on a disk of ours"

"$root/ci/install-test-deps.sh"
"$root/ci/guest-assets.sh" "$target/guest"
if [[ -z ${PROGRAM:-} ]]; then
    cargo build --release --manifest-path "$root/Cargo.toml" -p blk-dataplane-cli
    PROGRAM=$target/release/blk-dataplane
fi
mkdir -p "$directory"
image=$directory/disk.img
socket=$directory/disk.sock
initrd=$directory/initrd

backend=
# shellcheck disable=SC2317 # called by the trap
clean_up() {
    [[ -z $backend ]] || { kill "$backend" 2>/dev/null || true; wait "$backend" || echo "blk-dataplane exited with $?" >&2; }
    rm -f "$initrd"
}
trap clean_up EXIT

exec 3< <(exec "$PROGRAM" --blk-file "$image" --create 1G --socket-path "$socket" 2>"$directory/stderr")
backend=$!
if ! read -r -t 30 ready <&3 || [[ $ready != ready* ]]; then
    cat "$directory/stderr" >&2
    echo "error: $PROGRAM did not get ready" >&2
    exit 1
fi

cp "$target/guest/base.cpio" "$initrd"
if [[ -t 0 ]]; then
    echo "Booting to a shell: /dev/vda is $image. Leave with 'poweroff -f', or Ctrl-A X."
    console=(-chardev "stdio,id=console,mux=on,signal=off" -mon console)
else
    # The serial port would lose what comes before the guest listens, so commands go into the archive.
    mkdir -p "$directory/overlay"
    cat >"$directory/overlay/test.sh"
    (cd "$directory/overlay" && echo test.sh | busybox cpio -o -H newc 2>/dev/null) >>"$initrd"
    rm -r "$directory/overlay"
    console=(-chardev "stdio,id=console,signal=off")
fi
accel=(-accel "tcg,thread=multi")
[[ ${GUEST_ACCEL:-tcg} != kvm ]] || accel=(-accel kvm -cpu host)
qemu=(
    qemu-system-x86_64 "${accel[@]}" -nodefaults -no-user-config -display none -no-reboot -smp 2
    -machine "q35,memory-backend=mem" -m 1G
    # The memory must be shared, or the program cannot see the guest's requests.
    -object "memory-backend-memfd,id=mem,size=1G,share=on"
    -chardev "socket,id=disk,path=$socket" -device "vhost-user-blk-pci,chardev=disk,num-queues=2"
    -kernel "$target/guest/vmlinuz" -initrd "$initrd" -append "console=ttyS0 quiet panic=-1 no_timer_check"
    "${console[@]}" -serial chardev:console
)
if [[ -t 0 ]]; then
    "${qemu[@]}"
else
    "${qemu[@]}" </dev/null
fi
