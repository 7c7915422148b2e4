#!/bin/sh
# Licences, bans and sources of all dependencies (deny.toml), by cargo-deny where it is installed. It is not built here:
# that takes longer than everything else together.
set -eu
if command -v cargo-deny >/dev/null; then
    exec cargo deny --locked --all-features check --hide-inclusion-graph bans licenses sources
fi
cat >&2 <<'TEXT'
************************************************************************************
* NOT CHECKED: licences, bans and sources of the dependencies (deny.toml), because *
* cargo-deny is not installed. To check them: cargo install --locked cargo-deny    *
************************************************************************************
TEXT
