#!/usr/bin/env bash
# Makes what the test guest boots from: a stock Debian cloud kernel and its initramfs archives. Nothing is installed.
# usage: guest-assets.sh [DIRECTORY]   (default: guest/ in cargo's target directory)
#
#   vmlinuz     kernel of the package that linux-image-cloud-amd64 stands for
#   base.cpio   busybox, virtio modules in load order, mkfs.ext4, e2fsck, GNU dd as gdd, /init, and util-linux's
#               blkdiscard, fallocate and lsblk in /usr/bin
#   fio.cpio    fio and its libraries, apart because they are fourteen times the rest and few tests need them
#
# The kernel unpacks archives that simply follow one another, so a test appends its own with /test.sh.
# Existing files are kept as long as this script, /init and the packages they come from are unchanged;
# remove the directory to move to a newer kernel.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-${CARGO_TARGET_DIR:-$root/target}/guest}
echo "== guest-assets: kernel and initramfs in $out"
PATH=$PATH:/usr/sbin:/sbin

mkdir -p "$out"
out=$(cd "$out" && pwd)
exec 9>"$out/.lock"
flock 9

meta=linux-image-cloud-amd64
# virtio_pci and virtio_blk: the device under test. loop: a file system inside a file.
modules=(virtio_pci virtio_blk loop)

stamp=$(
    cat "${BASH_SOURCE[0]}" "$root/ci/guest-init.sh" | sha256sum
    for tool in busybox fio mkfs.ext4 e2fsck dd blkdiscard fallocate lsblk; do
        sha256sum <"$(command -v "$tool")"
    done
)
if [[ -f $out/stamp && $(cat "$out/stamp") == "$stamp" ]]; then
    echo "up to date: kernel $(cat "$out/kernel-version")"
    exit 0
fi
rm -f "$out/stamp"

work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# --- kernel
# Root's downloads run as user _apt, which may not write here; as another user there is no such step.
apt=(-o APT::Sandbox::User=root -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
resolve() { apt-cache depends "$meta" 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }'; }
download() { (cd "$work" && apt-get "${apt[@]}" -q download "$1"); }

if ! command -v apt-get >/dev/null; then
    echo "error: fetching the guest's kernel needs apt-get (Debian or Ubuntu with Debian's archive)" >&2
    exit 1
fi
package=$(resolve)
# Package lists are absent in a fresh container, and point to a replaced file once they are old.
if [[ -z $package ]] || ! download "$package" >"$work/download.log" 2>&1; then
    if [[ $EUID -ne 0 ]]; then
        cat "$work/download.log" >&2 2>/dev/null || true
        echo "error: no package list offers a downloadable $meta; run: sudo apt-get update" >&2
        exit 1
    fi
    apt-get "${apt[@]}" -q update >"$work/update.log" 2>&1 || { cat "$work/update.log" >&2; exit 1; }
    package=$(resolve)
    [[ -n $package ]] || { echo "error: apt-get knows no $meta: is this Debian on amd64?" >&2; exit 1; }
    download "$package" >"$work/download.log" 2>&1 || { cat "$work/download.log" >&2; exit 1; }
fi
dpkg-deb -x "$work"/linux-image-*.deb "$work/kernel"
release=$(basename "$work"/kernel/boot/vmlinuz-*)
release=${release#vmlinuz-}
# Where /lib is a link to usr/lib the package has its modules under usr.
tree=$work/kernel
[[ -d $tree/lib/modules/$release ]] || tree=$work/kernel/usr
[[ -d $tree/lib/modules/$release ]] || { echo "error: $package holds no modules" >&2; exit 1; }

# --- base archive
base=$work/base
mkdir -p "$base"/{bin,usr/bin,usr/sbin,sbin,dev,proc,sys,etc,lib/modules}
cp "$root/ci/guest-init.sh" "$base/init"
chmod 755 "$base/init"
cp "$(command -v busybox)" "$base/bin/busybox"
for applet in $("$base/bin/busybox" --list); do
    [[ $applet == busybox ]] || ln -s /bin/busybox "$base/bin/$applet"
done

# Debian's package is indexed at installation, so do what that would do. Paths in modules.dep: "a.ko: b.ko c.ko".
busybox depmod -b "$tree" "$release"
dep=$tree/lib/modules/$release/modules.dep
# Prints a module's dependencies before it, each module once.
declare -A listed=()
list_module() {
    local path=$1 dependency
    [[ -z ${listed[$path]:-} ]] || return 0
    listed[$path]=1
    # shellcheck disable=SC2013 # words are wanted: one line lists them all
    for dependency in $(awk -F: -v path="$path" '$1 == path { print $2 }' "$dep"); do
        list_module "$dependency"
    done
    printf '%s\n' "$path"
}
for name in "${modules[@]}"; do
    # File names carry - or _ at whim, and may be compressed.
    path=$(cut -d: -f1 "$dep" | awk -F/ -v name="$name" '{ file = $NF; sub(/\.ko.*/, "", file); gsub(/-/, "_", file); if (file == name) print }')
    if [[ -n $path ]]; then
        list_module "$path"
    elif ! grep -qE "/${name//_/[-_]}\.ko" "$tree/lib/modules/$release/modules.builtin"; then
        echo "error: $package has no module $name" >&2
        exit 1
    fi
done >"$work/order"
: >"$base/lib/modules/order"
while read -r path; do
    file=$(basename "$path")
    case $file in
        *.xz) xz -dc "$tree/lib/modules/$release/$path" >"$base/lib/modules/${file%.xz}" ;;
        *.zst) zstd -qdc "$tree/lib/modules/$release/$path" >"$base/lib/modules/${file%.zst}" ;;
        *) cp "$tree/lib/modules/$release/$path" "$base/lib/modules/" ;;
    esac
    file=${file%.xz}
    echo "${file%.zst}" >>"$base/lib/modules/order"
