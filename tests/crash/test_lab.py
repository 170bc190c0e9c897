# SPDX-License-Identifier: MIT
"""The crash laboratory: no state that a power cut could leave is corrupt or loses what was flushed.

lab.c says what it builds and judges.  Here: all workloads with a fresh seed; a sample of the states before an
independent checker; and every planted bug, which the laboratory must catch, or it would prove nothing.
STRATA_CRASH_STATES (for each workload) and STRATA_CRASH_SEED choose the length and replay a seed.
"""
import json
import os
import pathlib
import random
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BIN = pathlib.Path(os.environ.get("STRATA") or ROOT / "build/src/strata").parents[1] / "tests/crash"
STATES = os.environ.get("STRATA_CRASH_STATES", "2500")
SEED = os.environ.get("STRATA_CRASH_SEED") or str(random.SystemRandom().randrange(1 << 31))
PLANTS = re.findall(r"^X\((\w+),", (ROOT / "src/base/plants.def").read_text(), re.M)


def lab(*args, planted=False, timeout=600):
    prog = BIN / ("lab-planted" if planted else "lab")
    return subprocess.run([prog, *args], capture_output=True, text=True, timeout=timeout)


def workloads():
    """From the tables, so that pytest can list the tests before anything is built."""
    names = []
    for c in sorted((ROOT / "tests/crash").glob("*.c")):
        for table in re.findall(r"^const struct workload \w+\[\] = \{(.*?)^\};", c.read_text(), re.M | re.S):
            names += re.findall(r'^    \{(?:\.name = )?"([\w-]+)"', table, re.M)
    return names


def test_the_list_of_workloads_is_whole():
    p = lab("-n", "1", "-s", "1", "-j", "2")
    assert sorted(re.findall(r"^([\w-]+) +seed", p.stdout, re.M)) == sorted(workloads())


@pytest.mark.parametrize("name", workloads())
def test_no_crash_corrupts_or_loses_what_was_flushed(name):
    p = lab("-n", STATES, "-s", SEED, name)
    print(p.stdout)
    assert p.returncode == 0, f"seed {SEED}\n{p.stdout}{p.stderr}"
    states = int(re.search(r"(\d+) states", p.stdout)[1])
    assert states >= min(2000, int(STATES)), p.stdout


def options_for(image):
    """The image in a sampled state, without what it names: those are checked for themselves."""
    tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}, "backing": None}
    with open(image, "rb") as f:
        head = f.read(80)
    if head[4:8] == b"\0\0\0\3" and head[79] & 4:  # it has an external data file: by the laboratory's habit on 3
        tree["data-file"] = {"driver": "file", "filename": str(image)[:-1] + "3"}
    return "json:" + json.dumps(tree)


def test_qemu_img_finds_leaks_at_most_in_sampled_states(tmp_path, peer):
    p = lab("-n", "100", "-s", SEED, "-d", tmp_path, "-e", "60")
    assert p.returncode == 0, p.stdout
    checked = 0
    for image in sorted(tmp_path.iterdir()):
        with open(image, "rb") as f:
            head = f.read(8)
        if head[:4] != b"QFI\xfb" or head[7] < 2:
            continue
        # These two damage images on purpose, and their states are whole after a repair only.
        more = ["-r", "all"] if image.name.startswith(("dirty-", "repair-")) else []
        c = peer("qemu-img", "check", *more, options_for(image), status=None)
        assert c.returncode in (0, 3), f"seed {SEED}, {image.name}\n{c.stdout}{c.stderr}"
        checked += 1
    assert checked >= 100


def test_there_are_plants_enough():
    assert len(PLANTS) >= 12
    assert lab("-l", planted=True).stdout.split() == PLANTS


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_caught(plant):
    """First by the workloads made for it; when they let it through, by all of them."""
    for only in (["-o"], []):
        for seed in range(1, 9):
            p = lab("-x", "-n", "1500", "-s", str(seed), "-p", plant, *only, planted=True)
            if p.returncode == 2:
                break  # no workload names it
            if p.returncode:
                print(p.stdout, p.stderr)
                return  # caught: a failed state, or the engine itself met the damage
    raise AssertionError(f"{plant}: eight seeds, and nothing was noticed")
