# SPDX-License-Identifier: MIT
"""What every Python test shares: where strata is, and how to run it.

STRATA names the program (default: $BUILD/src/strata, build/ when unset).  A peer that is missing
fails the test that needs it: nothing is skipped.  Two marks take a test out where it cannot mean
anything; pytest counts it as deselected:

    plain_build    measures memory: not for a program built with AddressSanitizer
    uring          is about io_uring: not where the kernel refuses it (test.sh says STRATA_NO_URING)
"""
import mmap
import os
import pathlib
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
STRATA = os.environ.get("STRATA") or str(ROOT / os.environ.get("BUILD", "build") / "src/strata")


def sanitized():
    try:
        with open(STRATA, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m:
            return m.find(b"__asan_init") >= 0
    except (OSError, ValueError):
        return False


def pytest_configure(config):
    config.addinivalue_line("markers", "plain_build: not for a build with AddressSanitizer")
    config.addinivalue_line("markers", "uring: not where the kernel refuses io_uring")


def pytest_collection_modifyitems(config, items):
    out = {"plain_build"} if sanitized() else set()
    if os.environ.get("STRATA_NO_URING"):
        out.add("uring")
    gone = [i for i in items if any(i.get_closest_marker(m) for m in out)]
    if gone:
        config.hook.pytest_deselected(items=gone)
        items[:] = [i for i in items if i not in gone]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed:
        item.failed_once = True


@pytest.fixture
def tmp_path(tmp_path, request):
    """pytest's own, gone when the test has passed: a whole run would fill 20 GB otherwise."""
    yield tmp_path
    if not getattr(request.node, "failed_once", False):
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def strata():
    """Path of the program under test."""
    assert os.access(STRATA, os.X_OK), f"{STRATA} is not there: run `make` first"
    return STRATA


@pytest.fixture(scope="session")
def run(strata):
    """run("info", "a.qcow2", status=0) -> CompletedProcess with text output.

    The exit status is checked against `status` (None: any).
    """

    def call(*args, status=0, timeout=120, **kw):
        kw.setdefault("stdin", subprocess.DEVNULL)
        p = subprocess.run([strata, *map(str, args)], capture_output=True, text=True,
                           errors="replace", timeout=timeout, **kw)
        if status is not None:
            assert p.returncode == status, (
                f"strata {' '.join(map(str, args))}: exit {p.returncode}, expected {status}\n"
                f"--- stdout\n{p.stdout}\n--- stderr\n{p.stderr}")
        return p

    return call


@pytest.fixture(scope="session")
def peer():
    """peer("qemu-img", "check", name) -> CompletedProcess; fails when the peer is missing."""

    def call(prog, *args, status=0, timeout=120, **kw):
        path = shutil.which(prog)
        assert path, f"{prog} is missing: run `make setup`"
        kw.setdefault("stdin", subprocess.DEVNULL)
        p = subprocess.run([path, *map(str, args)], capture_output=True, text=True,
                           errors="replace", timeout=timeout, **kw)
        if status is not None:
            assert p.returncode == status, (
                f"{prog} {' '.join(map(str, args))}: exit {p.returncode}, expected {status}\n"
                f"--- stdout\n{p.stdout}\n--- stderr\n{p.stderr}")
        return p

    return call


@pytest.fixture
def seed():
    """Of whatever a test does at random: STRATA_SEED, else the clock; printed."""
    value = int(os.environ.get("STRATA_SEED", time.time_ns() % 10**9))
    print(f"STRATA_SEED={value}")
    return value


@pytest.fixture(scope="session")
def create_luks(peer):
    """create_luks(path): a LUKS-encrypted qcow2 by qemu-img.

    It times its key derivation, and gives up when the clock is too coarse for that: so several
    tries.
    """

    def call(path, size="1M"):
        for _ in range(100):
            p = peer("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc",
                     "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", path,
                     size, status=None)
            if "accurate CPU usage" not in p.stderr:
                break
            time.sleep(0.05)
        assert p.returncode == 0, p.stderr

    return call


@pytest.fixture(scope="session")
def kernel():
    """Debian's cloud kernel, for guests whose only program is a script (scripts/guest.sh)."""
    p = subprocess.run([ROOT / "scripts/guest.sh", "fetch"], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return pathlib.Path(p.stdout.splitlines()[-1]) / "vmlinuz"
