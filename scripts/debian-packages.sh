#!/bin/sh
# Installs what is missing of the given Debian packages, quietly, and starts nothing.
#
#   scripts/debian-packages.sh build|test|vm|demo|bench|profile|instructions
#
# Services that packages bring along (nginx, Redis, PostgreSQL) stay stopped and disabled, and no database cluster is made:
# the rig runs the programs itself, in its own namespaces and directories.
set -eu

build="build-essential protobuf-compiler"
rig="iproute2 nftables util-linux procps tcpdump"
case "${1:-}" in
    build) packages="$build" ;;
    test) packages="$build $rig curl haproxy" ;;
    vm) packages="$build $rig qemu-system-x86 qemu-utils xz-utils" ;;
    demo) packages="$build $rig curl nginx-light redis-server redis-tools postgresql postgresql-contrib iperf3" ;;
    bench) packages="$build $rig haproxy stunnel4 openssl nginx-light libnginx-mod-stream wireguard-go wireguard-tools" ;;
    profile) packages="$build $rig linux-perf" ;;
    instructions) packages="$build valgrind" ;;
    *) echo "usage: $0 build|test|vm|demo|bench|profile|instructions" >&2; exit 2 ;;
esac

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" = "ii " ]
}

# Another package that brings the same programs will do.
provided() {
    case "$1" in
        nginx-light) command -v nginx >/dev/null ;;
        postgresql) ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 ;;
        postgresql-contrib) ls /usr/lib/postgresql/*/bin/pgbench >/dev/null 2>&1 ;;
        *) return 1 ;;
    esac
}

find_missing() {
    missing=""
    for package in $packages; do
        installed "$package" || provided "$package" || missing="$missing $package"
    done
    [ -n "$missing" ]
}
find_missing || exit 0

if ! command -v apt-get >/dev/null; then
    echo "these programs are missing, and this is no Debian system that could install them:$missing" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "these packages are missing; run as root, or install them yourself:$missing" >&2
    exit 1
fi

log=$(mktemp)
policy=/usr/sbin/policy-rc.d
clusters=/etc/postgresql-common/createcluster.d/opencluster-no-cluster.conf
made=""
tidy() {
    for file in $made; do rm -f "$file"; done
    rm -f "$log"
}
trap tidy EXIT
trap 'exit 1' INT TERM HUP

# While the packages are being configured: no service starts (101: forbidden by policy) and no cluster is made.
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    made="$made $policy"
fi
case "$missing" in *postgresql*)
    if [ ! -e "$clusters" ]; then
        mkdir -p "${clusters%/*}"
        printf 'create_main_cluster = false\n' >"$clusters"
        made="$made $clusters"
    fi ;;
esac

echo "installing Debian packages:$missing"
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
install() {
    # shellcheck disable=SC2086 # a list
    apt-get install -y -qq --no-install-recommends $missing >"$log" 2>&1
}
failed() {
    cat "$log" >&2
    echo "could not install:$missing" >&2
    exit 1
}
wanted="$missing"
if ! install; then
    # The lists may be absent or stale.
    apt-get update -qq >"$log" 2>&1 && install || failed
fi
# A package of another release may have had to go for one of these: its own release's version takes its place.
if find_missing; then
    install && ! find_missing || failed
fi

# What came with them stays off after the next boot, too.
if [ -d /run/systemd/system ]; then
    for service in nginx redis-server postgresql haproxy stunnel4; do
        case "$wanted" in *"${service%-server}"*) systemctl disable --quiet "$service" 2>/dev/null || true ;; esac
    done
fi
