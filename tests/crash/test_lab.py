# SPDX-License-Identifier: MIT
"""The crash laboratory: no state that a power cut could leave is corrupt or loses what was flushed.

lab.c says what it builds and judges.  Here: all workloads with a fresh seed; a sample of the states before an
independent checker; and every planted bug, which the laboratory must catch, or it would prove nothing.
STRATA_CRASH_STATES (for each workload) and STRATA_CRASH_SEED choose the length and replay a seed.
"""
import os
import pathlib
import random
import subprocess

import pytest

BIN = pathlib.Path(os.environ.get("STRATA") or pathlib.Path(__file__).parents[2] / "build/src/strata").parents[1] / "tests/crash"
STATES = os.environ.get("STRATA_CRASH_STATES", "2500")
SEED = os.environ.get("STRATA_CRASH_SEED") or str(random.SystemRandom().randrange(1 << 31))


def lab(*args, planted=False, timeout=600):
    prog = BIN / ("lab-planted" if planted else "lab")
    return subprocess.run([prog, *args], capture_output=True, text=True, timeout=timeout)


def plants():
    p = lab("-l", planted=True)
    assert p.returncode == 0, p.stderr
    return p.stdout.split()


def test_no_crash_corrupts_or_loses_what_was_flushed():
    p = lab("-n", STATES, "-s", SEED)
    print(p.stdout)
    assert p.returncode == 0, f"seed {SEED}\n{p.stdout}{p.stderr}"


def test_qemu_img_finds_leaks_at_most_in_sampled_states(tmp_path, peer):
    p = lab("-n", "200", "-s", SEED, "-d", tmp_path, "-e", "20")
    assert p.returncode == 0, p.stdout
    samples = sorted(tmp_path.iterdir())
    assert len(samples) >= 100
    for image in samples:
        c = peer("qemu-img", "check", "-f", "qcow2", image, status=None)
        assert c.returncode in (0, 3), f"seed {SEED}, {image.name}\n{c.stdout}{c.stderr}"


def test_there_are_plants_enough():
    assert len(plants()) >= 12


@pytest.mark.parametrize("number", range(16))
def test_planted_bug_is_caught(number):
    names = plants()
    if number >= len(names):
        raise AssertionError(f"only {len(names)} plants: shorten the range")
    for seed in range(1, 9):
        p = lab("-x", "-n", "1500", "-s", str(seed), "-p", names[number], planted=True)
        assert p.returncode != 2, p.stderr
        if p.returncode:
            return  # caught: a failed state, or the engine itself met the damage
    raise AssertionError(f"{names[number]}: eight seeds, and nothing was noticed")
