# SPDX-License-Identifier: MIT
"""Commands that are killed, interrupted, or run out of room on the way leave their inputs as they were, and an
image that they change with its content: at each of a spread of the system calls by which files change, strace
sends a signal or says that the disk is full.

What power cuts leave is for the crash laboratory (tests/crash), single failures inside the library for the fault
sweep (tests/faults).
"""
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

KIB, MIB = 1 << 10, 1 << 20
CALLS = "pwrite64,pwritev,pwritev2,fdatasync,fsync,ftruncate,fallocate,linkat,rename,renameat2"
ROOM = "pwrite64,pwritev,pwritev2,ftruncate,fallocate"
AT = {"KILL": (1, 2, 3, 5), "INT": (2,), "ENOSPC": (1, 3)}  # counted in each thread


def qemu_img(*args, cwd, status=(0,)):
    p = subprocess.run(["/usr/bin/qemu-img", *args], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert p.returncode in status, (args, p.stdout, p.stderr)
    return p


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """raw; q (the same), with snapshot s of another state; base <- top; other; full.raw: what top reads as."""
    d = tmp_path_factory.mktemp("kept")

    def io(fmt, name, *commands):
        subprocess.run(["qemu-io", "-f", fmt, *sum((["-c", c] for c in commands), []), name], cwd=d, check=True,
                       stdout=subprocess.DEVNULL)

    qemu_img("create", "-q", "-f", "raw", "raw", "2M", cwd=d)
    io("raw", "raw", "write -P 1 0 700k", "write -P 2 1M 300k")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "raw", "q", cwd=d)
    shutil.copy(d / "q", d / "base")
    shutil.copy(d / "q", d / "other")
    io("qcow2", "other", "write -P 7 200k 900k")
    qemu_img("snapshot", "-c", "s", "q", cwd=d)
    shutil.copy(d / "raw", d / "s.raw")
    io("qcow2", "q", "write -P 9 64k 100k")
    qemu_img("convert", "-O", "raw", "q", "q.raw", cwd=d)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "-o", "cluster_size=4k", "top", cwd=d)
    io("qcow2", "top", "write -P 3 100k 200k", "write -z 1M 64k", "write -P 4 1900k 100k")
    qemu_img("convert", "-O", "raw", "top", "full.raw", cwd=d)
    return d


# arguments; the image that changes and what it may read as afterwards (None: it may be gone); whether the
# command can simply be run again.
COMMANDS = [
    ("commit top", "top", ["full.raw"], True),
    ("rebase -b other -F qcow2 top", "top", ["full.raw"], True),
    ("rebase -b= top", "top", ["full.raw"], True),
    ("amend -o compat=0.10 q", "q", ["q.raw"], False),
    ("amend -o refcount_bits=64 q", "q", ["q.raw"], True),
    ("resize q 3M", "q", ["q.raw"], True),
    ("snapshot -c t q", "q", ["q.raw"], False),
    ("snapshot -a s q", "q", ["q.raw", "s.raw"], True),
    ("snapshot -d s q", "q", ["q.raw"], False),
    ("bitmap --add q b", "q", ["q.raw"], False),
    ("convert -O qcow2 raw new", "new", ["raw", None], True),
    ("convert -O qcow2 -c raw base", "base", ["raw"], True),  # over an image that is there
    ("dd -O qcow2 if=raw of=new bs=64k", "new", ["raw", None], True),
    ("create -q -f qcow2 q 2M", "q", ["q.raw", "zeros"], True),
]
CHANGED_TOO = {"commit top": {"base"}}


def digests(d):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in d.iterdir() if p.is_file()}


def environment():
    """Calls that strace sees; and no search for leaks, which does not work under it."""
    asan = os.environ.get("ASAN_OPTIONS", "")
    return dict(os.environ, STRATA_AIO="threads", ASAN_OPTIONS=asan + ":detect_leaks=0")


