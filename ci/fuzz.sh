#!/usr/bin/env bash
# Every fuzz target that there is, or those named, for so many seconds each: ci/fuzz.sh [SECONDS [TARGET...]]
# Starts from the committed corpus. What adds coverage is kept in fuzz/target/found/TARGET, which git ignores, for
# the next run; ci/fuzz-minimise.sh makes corpus of it. Prints the command that replays a crash, and exits with 1
# after the other targets have had their time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
time=${1:-60}
if [[ ! $time =~ ^[1-9][0-9]*$ ]]; then
    echo "error: '$time' is no number of seconds; usage: ci/fuzz.sh [SECONDS [TARGET...]]" >&2
    exit 2
fi
shift || true
ci/fuzz-build.sh
mapfile -t all < <(cargo fuzz list)
targets=("${@:-${all[@]}}")
mkdir -p fuzz/target/found fuzz/target/logs

# One unit takes milliseconds; two minutes is a hang on any machine. Memory: the sanitizer's own and the quarantine.
flags=(-max_total_time="$time" -timeout=120 -rss_limit_mb=4096 -max_len=2048 -print_final_stats=1)
failed=()
for target in "${targets[@]}"; do
    log=fuzz/target/logs/$target.log
    found=fuzz/target/found/$target
    mkdir -p "$found"
    before=$(mktemp)
    if cargo +nightly fuzz run "$target" "$found" "fuzz/corpus/$target" -- "${flags[@]}" >"$log" 2>&1; then
        executions=$(awk '/^stat::number_of_executed_units:/ { print $2 }' "$log")
        edges=$(grep -oE 'cov: [0-9]+' "$log" | tail -n 1)
        printf '== fuzz: %-20s %9s executions in %s s, %s edges, no crash\n' \
            "$target" "${executions:-?}" "$time" "${edges#cov: }"
    else
        failed+=("$target")
        tail -n 60 "$log"
        echo "error: $target failed; all of its output is in $log" >&2
        while IFS= read -r artifact; do
            echo "replay: cargo +nightly fuzz run $target $artifact" >&2
            echo " input: cargo +nightly fuzz fmt $target $artifact" >&2
        done < <(find "fuzz/artifacts/$target" -type f -newer "$before" ! -name 'slow-unit-*' 2>/dev/null)
    fi
    rm -f "$before"
done
if ((${#failed[@]})); then
    echo "error: fuzzing failed: ${failed[*]}" >&2
    exit 1
fi
