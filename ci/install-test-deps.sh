#!/usr/bin/env bash
# Installs what the tests need beyond Rust, where it is missing. Does nothing on a machine that has it all.
# Without root or without apt-get it names exactly what to install and exits 1.
set -euo pipefail
echo "== install-test-deps: tools the end-to-end tests run"

# command:package that ships it in Debian and Ubuntu
needed=(
    qemu-system-x86_64:qemu-system-x86 # the machine the guest runs in
    qemu-storage-daemon:qemu-system-common # another back-end, for the load generator to measure
    fio:fio                            # copied into the guest: random writes, verified
    busybox:busybox-static             # the guest's userland, and cpio and depmod on the host
    mkfs.ext4:e2fsprogs                # copied into the guest; e2fsck checks the image on the host
    valgrind:valgrind                  # counts instructions, for the bar against virtio-queue
    strace:strace                      # shows that a flush reached the file
    dpkg-deb:dpkg                      # unpacks the guest's kernel
    dd:coreutils                       # copied into the guest: writes past its page cache
    flock:util-linux                   # two test programs may ask for the same files at once
    blkdiscard:util-linux              # copied into the guest: discards and zeroes
    fallocate:util-linux               # copied into the guest: zeroes that may give storage back
    lsblk:util-linux                   # copied into the guest: tells what the disk is like
    losetup:mount                      # a disk of 4096-byte blocks; needs root
)

# e2fsprogs lives in sbin, which is not on every user's path.
PATH=$PATH:/usr/sbin:/sbin

missing=()
for entry in "${needed[@]}"; do
    command -v "${entry%%:*}" >/dev/null || missing+=("${entry##*:}")
done
# A dynamically linked busybox would not run in the guest, which has no C library for it.
if [[ " ${missing[*]} " != *" busybox-static "* ]] && ldd "$(command -v busybox)" >/dev/null 2>&1; then
    missing+=(busybox-static)
fi

if [[ ${#missing[@]} -eq 0 ]]; then
    echo "nothing to install"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "error: the tests need these Debian packages, or your distribution's equivalent: ${missing[*]}" >&2
    echo "       and apt-get itself, to fetch the guest's kernel (see ci/guest-assets.sh)" >&2
    exit 1
fi
install=(apt-get install -y --no-install-recommends "${missing[@]}")
if [[ $EUID -ne 0 ]]; then
    echo "error: the tests need packages that only root may install; run:" >&2
    echo "       sudo ${install[*]}" >&2
    exit 1
fi

# Others may hold dpkg's lock for a while on a machine that has just booted.
apt=(-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
export DEBIAN_FRONTEND=noninteractive
echo "installing: ${missing[*]}"
if ! log=$(apt-get "${apt[@]}" update 2>&1 && "${install[@]}" "${apt[@]}" 2>&1); then
    printf '%s\n' "$log" >&2
    echo "error: apt-get could not install: ${missing[*]}" >&2
    exit 1
fi
for entry in "${needed[@]}"; do
    command -v "${entry%%:*}" >/dev/null || { echo "error: still no ${entry%%:*} after installing ${entry##*:}" >&2; exit 1; }
done
echo "installed"
