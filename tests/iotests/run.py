#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""QEMU's own tests of its disk-image programs, run on ours.

    run.py QEMU_TESTS [--peer FOLDER] [--set raw --set raw:nbd --set qcow2] [TEST...]

QEMU_TESTS is tests/qemu-iotests of a QEMU source tree (it is not part of strata and is not changed).
Its bash tests that need nothing but qemu-img, qemu-io and qemu-nbd are run once with the programs
in --peer (QEMU's own: what fails or is not run there says nothing and drops out) and once with
strata under the drop-in names, and what they print is compared with the tests' reference output
as QEMU's own runner does: blanks at the ends of lines do not count.

A test is named FORMAT/NUMBER, FORMAT being raw, raw:nbd or qcow2.  Results go to --results as JSON,
differences to --work.  Tests that call a system emulator, a storage daemon or their Python
library are left out, and so is encryption.  QEMU_PROG is a stand-in that only lists block drivers,
for the tests that ask the emulator which drivers there are.
"""

import argparse
import concurrent.futures
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SETS = ["raw", "raw:nbd", "qcow2"]
PROGRAMS = ["qemu-img", "qemu-io", "qemu-nbd"]
TIMEOUT_S = 300

# What a test's text must not name: programs that are not judged here, and keys.
FOREIGN = re.compile(r"\$\{?QSD|_launch_qemu|iotests\.py|luks|common\.tls|encrypt\.|key-secret")

# The drivers that tests ask for with _require_drivers and that need no emulator to be used.
STAND_IN = """#!/bin/sh
echo 'Supported formats: blkdebug blkverify copy-on-read file host_device nbd null-aio null-co qcow2 quorum raw throttle vdi vmdk vpc'
"""


def suite_tests(folder):
    """Numbers and names of the bash tests, in order."""
    names = [n for n in os.listdir(folder) if re.fullmatch(r"\d{3}", n)]
    sub = os.path.join(folder, "tests")
    if os.path.isdir(sub):
        names += ["tests/" + n for n in os.listdir(sub)
                  if os.access(os.path.join(sub, n), os.X_OK) and not n.endswith(".out")]
    found = []
    for name in sorted(names):
        with open(os.path.join(folder, name), errors="replace") as f:
            text = f.read()
        if "bash" not in text.splitlines()[0]:
            continue
        code = "\n".join(l for l in text.splitlines()
                         if not re.match(r'\s*(#|_(un)?supported_fmt|.*"\$IMGFMT" ==? "luks")', l))
        if not FOREIGN.search(code):
            found.append(name)
    return found


def reference(folder, test, fmt):
    for name in (f"{test}.out.{fmt}", f"{test}.out"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    return None


def lines_of(path):
    with open(path, errors="surrogateescape") as f:
        return [line.rstrip() for line in f]


class Runner:
    def __init__(self, suite, work, programs, label):
        self.suite, self.work, self.programs, self.label = suite, work, programs, label
        self.stand_in = os.path.join(work, "qemu-system-none")
        with open(self.stand_in, "w") as f:
            f.write(STAND_IN)
        os.chmod(self.stand_in, 0o755)

    def environment(self, fmt, proto, test_dir, sock_dir):
        env = dict(os.environ)
        env.update(
            TEST_DIR=test_dir, SOCK_DIR=sock_dir,
            SAMPLE_IMG_DIR=os.path.join(self.suite, "sample_images"),
            PYTHON=sys.executable, QEMU_PROG=self.stand_in, QSD_PROG="/bin/false",
            QEMU_OPTIONS="", QEMU_DEFAULT_MACHINE="pc",
            QEMU_IMG_PROG=os.path.join(self.programs, "qemu-img"),
            QEMU_IO_PROG=os.path.join(self.programs, "qemu-io"),
            QEMU_NBD_PROG=os.path.join(self.programs, "qemu-nbd"),
            QEMU_IO_OPTIONS=f"--cache writeback --aio threads -f {fmt}",
            QEMU_IO_OPTIONS_NO_FMT="--cache writeback --aio threads",
            CACHEMODE="writeback", CACHEMODE_IS_DEFAULT="true", AIOMODE="threads",
            IMGFMT=fmt, IMGPROTO=proto, IMGFMT_GENERIC="true", IMGOPTSSYNTAX="false")
        for name in ("IMGOPTS", "QEMU_IMG_OPTIONS", "QEMU_NBD_OPTIONS", "VALGRIND_QEMU", "GDB_OPTIONS"):
            env.pop(name, None)
        return env

    def run(self, name):
        """(status, seconds): pass, fail, or skip."""
        which, test = name.split("/", 1)
        fmt, _, proto = which.partition(":")
        proto = proto or "file"
        want = reference(self.suite, test, fmt)
        if not want:
            return "skip", 0.0
        safe = re.sub(r"[^A-Za-z0-9]", "-", name)
        test_dir = os.path.join(self.work, self.label, safe)
        shutil.rmtree(test_dir, ignore_errors=True)
        os.makedirs(test_dir)
        # Socket paths are short in the kernel.
        sock_dir = tempfile.mkdtemp(prefix="io-")
        out = os.path.join(self.work, self.label, safe + ".out")
        script = os.path.join(self.suite, test)
        began = time.time()
        with open(out, "w") as f:
            p = subprocess.Popen(["bash", script], cwd=os.path.dirname(script), stdin=subprocess.DEVNULL,
                                 stdout=f, stderr=subprocess.STDOUT, start_new_session=True,
                                 env=self.environment(fmt, proto, test_dir, sock_dir))
            try:
                status = p.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                status = "timeout"
            # Servers that the test left behind are in its session.
            try:
                os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            p.wait()
        took = time.time() - began
        base = os.path.basename(test)
        notrun = os.path.join(test_dir, base + ".notrun")
        skipped = os.path.exists(notrun)
        if skipped:
            shutil.copy(notrun, os.path.join(self.work, self.label, safe + ".notrun"))
        diff = list(difflib.unified_diff(lines_of(want), lines_of(out), "reference", "output",
                                         lineterm=""))
        if status:
            diff.append(f"(exit status {status})")
        shutil.rmtree(test_dir, ignore_errors=True)
        shutil.rmtree(sock_dir, ignore_errors=True)
        diff_path = os.path.join(self.work, self.label, safe + ".diff")
        if os.path.exists(diff_path):
            os.unlink(diff_path)
        if skipped and not status:
            return "skip", took
        if not diff:
            return "pass", took
        with open(diff_path, "w", errors="surrogateescape") as f:
            f.write("\n".join(diff) + "\n")
        return "fail", took

    def run_all(self, names, jobs):
        results = {}
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for name, (status, took) in zip(names, pool.map(self.run, names)):
                results[name] = status
                if status != "skip":
                    print(f"{self.label:6} {name:40} {status} ({took:.1f} s)", flush=True)
        return results


def link_programs(strata, folder):
    os.makedirs(folder, exist_ok=True)
    for name in PROGRAMS:
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            os.unlink(path)
        os.symlink(os.path.abspath(strata), path)
    return folder


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("suite", help="tests/qemu-iotests of a QEMU source tree")
    ap.add_argument("tests", nargs="*", help="numbers; all by default")
    ap.add_argument("--set", action="append", dest="sets", help="raw, raw:nbd or qcow2; all by default")
    ap.add_argument("--strata", default=os.environ.get("STRATA", "build/src/strata"))
    ap.add_argument("--peer", default="/usr/bin", help="folder with QEMU's own programs")
    ap.add_argument("--results", default="build/iotests.json", help="results, kept between runs")
    ap.add_argument("--work", default="build/iotests", help="scratch folder; differences stay there")
    ap.add_argument("--again", action="store_true", help="run the peer again though its results are there")
    ap.add_argument("-j", "--jobs", type=int, default=2)
    args = ap.parse_intermixed_args()
    suite, work = os.path.abspath(args.suite), os.path.abspath(args.work)
    os.makedirs(work, exist_ok=True)
    tests = suite_tests(suite)
    if args.tests:
        tests = [t for t in tests if t in args.tests or os.path.basename(t) in args.tests]
    names = [f"{s}/{t}" for s in (args.sets or SETS) for t in tests]
    known = {"peer": {}, "strata": {}}
    if os.path.exists(args.results):
        with open(args.results) as f:
            known = json.load(f)
    key = f"{os.path.realpath(args.peer)} {os.path.getmtime(os.path.join(args.peer, 'qemu-img'))}"
    if known.get("peer_key") != key or args.again:
        known.update(peer={}, peer_key=key)
    ask = [n for n in names if n not in known["peer"]]
    known["peer"].update(Runner(suite, work, os.path.abspath(args.peer), "peer").run_all(ask, args.jobs))
    good = [n for n in names if known["peer"][n] == "pass"]
    ours = Runner(suite, work, link_programs(args.strata, os.path.join(work, "bin")), "strata")
    known["strata"].update(ours.run_all(good, args.jobs))
    with open(args.results, "w") as f:
        json.dump(known, f, indent=1, sort_keys=True)
    passed = [n for n in good if known["strata"][n] == "pass"]
    for s in args.sets or SETS:
        print(f"{s}: {sum(n.startswith(s + '/') for n in passed)} of "
              f"{sum(n.startswith(s + '/') for n in good)} pass")
    missing = [n for n in good if n not in passed]
    print("not passing:", " ".join(missing) or "none")
    print(f"{len(passed)} of {len(good)} pairs that pass with {args.peer} pass with strata")
    return 0


if __name__ == "__main__":
    sys.exit(main())
