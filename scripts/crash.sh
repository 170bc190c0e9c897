#!/bin/bash
# SPDX-License-Identifier: MIT
#
# The long form of the crash laboratory: LAB JOBS STATES SEEDS MINUTES.  Fresh seeds until SEEDS are
# done, or with MINUTES > 0 until that time is over; ends at the first failure, whose seed is shown.
set -uo pipefail
lab=$1 jobs=$2 states=$3 seeds=$4 minutes=$5
end=$((SECONDS + minutes * 60))
total=0 done=0
while [ "$minutes" -gt 0 ] && [ $SECONDS -lt $end ] || [ "$minutes" = 0 ] && [ $done -lt "$seeds" ]; do
    seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')
    out=$("$lab" -j "$jobs" -n "$states" -s "$seed" 2>&1)
    status=$?
    printf '%s\n' "$out"
    n=$(printf '%s\n' "$out" | sed -n 's/.* workloads, \([0-9]*\) states.*/\1/p')
    total=$((total + ${n:-0}))
    done=$((done + 1))
    [ $status = 0 ] || {
        echo "FAILED: seed $seed, after $total states"
        exit 1
    }
done
echo "$done seeds, $total states, 0 failed"
