# SPDX-License-Identifier: MIT
# The front door.  meson and ninja do the work; each target here is one command to remember.
#
#   make setup         install what building and testing need (Debian packages)
#   make               build into build/
#   make try           boot a real guest on a throw-away disk and show that nothing stays
#   make test          every test, on a fresh machine too: setup, build, unit, cli, interop
#   make crash         build the states that power cuts could leave, and judge each
#   make bench         strata beside its peers, one table
#   make iotests       QEMU's own tests on the drop-in names: QEMU_TESTS=tests/qemu-iotests of its source
#   make asan          the build with AddressSanitizer and UBSan, into build-asan/
#   make fuzz          the fuzz targets, FUZZ_SECONDS (60) each, built into build-fuzz/
#   make format-check  is every source file formatted?   (make format does it)
#   make install       DESTDIR and PREFIX as usual

BUILD ?= build
PREFIX ?= /usr/local
DESTDIR ?=
JOBS ?= $(shell nproc)

export BUILD

all: $(BUILD)/build.ninja
	@ninja -C $(BUILD) -j $(JOBS)

$(BUILD)/build.ninja:
	@command -v meson >/dev/null || { echo "meson is missing: run 'make setup' first" >&2; exit 1; }
	meson setup $(BUILD) --prefix=$(PREFIX)

setup:
	@scripts/setup.sh

try: setup all
	@scripts/try.sh

test: setup all
	@scripts/test.sh

bench: setup all
	@/usr/bin/python3 bench/run.py

# The long form of the crash laboratory: CRASH_STATES for each workload, CRASH_SEEDS seeds (or, with
# CRASH_MINUTES, as many as go into that time), on all processors.
CRASH_STATES ?= 20000
CRASH_SEEDS ?= 20
CRASH_MINUTES ?= 0
crash: all
	@scripts/crash.sh $(BUILD)/tests/crash/lab $(JOBS) $(CRASH_STATES) $(CRASH_SEEDS) $(CRASH_MINUTES)

# QEMU's tests are not part of this tree, nor of Debian's packages: name the folder that has them.
QEMU_TESTS ?=
QEMU_PROGRAMS ?= /usr/bin
iotests: all
	@test -d "$(QEMU_TESTS)" || { echo "give QEMU_TESTS=.../tests/qemu-iotests of a QEMU source tree" >&2; exit 1; }
	@/usr/bin/python3 tests/iotests/run.py "$(QEMU_TESTS)" --peer $(QEMU_PROGRAMS) \
	    --strata $(BUILD)/src/strata --results $(BUILD)/iotests.json --work $(BUILD)/iotests -j $(JOBS)

asan:
	@test -f build-asan/build.ninja || meson setup build-asan \
	    -Db_sanitize=address,undefined
	@ninja -C build-asan -j $(JOBS)

fuzz: setup
	@test -f build-fuzz/build.ninja || CC=clang meson setup build-fuzz \
	    -Dfuzz=true -Db_sanitize=address,undefined -Db_lundef=false
	@ninja -C build-fuzz -j $(JOBS) fuzz-targets
	@scripts/fuzz.sh

format-check:
	@scripts/format.sh --dry-run -Werror

format:
	@scripts/format.sh -i

install: all
	meson configure $(BUILD) --prefix=$(PREFIX)
	DESTDIR=$(DESTDIR) meson install -C $(BUILD) --no-rebuild

clean:
	rm -rf $(BUILD) build-asan build-fuzz build-gcc build-clang

.PHONY: all setup iotests try test crash bench asan fuzz format-check format install clean
