#!/usr/bin/env bash
# Fetches the newest qemu-storage-daemon that Debian has for this release beside the installed one, for `make versus` to
# measure as well: from the release's backports, unpacked into target/peers. Installs nothing, and leaves apt's own
# sources and lists alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== versus-peers: qemu-storage-daemon of Debian's backports"
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || { echo "error: no $tool here: this is for Debian" >&2; exit 1; }
done
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[[ -n $release ]] || { echo "error: /etc/os-release has no VERSION_CODENAME" >&2; exit 1; }
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[[ -r $keyring ]] || { echo "error: $keyring is missing: apt-get install debian-archive-keyring" >&2; exit 1; }
# The one that apt is set up with, unless told otherwise.
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' "Codename: $release" | head -n 1)}
[[ -n $mirror ]] || { echo "error: apt knows no mirror of $release: apt-get update, or set DEBIAN_MIRROR" >&2; exit 1; }

work=$PWD/target/peers/apt
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
echo "deb [signed-by=$keyring] $mirror $release-backports main" >"$work/sources.list"
apt=(
    -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache"
    # Downloads as the user that runs this, who can write here.
    -o APT::Sandbox::User= -o Acquire::Retries=3
)
apt-get -q "${apt[@]}" update
(cd "$work" && rm -f -- *.deb && apt-get -q "${apt[@]}" download qemu-utils)
package=$(echo "$work"/qemu-utils_*.deb)
version=$(dpkg-deb -f "$package" Version)
directory=target/peers/qemu-${version//[^a-zA-Z0-9.+~-]/_}
rm -rf "$directory"
dpkg-deb -x "$package" "$directory"
program=$directory/usr/bin/qemu-storage-daemon
if ! said=$("$program" --version 2>&1); then
    echo "error: $program does not run: $said" >&2
    echo "       it needs: $(dpkg-deb -f "$package" Depends)" >&2
    rm -rf "$directory"
    exit 1
fi
echo "$program: ${said%%$'\n'*}"
