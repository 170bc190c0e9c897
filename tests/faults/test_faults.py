# SPDX-License-Identifier: MIT
"""The fault sweep: every allocation and every I/O call of a set of operations fails in turn (faults.c says what is judged)."""
import os
import pathlib
import shutil
import subprocess
import tempfile

BIN = pathlib.Path(os.environ.get("STRATA") or pathlib.Path(__file__).parents[2] / "build/src/strata").parents[1] / "tests/faults"


def test_no_failing_allocation_or_io_damages_or_leaks(tmp_path, peer):
    samples = tmp_path / "samples"
    samples.mkdir()
    # In memory: a real disk's flushes would take most of the time, and nothing is cut off here.
    memory = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path)
    try:
        p = subprocess.run([BIN / "faults", "-d", samples, "-e", "40", memory], capture_output=True, text=True, timeout=600)
    finally:
        shutil.rmtree(memory)
    print(p.stdout)
    assert p.returncode == 0, p.stdout + p.stderr
    checked = 0
    for image in sorted(samples.glob("*.qcow2")):
        if image.name.endswith("-hurt.qcow2"):
            continue  # damaged on purpose
        json = '{"driver": "qcow2", "backing": null, "file": {"driver": "file", "filename": "%s"}}' % image
        c = peer("qemu-img", "check", "json:" + json, status=None)
        assert c.returncode in (0, 3), f"{image.name}\n{c.stdout}{c.stderr}"
        checked += 1
    assert checked >= 20
