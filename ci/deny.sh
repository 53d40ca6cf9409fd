#!/usr/bin/env bash
# Licences, sources, duplicate versions and known vulnerabilities of the dependencies (deny.toml).
# Not part of .ci/run: the list of vulnerabilities comes over the network and changes without a commit of ours.
# usage: ci/deny.sh [CHECK...]   (default: all; `bans licenses sources` need no network)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== deny: dependencies"
if ! cargo deny --version >/dev/null 2>&1; then
    echo "error: cargo-deny is not installed; run: cargo install cargo-deny --locked" >&2
    exit 1
fi
cargo deny --all-features check "$@"