def run_injected(strata, d, args, inject):
    env = environment()
    return subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=" + CALLS, "-e", "inject=" + inject,
                           strata, *args], cwd=d, env=env, capture_output=True, text=True, timeout=60,
                          stdin=subprocess.DEVNULL)


def words(command):
    return [w if w != "-b=" else "--backing=" for w in command.split()]


def judge(d, before, command, image, contents, what):
    """Only the image has changed; it is sound, and reads as one of `contents`."""
    now = digests(d)
    may = {image} | CHANGED_TOO.get(command, set())
    assert {n: h for n, h in now.items() if n not in may} == {n: h for n, h in before.items() if n not in may}, what
    if image not in now:
        assert None in contents, what
        return
    qemu_img("check", "-q", image, cwd=d, status=(0, 3))
    for content in contents:
        if content == "zeros":
            if not qemu_img("map", image, cwd=d).stdout.splitlines()[1:]:
                return
        elif content and qemu_img("compare", "-q", "-f", "raw", content, image, cwd=d, status=(0, 1)).returncode == 0:
            return
    assert False, (what, "reads otherwise")


@pytest.mark.parametrize("how", ["KILL", "INT", "ENOSPC"])
@pytest.mark.parametrize("command,image,contents,again", COMMANDS, ids=[c[0].replace(" ", "_") for c in COMMANDS])
def test_interrupted(strata, kept, tmp_path, command, image, contents, again, how):
    strata, ended = os.path.abspath(strata), 0
    for at in AT[how]:
        d = tmp_path / str(at)
        subprocess.run(["cp", "-a", "--sparse=always", kept, d], check=True)
        before = digests(d)
        inject = f"{ROOM}:error=ENOSPC:when={at}+" if how == "ENOSPC" else f"{CALLS}:signal={how}:when={at}"
        p = run_injected(strata, d, words(command), inject)
        what = (command, how, at, p.returncode, p.stderr)
        ended += p.returncode != 0
        if how == "ENOSPC" and p.returncode:
            assert "No space left" in p.stderr, what
        judge(d, before, command, image, contents, what)
        if again and p.returncode:
            p = subprocess.run([strata, *words(command)], cwd=d, capture_output=True, text=True, timeout=60)
            assert p.returncode == 0, (what, "again", p.stderr)
        shutil.rmtree(d)
    # commit catches SIGINT and stops between two pieces, of which this one has few.
    assert ended or how == "INT", "it never came to that"


def test_a_create_that_fails_leaves_no_data_file(strata, tmp_path):
    for at in 1, 2, 3:
        p = run_injected(os.path.abspath(strata), tmp_path,
                         ["create", "-q", "-f", "qcow2", "-o", "data_file=data,preallocation=metadata", "new", "8M"],
                         f"{ROOM}:error=ENOSPC:when={at}+")
        if p.returncode:
            assert os.listdir(tmp_path) == [], at
        for name in os.listdir(tmp_path):
            os.unlink(tmp_path / name)


def test_a_create_over_an_image_that_fails_leaves_the_old_data_file(strata, tmp_path, run):
    run("create", "-q", "-f", "qcow2", "-o", "data_file=data", "new", "1M", cwd=tmp_path)
    before = digests(tmp_path)
    p = run_injected(os.path.abspath(strata), tmp_path,
                     ["create", "-q", "-f", "qcow2", "-o", "data_file=data,preallocation=full", "new", "8M"],
                     f"{ROOM}:error=ENOSPC:when=1+")
    assert p.returncode == 1 and digests(tmp_path) == before


def test_an_interrupt_ends_a_command_that_only_reads(strata, kept):
    """SIGINT does to a reader what it does to any program."""
    p = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=pread64,preadv", "-e",
                        "inject=pread64,preadv:signal=INT:when=1", os.path.abspath(strata), "compare", "raw", "base"],
                       cwd=kept, env=environment(), capture_output=True, timeout=60)
    assert p.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 130)
