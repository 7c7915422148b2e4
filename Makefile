# Everything works on a bare Debian 12 machine with cargo: what is missing of Debian's packages is installed quietly.
#
#   make demo     see it work: two hosts, real applications, an intruder, a lost controller
#   make test     see it proven: unit tests, then tests by requirement on real clusters (as root)
#   make vm-test  the tests with virtual machines alone (SOAK=1: ten minutes of provoked false alarms)
#   make soak     the same for long: a million flows that leave nothing behind, mixtures of a minute, the lease's models with
#                 larger bounds (some gigabytes)
#   make measure-failclosed   how fast traffic ends, and how fast revocations arrive (about half an hour)
#   make bench    measure it against what one would use instead (about 20 minutes; make bench-quick: 3)
#   make profile SCENARIO=rr-16   where the proxies' time goes, as a flame graph
#   make bench-instructions   the hot path's instructions under callgrind, against bench/instructions.txt
#   make build    the five programs, in target/release
#   make lint     formatting, clippy, whether the fuzz targets build, licences
#   make install  PREFIX=/usr/local DESTDIR=

CARGO   ?= cargo
PREFIX  ?= /usr/local
DESTDIR ?=

# The programs of one build are used together: the target directory may be moved, never mixed.
TARGET   := $(or $(CARGO_TARGET_DIR),target)
RELEASE  := $(TARGET)/release
PROGRAMS := opencluster opencluster-controller opencluster-node opencluster-proxy
UNITS    := opencluster-controller.service opencluster-node.service opencluster-node-block.service

.DEFAULT_GOAL := build
.PHONY: build test vm-test measure-failclosed soak demo bench bench-quick bench-instructions profile lint clean install

build:
	@scripts/debian-packages.sh build
	$(CARGO) build --release --locked --workspace --bins

# What machines are made of; where it cannot be had, their tests say that they were skipped.
GUESTS = scripts/debian-packages.sh vm && scripts/guest-packages $(TARGET)

# Unit and property tests, then whole clusters: the latter take the programs from the release directory.
test: build
	@scripts/debian-packages.sh test
	@if $(GUESTS); then :; else echo "NO VIRTUAL MACHINES HERE: their tests are skipped" >&2; export OPENCLUSTER_VM=skip; fi; \
	    $(CARGO) test --locked --workspace

vm-test: build
	@$(GUESTS)
	$(if $(SOAK),SOAK=1) $(CARGO) test --locked -p opencluster-integration --test r13_machines -- --nocapture

# What `make test` does in short, as long as a release is tested with.
soak: build
	@scripts/debian-packages.sh test
	OPENCLUSTER_SOAK_FLOWS=1000000 OPENCLUSTER_MIX_SECONDS=60 \
	    $(CARGO) test --locked -p opencluster-integration --test r37_leaks --test r37_data_path -- --nocapture
	$(CARGO) test --release --locked -p opencluster-policy --test lease_model -- --ignored --nocapture --test-threads 1
# Into the report of the benchmarks, under `failclosed`.
measure-failclosed: build
	@scripts/debian-packages.sh test
	CUT_ROUNDS=$(or $(CUT_ROUNDS),20) $(CARGO) test --locked -p opencluster-integration --test r06_lease --test r35_severance
	$(RELEASE)/opencluster-rig measure-revocation

demo: build
	@scripts/debian-packages.sh demo
	@$(RELEASE)/opencluster-rig demo $(DEMO)

bench: build
	@scripts/debian-packages.sh bench
	@$(RELEASE)/opencluster-bench $(BENCH)

bench-quick:
	@$(MAKE) bench BENCH="--quick $(BENCH)"

profile: build
	@scripts/debian-packages.sh profile
	@scripts/profile.sh $(or $(SCENARIO),rr-16)

# Instructions of the hot path under callgrind: a guard that does not depend on how busy the machine is.
bench-instructions:
	@scripts/debian-packages.sh instructions
	@CARGO="$(CARGO)" scripts/bench-instructions.sh $(BENCH)

lint:
	@scripts/debian-packages.sh build
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) check --locked --manifest-path fuzz/Cargo.toml
	@scripts/check-requirements
	@scripts/licences.sh

clean:
	-@[ ! -x $(RELEASE)/opencluster-rig ] || $(RELEASE)/opencluster-rig down
	$(CARGO) clean

install: build
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -d -m 0700 $(DESTDIR)/etc/opencluster
	install -m 0755 $(addprefix $(RELEASE)/,$(PROGRAMS)) $(DESTDIR)$(PREFIX)/bin
	install -d $(addprefix $(DESTDIR)$(PREFIX)/share/,bash-completion/completions zsh/site-functions fish/vendor_completions.d)
	$(RELEASE)/opencluster completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/opencluster
	$(RELEASE)/opencluster completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_opencluster
	$(RELEASE)/opencluster completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/opencluster.fish
	for unit in $(UNITS); do \
	    sed 's|@BIN@|$(PREFIX)/bin|g' packaging/systemd/$$unit.in \
	        >$(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit || exit 1; \
	done
	install -m 0644 packaging/config/controller.yaml $(DESTDIR)/etc/opencluster/controller.yaml.example
	install -m 0644 packaging/config/node.yaml $(DESTDIR)/etc/opencluster/node.yaml.example
