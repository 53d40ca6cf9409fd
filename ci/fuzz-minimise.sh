#!/usr/bin/env bash
# Makes the committed corpus of each target named anew, from itself and what fuzzing has found since: the fewest
# inputs that reach every edge, and as many of the others as there is room for, evenly from small to large, since
# mistakes hide between edges. More inputs may follow a target after a colon:
# ci/fuzz-minimise.sh vring_split mem_table:/tmp/found
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if (($# == 0)); then
    echo "usage: ci/fuzz-minimise.sh TARGET[:DIRECTORY]..." >&2
    exit 2
fi
# As tests/corpora.rs has them; and the largest input.
files_max=200 bytes_max=$((200 * 1024)) input_max=2048
count() { find "$1" -type f | wc -l; }
bytes() { find "$1" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'; }
for argument in "$@"; do
    target=${argument%%:*}
    corpus=fuzz/corpus/$target
    mkdir -p "$corpus"
    from=("$corpus")
    [[ -d fuzz/target/found/$target ]] && from+=("fuzz/target/found/$target")
    [[ $argument == *:* ]] && from+=("${argument#*:}")
    new=$(mktemp -d)
    cargo +nightly fuzz run "$target" "$new" "${from[@]}" -- \
        -merge=1 -set_cover_merge=1 -use_counters=0 -max_len=$input_max -timeout=120 -rss_limit_mb=4096
    files=$(count "$new") bytes=$(bytes "$new")
    if ((files == 0 || files > files_max || bytes > bytes_max)); then
        echo "error: $target: $files files of $bytes bytes in all, and the limits are $files_max and $bytes_max;" \
            "they are in $new" >&2
        exit 1
    fi
    # Names are hashes of the contents, so the order is the same whoever found them.
    mapfile -t others < <(find "${from[@]}" -type f -size -$((input_max + 1))c -printf '%s %f %p\n' | sort -n -k1,1 -k2,2)
    room=$((files_max - files))
    ((room > ${#others[@]})) && room=${#others[@]}
    for ((i = 0; i < room; i++)); do
        read -r size name path <<<"${others[i * ${#others[@]} / room]}"
        ((bytes + size > bytes_max)) && break
        [[ -e $new/$name ]] && continue
        cp "$path" "$new/$name"
        bytes=$((bytes + size))
    done
    find "$corpus" -type f -delete
    find "$new" -type f -exec cp -t "$corpus" {} +
    rm -r "$new"
    echo "== $target: $(count "$corpus") files, $(bytes "$corpus") bytes, of which $files reach every edge"
done
