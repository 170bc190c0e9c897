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
import uuid

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BIN = pathlib.Path(os.environ.get("STRATA") or ROOT / "build/src/strata").parents[1] / "tests/crash"
STATES = os.environ.get("STRATA_CRASH_STATES", "2300")
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
    assert sorted(lab("-L").stdout.split()) == sorted(workloads())


PARENT_LOCATOR = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C").bytes_le  # metadata item of VHDX


def driver_of(head):
    """What qemu-img calls the image, of those that it can check: it opens neither a QED whose tables
    have one cluster, nor a VDI whose blocks are not of 1 MiB."""
    if head[:4] == b"QFI\xfb" and head[7] >= 2:
        return "qcow2"
    if head[:4] == b"QED\0" and head[8] > 1:
        return "qed"
    if head[:8] == b"vhdxfile":
        return "vhdx"
    vdi = head[64:68] == b"\x7f\x10\xda\xbe" and head[376:380] == b"\0\0\x10\0"
    return "vdi" if vdi else None


def options_for(image):
    """The image in a sampled state, without what it names: those are checked for themselves."""
    with open(image, "rb") as f:
        head = f.read(512)
    driver = driver_of(head)
    if driver == "vhdx" and PARENT_LOCATOR in pathlib.Path(image).read_bytes():
        return None  # a differencing image, which qemu-img does not open
    tree = {"driver": driver, "file": {"driver": "file", "filename": str(image)}}
    if driver not in ("vdi", "vhdx"):
        tree["backing"] = None
    if driver == "qcow2" and head[4:8] == b"\0\0\0\3" and head[79] & 4:
        tree["data-file"] = {"driver": "file", "filename": str(image)[:-1] + "3"}  # the laboratory's habit
    return "json:" + json.dumps(tree) if driver else None


@pytest.mark.parametrize("name", workloads())
def test_no_crash_corrupts_or_loses_what_was_flushed(name, tmp_path, peer):
    """In a sample of the states qemu-img, an independent checker, finds leaks at most too."""
    # A stream is written once: its windows are few, and each counts for less than it may.
    budget = 2 * int(STATES) if name == "vmdk-stream" else int(STATES)
    p = lab("-n", str(budget), "-s", SEED, "-d", tmp_path, "-e", str(max(1, int(STATES) // 8)), name)
    print(p.stdout)
    assert p.returncode == 0, f"seed {SEED}\n{p.stdout}{p.stderr}"
    states = int(re.search(r"(\d+) states", p.stdout)[1])
    assert states >= min(2000, int(STATES)), p.stdout
    samples = sorted(tmp_path.iterdir())
    assert len(samples) >= 4
    # These damage images on purpose, and their states are whole after a repair only; VHDX after a replay.
    damaged = name in ("dirty", "repair", "snapshot-repaired") or name.startswith("vhdx")
    more = ["-r", "all"] if damaged else []
    for options in filter(None, map(options_for, samples)):
        c = peer("qemu-img", "check", *more, options, status=None)
        assert c.returncode in (0, 3), f"seed {SEED}, {options}\n{c.stdout}{c.stderr}"


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
