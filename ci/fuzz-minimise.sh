#!/usr/bin/env bash
# Makes the committed corpus of each target named anew, from itself and what fuzzing has found since: the fewest
# inputs that reach every edge. More directories to take inputs from may follow a target after a colon:
# ci/fuzz-minimise.sh vring_split mem_table:/tmp/found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# == 0)); then
    echo "usage: ci/fuzz-minimise.sh TARGET[:DIRECTORY]..." >&2
    exit 2
fi
# As tests/corpora.rs has them.
files_max=200 bytes_max=$((200 * 1024))
for argument in "$@"; do
    target=${argument%%:*}
    corpus=fuzz/corpus/$target
    from=("$corpus")
    [[ -d fuzz/target/found/$target ]] && from+=("fuzz/target/found/$target")
    [[ $argument == *:* ]] && from+=("${argument#*:}")
    mkdir -p "$corpus"
    fewest=$(mktemp -d)
    cargo +nightly fuzz run "$target" "$fewest" "${from[@]}" -- \
        -merge=1 -set_cover_merge=1 -use_counters=0 -max_len=2048 -timeout=120 -rss_limit_mb=4096
    files=$(find "$fewest" -type f | wc -l)
    bytes=$(find "$fewest" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')
    if ((files == 0 || files > files_max || bytes > bytes_max)); then
        echo "error: $target: $files files of $bytes bytes in all, and the limits are $files_max and $bytes_max;" \
            "they are in $fewest" >&2
        exit 1
    fi
    find "$corpus" -type f -delete
    find "$fewest" -type f -exec cp -t "$corpus" {} +
    rm -r "$fewest"
    echo "== $target: $files files, $bytes bytes"
done
