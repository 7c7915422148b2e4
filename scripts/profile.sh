#!/bin/sh
# Where the proxies' processor time goes under a load of the benchmark, as a flame graph.
#
#   scripts/profile.sh SCENARIO [FILE.svg]      (default: target/bench/profile-SCENARIO.svg)
#
# Needs root and perf (Debian: linux-perf). The programs' symbols are those of the release build.
set -eu
scenario="${1:?usage: $0 SCENARIO [FILE.svg]}"
target="${CARGO_TARGET_DIR:-target}"
bench="$target/release/opencluster-bench"
out="${2:-$target/bench/profile-$scenario.svg}"
place="$(mktemp -d)"
running=
trap 'rm -rf "$place"; [ -z "$running" ] || kill "$running" 2>/dev/null || true' EXIT

"$bench" --name profile --contenders us --scenarios "$scenario" --rounds 1 --seconds 8 --out "$place/out" >"$place/log" 2>&1 &
running=$!
proxies() {
    for host in profile-a profile-b; do
        for pid in $(ip netns pids "$host" 2>/dev/null); do
            [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = opencluster-pro ] && echo "$pid"
        done
    done | paste -sd, -
}
tries=0
until [ "$(proxies | tr , '\n' | grep -c .)" -ge 2 ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || { cat "$place/log" >&2; echo "the proxies did not start" >&2; exit 1; }
    sleep 0.1
done
# The cluster becomes ready, and the load is warmed up.
sleep 3
perf record -q -g -F 1999 -p "$(proxies)" -o "$place/data" -- sleep 3
wait "$running" || { running=; cat "$place/log" >&2; exit 1; }
running=
perf script -i "$place/data" -F comm,ip,sym 2>/dev/null |
    "$bench" flame --title "Both proxies at $scenario" >"$place/graph.svg"
mkdir -p "$(dirname "$out")"
mv "$place/graph.svg" "$out"
echo "$out"