done <"$work/order"

# Copies a program to the same place under $2 with every library it is linked to, under the names it asks for.
copy_program() {
    local program library
    program=$(command -v "$1")
    mkdir -p "$2/usr/bin"
    cp -L "$program" "$2/usr/bin/$1"
    for library in $(ldd "$program" | grep -o '/[^ ]*'); do
        # A library the base archive has already is not packed again.
        [[ -e $base$library ]] && continue
        mkdir -p "$2$(dirname "$library")"
        cp -L "$library" "$2$library"
    done
}
copy_program mkfs.ext4 "$base"
copy_program e2fsck "$base"
# busybox's dd takes oflag=direct and writes through the page cache all the same; and its shell prefers
# busybox's own programs to any of the same name.
copy_program dd "$base"
mv "$base/usr/bin/dd" "$base/usr/bin/gdd"
# busybox's blkdiscard has no -z, its fallocate no -p, and it has no lsblk. Called by path, for the same reason.
copy_program blkdiscard "$base"
copy_program fallocate "$base"
copy_program lsblk "$base"
copy_program fio "$work/fio"

# Not compressed: under TCG unpacking costs more than copying, and the file never leaves this machine.
pack() { (cd "$1" && find . | sort | busybox cpio -o -H newc -R 0:0) >"$2" 2>"$work/cpio.log" || { cat "$work/cpio.log" >&2; exit 1; }; }
pack "$base" "$work/base.cpio"
pack "$work/fio" "$work/fio.cpio"

mv "$work/base.cpio" "$work/fio.cpio" "$out/"
cp "$work/kernel/boot/vmlinuz-$release" "$out/vmlinuz"
echo "$release" >"$out/kernel-version"
# Last: only a complete set is ever taken for up to date.
printf '%s\n' "$stamp" >"$out/stamp"
echo "made: kernel $release, base $(du -h "$out/base.cpio" | cut -f1), fio $(du -h "$out/fio.cpio" | cut -f1)"
