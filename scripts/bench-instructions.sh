#!/bin/sh
# Counts the instructions of the proxy's hot path under callgrind and compares them with bench/instructions.txt.
#
#   scripts/bench-instructions.sh [--update]
#
# A regression guard that does not depend on how busy the machine is. More than 5 % above the committed figure fails; more
# than 5 % below asks for an update. The figures are of the ciphers that this machine's processor has (x86-64 with AES-NI
# and AVX2; valgrind hides AVX-512): elsewhere they differ.
set -eu
cd "$(dirname "$0")/.."

baseline=bench/instructions.txt
program=${CARGO_TARGET_DIR:-target}/release/examples/hot_path
rounds=10000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

${CARGO:-cargo} build --release --locked --quiet -p opencluster-proxy --example hot_path

measure() {
    valgrind --tool=callgrind --callgrind-out-file="$work/out" --toggle-collect="*carry_$1*" "$program" "$1" \
        >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    total=$(sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$work/log")
    [ "${total:-0}" -gt "$rounds" ] || { echo "callgrind counted nothing of carry_$1:" >&2; cat "$work/log" >&2; exit 1; }
    echo $((total / rounds))
}

result=0
{
    echo "# Instructions for each message of 64 bytes on a shared tunnel (small) and each full record (bulk): framed, sealed,"
    echo "# opened, decoded. Written by scripts/bench-instructions.sh --update."
} >"$work/new"
for name in small bulk; do
    now=$(measure "$name")
    echo "$name $now" >>"$work/new"
    before=$(sed -n "s/^$name //p" "$baseline" 2>/dev/null || true)
    if [ -z "$before" ]; then
        echo "$name: $now instructions, nothing to compare with"
        [ "${1:-}" = --update ] || result=1
        continue
    fi
    change=$(((now - before) * 1000 / before))
    echo "$name: $now instructions, $before committed ($change ‰)"
    if [ "$change" -gt 50 ]; then
        echo "$name: more than 5 % above: find out why; if it is worth it: make bench-instructions BENCH=--update, and commit the figure with the reason" >&2
        result=1
    elif [ "$change" -lt -50 ]; then
        echo "$name: more than 5 % below: keep it: make bench-instructions BENCH=--update, and commit the figure" >&2
        result=1
    fi
done
if [ "${1:-}" = --update ]; then
    cp "$work/new" "$baseline"
    exit 0
fi
exit "$result"
