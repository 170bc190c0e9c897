#!/bin/bash
# SPDX-License-Identifier: MIT
#
# Runs the fuzz targets: fuzz.sh [TARGET...] (default: all), FUZZ_SECONDS each (default: 60).
#
# What a target has learnt stays in build-fuzz/corpus/TARGET and is used the next time; an input
# that breaks something is left in build-fuzz/found/TARGET-*, and the exit status is 1.  Run the
# program itself with such a file to see it again: build-fuzz/tests/fuzz/fuzz-TARGET FILE.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
here=build-fuzz/tests/fuzz
seconds=${FUZZ_SECONDS:-60}
export ASAN_OPTIONS=quarantine_size_mb=16${ASAN_OPTIONS:+:$ASAN_OPTIONS}
export LSAN_OPTIONS=suppressions=$PWD/tests/fuzz/lsan.supp:print_suppressions=0${LSAN_OPTIONS:+:$LSAN_OPTIONS}
# entropic=0: with thousands of features an input its bookkeeping takes half of the time.
common=(-entropic=0 -timeout=25 -rss_limit_mb=512 -max_total_time="$seconds")

options() {
    case $1 in
    qcow2_image) echo "-max_len=16384 -dict=tests/fuzz/qcow2.dict" ;;
    qcow2_ops | qcow2_tasks) echo "-max_len=2048" ;;
    nbd_session) echo "-max_len=8192 -dict=tests/fuzz/nbd.dict" ;;
    vhost_session) echo "-max_len=4096" ;;
    options) echo "-max_len=2048 -dict=tests/fuzz/options.dict" ;;
    *_image) echo "-max_len=16384 -dict=tests/fuzz/formats.dict" ;;
    *_ops) echo "-max_len=2048" ;;
    esac
}

[ $# -gt 0 ] || set -- qcow2_image qcow2_ops qcow2_tasks nbd_session vhost_session options {vdi,vpc,qed,qcow,parallels}_{image,ops} \
    bochs_image cloop_image dmg_image
status=0
mkdir -p build-fuzz/found
for t; do
    mkdir -p "build-fuzz/corpus/$t"
    # shellcheck disable=SC2046
    if ! "$here/fuzz-$t" "${common[@]}" $(options "$t") -artifact_prefix="build-fuzz/found/$t-" \
        "build-fuzz/corpus/$t" "$here/seeds/$t" "tests/fuzz/corpus/$t" \
        >"build-fuzz/$t.log" 2>&1; then
        status=1
        echo "== $t: FAILED, the end of build-fuzz/$t.log:"
        tail -n 40 "build-fuzz/$t.log"
    fi
    printf '%-16s %s executions, coverage %s\n' "$t" \
        "$(grep -oE '^#[0-9]+' "build-fuzz/$t.log" | tail -n 1 | tr -d '#')" \
        "$(grep -oE 'cov: [0-9]+' "build-fuzz/$t.log" | tail -n 1 | cut -c6-)"
done
exit $status
