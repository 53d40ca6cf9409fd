#!/usr/bin/env bash
# The documentation builds without a warning: no broken link, nothing public undocumented.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
echo "== doc: cargo doc"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --all-features --no-deps
