#!/bin/bash
# SPDX-License-Identifier: MIT
#
# Runs every test of the build in $BUILD (default: build) and ends with "N passed, N failed".
#
#   unit     the cmocka programs, under meson
#   pytest   tests/cli, tests/interop, tests/crash ...: whatever tests/*/ holds
#
# Everything runs under the first I/O back end (STRATA_AIO=uring); under the second (threads) the unit
# tests again, and of pytest whatever moves data: formats, metadata, messages and the crash laboratory
# are the same whoever moves it, and are left out there.  STRATA_TEST_FULL=1 leaves nothing out,
# STRATA_TEST_ONCE=1 runs pytest under the first only, STRATA_TEST_THREADS_FIRST=1 exchanges the two.
# Only where the kernel itself refuses io_uring, asked here without strata's help, is that round left
# out, and the output says so.  STRATA_TEST_AIO="uring threads" chooses by hand; arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build}
jobs=${JOBS:-$(nproc)}
py=/usr/bin/python3
export STRATA=$PWD/$BUILD/src/strata
export BUILD PYTHONDONTWRITEBYTECODE=1
results=$BUILD/test-results
rm -rf "$results"
mkdir -p "$results"

uring_refused() { # io_uring_setup(1, zeroed params): ENOSYS or EPERM?
    $py - <<'PY'
import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(425, 1, ctypes.create_string_buffer(120))
sys.exit(0 if fd < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM) else 1)
PY
}

backends=${STRATA_TEST_AIO:-}
if [ -z "$backends" ]; then
    backends="uring threads"
    [ -z "${STRATA_TEST_THREADS_FIRST:-}" ] || backends="threads uring"
    if uring_refused; then
        echo "note: this kernel refuses io_uring; testing the thread back end only"
        backends=threads
        export STRATA_NO_URING=1
    fi
fi

broken=0 # rounds that went wrong without a failed test to show for it: a crash, no result
accounted() { # STATUS RESULT
    [ -s "$2" ] && { [ "$1" = 0 ] || grep -qE '<(failure|error)' "$2"; } && return
    echo "FAILED: the round ended with status $1 and no failed test"
    broken=$((broken + 1))
}

suites=()
for d in tests/*/; do
    compgen -G "${d}test_*.py" >/dev/null && suites+=("$d")
done
again=() # what a second round leaves out
left_out() { # FILE...
    again+=("${@/#/--ignore=}")
}
if [ -z "${STRATA_TEST_FULL:-}" ]; then
    left_out tests/faults tests/crash/test_lab.py tests/cli/test_{help,hostile_images}.py
    left_out tests/interop/test_{formats_*,dropin_*,dmg,cloop_write,vvfat*,v{di,hdx,mdk,pc}*,qcow,parallels}.py
    left_out tests/interop/test_{readonly_formats,libvirt,oslo,qemu_habits,amend,snapshot_verb,measure_dd_bench}.py
    left_out tests/interop/test_qcow2_{check,create,open,repair}.py
fi
once=()
for aio in $backends; do
    export STRATA_AIO=$aio
    echo "== unit tests, $aio"
    meson test -C "$BUILD" --no-rebuild --print-errorlogs --num-processes "$jobs" \
        --logbase "unit-$aio"
    status=$?
    mv "$BUILD/meson-logs/unit-$aio.junit.xml" "$results/unit-$aio.xml"
    accounted "$status" "$results/unit-$aio.xml"
    [ ${#suites[@]} -gt 0 ] || continue
    [ -z "${STRATA_TEST_ONCE:-}" ] || [ "$aio" = "${backends%% *}" ] || continue
    echo "== pytest, $aio: ${suites[*]}"
    $py -m pytest -q -p no:cacheprovider -n "$jobs" --durations=8 \
        --junitxml="$results/pytest-$aio.xml" "${once[@]}" "$@" "${suites[@]}" </dev/null
    accounted $? "$results/pytest-$aio.xml"
    once=("${again[@]}")
    [ -n "${STRATA_TEST_FULL:-}" ] || export STRATA_OPS=${STRATA_OPS:-800}
done

shopt -s nullglob
$py - "$broken" "$results"/*.xml <<'PY'
import sys
import xml.etree.ElementTree as ET

passed, failed = 0, int(sys.argv[1])
bad = []
for name in sys.argv[2:]:
    for case in ET.parse(name).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
            bad.append("%s: %s %s" % (name.split("/")[-1][:-4], case.get("classname"), case.get("name")))
        elif case.find("skipped") is not None:
            failed += 1  # a test that did not run shows nothing
            bad.append("%s: %s %s (skipped)" % (name.split("/")[-1][:-4], case.get("classname"), case.get("name")))
        else:
            passed += 1
for line in bad:
    print("FAILED", line)
if passed + failed == 0:
    failed = 1
print("%d passed, %d failed" % (passed, failed))
sys.exit(1 if failed else 0)
PY
