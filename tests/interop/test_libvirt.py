# SPDX-License-Identifier: MIT
"""libvirt's storage driver works on the drop-in name: a session daemon whose PATH begins with ours, a pool
that is a folder, and `virsh vol-*`.  A second daemon with Debian's qemu-img gets the same commands; what
libvirt tells of the volumes must be the same.

The daemon runs as nobody when the tests run as root: only then is it a session daemon.
"""
import contextlib
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time

import pytest

NOBODY = 65534
URI = "storage:///session"

# What each volume holds on disk and when is the only thing that may differ.
NORMAL = [
    (r"<allocation .*?</allocation>", "<allocation/>"),
    (r"<physical .*?</physical>", "<physical/>"),
    (r"<timestamps>.*?</timestamps>", "<timestamps/>"),
    (r"Allocation: .*", "Allocation:"),
]

XML = """<volume type='file'><name>{name}</name><capacity unit='bytes'>{size}</capacity>
<target><format type='qcow2'/><compat>{compat}</compat>{more}</target></volume>"""


class Pool:
    """A daemon of its own with one pool, `images`; `log`: the arguments that qemu-img was called with."""

    def __init__(self, folder, program):
        self.folder, self.images = folder, folder / "images"
        self.log = folder / "log"
        for name in "images", "home", "run", "bin", "real":
            (folder / name).mkdir()
        shutil.copy(program, folder / "real" / "strata")  # where nobody can read it
        os.symlink("strata", folder / "real" / "qemu-img")
        shim = folder / "bin" / "qemu-img"
        shim.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\" >>'{self.log}'\nexec '{folder}/real/qemu-img' \"$@\"\n")
        shim.chmod(0o755)
        self.log.write_text("")
        self.user = {}
        if os.geteuid() == 0:
            for path in folder, *folder.iterdir():
                os.chown(path, NOBODY, NOBODY)
            self.user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "DBUS_", "LIBVIRT_"))}
        self.env |= {"HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder / "run"), "LC_ALL": "C",
                     "PATH": f"{folder / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.output = open(folder / "libvirtd.log", "w+b")
        self.daemon = subprocess.Popen(["libvirtd"], env=self.env, cwd=folder, stdin=subprocess.DEVNULL,
                                       stdout=self.output, stderr=self.output, **self.user)
        end = time.monotonic() + 30
        while not (folder / "run" / "libvirt" / "libvirt-sock").exists():
            assert self.daemon.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.05)
        self("pool-create-as", "p", "dir", "--target", self.images)

    def said(self):
        return pathlib.Path(self.output.name).read_text()

    def __call__(self, *args, status=0):
        p = subprocess.run(["virsh", "-q", "-c", URI, *map(str, args)], env=self.env, cwd=self.folder,
                           stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, **self.user)
        assert p.returncode == status, (args, p.stdout, p.stderr, self.said())
        text = (p.stdout + p.stderr).replace(str(self.folder), "FOLDER")
        for pattern, replacement in NORMAL:
            text = re.sub(pattern, replacement, text, flags=re.S if "<" in pattern else 0)
        return text

    def calls(self):
        return self.log.read_text().splitlines()

    def stop(self):
        self.daemon.terminate()
        self.daemon.wait(30)
        self.output.close()


@contextlib.contextmanager
def pool_of(program):
    for name in "libvirtd", "virsh":
        assert shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin"), f"{name} is missing: run `make setup`"
    with tempfile.TemporaryDirectory(prefix="strata-lv-") as d:
        pathlib.Path(d).chmod(0o755)
        pool = Pool(pathlib.Path(d), program)
        try:
            yield pool
        finally:
            pool.stop()


@pytest.fixture(scope="module")
def ours(strata):
    with pool_of(os.path.abspath(strata)) as pool:
        yield pool


@pytest.fixture(scope="module")
def theirs():
    with pool_of("/usr/bin/qemu-img") as pool:
        yield pool


def grouped(lines):
    """One virsh for all that must succeed in a row; starting it is what takes time."""
    for fails, group in itertools.groupby(lines, lambda line: line[0] == "!"):
        if fails:
            yield from ((True, [line[1:]]) for line in group)
        else:
            yield False, list(group)


@pytest.fixture
def both(ours, theirs):
    """both("vol-create-as p a 1M", ...): runs them in either pool, and what libvirt says must be the same; a
    line that begins with ! must fail.  Gives the arguments that ours was called with.  Afterwards the
    volumes are gone.
    """

    def call(*lines, xml=None):
        answers, calls = [], []
        for pool in ours, theirs:
            before = len(pool.calls())
            (pool.folder / "xml").write_text(xml or "")
            answers.append([pool("; ".join(group).replace("IMAGES", str(pool.images)), status=int(fails))
                            for fails, group in grouped(lines)])
            calls.append([c.replace(str(pool.images) + "/", "") for c in pool.calls()[before:]])
        assert answers[0] == answers[1]
        assert calls[0] == calls[1] != []
        return calls[0]

    yield call
    for pool in ours, theirs:
        for name in os.listdir(pool.images):
            os.unlink(pool.images / name)
        pool("pool-refresh", "p")


def fill(pools, name, fmt, *commands):
    for pool in pools:
        subprocess.run(["qemu-io", "-f", fmt, *sum((["-c", c] for c in commands), []), pool.images / name],
                       check=True, stdout=subprocess.DEVNULL)


def same(pool, a, b):
    subprocess.run(["/usr/bin/qemu-img", "compare", pool.images / a, pool.images / b], check=True,
                   stdout=subprocess.DEVNULL)


# libvirt writes raw files itself, unless something is to be put into them.
@pytest.mark.parametrize("fmt", ["qcow2", "qcow", "qed", "vdi", "vpc"])
def test_libvirt_creates_a_volume(both, fmt):
    calls = both(f"vol-create-as p v 20M --format {fmt}", "vol-info v --pool p", "vol-dumpxml v --pool p",
                 "pool-refresh p", "vol-dumpxml v --pool p", "vol-delete v --pool p", "vol-list p")
    assert calls[0].startswith(f"create -f {fmt}") and calls[0].endswith("v 20480K")


def test_libvirt_creates_a_volume_with_options(both, ours, peer):
    more = "<features><lazy_refcounts/></features><clusterSize unit='KiB'>128</clusterSize>"
    both("vol-create p xml", xml=XML.format(name="v", size=1 << 30, compat="1.1", more=more))
    out = peer("qemu-img", "info", ours.images / "v").stdout
    assert "lazy refcounts: true" in out and "cluster_size: 131072" in out and "compat: 1.1" in out


def test_libvirt_creates_a_volume_with_preallocated_metadata(both, ours, peer):
    both("vol-create-as p v 64M --format qcow2 --prealloc-metadata", "vol-info v --pool p")
    peer("qemu-img", "check", ours.images / "v")


def test_libvirt_creates_an_overlay(both):
    both("vol-create-as p base 16M --format qcow2",
         "vol-create-as p top 16M --format qcow2 --backing-vol base --backing-vol-format qcow2",
         "vol-create-as p grown 32M --format qcow2 --backing-vol IMAGES/base --backing-vol-format qcow2",
         "vol-dumpxml top --pool p", "vol-dumpxml grown --pool p",
         "!vol-create-as p lost 16M --format qcow2 --backing-vol nothing --backing-vol-format qcow2")


def test_libvirt_clones_a_volume(both, ours, theirs):
    both("vol-create-as p v 16M --format qcow2")
    fill((ours, theirs), "v", "qcow2", "write -P 1 1M 3M", "write -z 2M 64k", "write -P 2 16252928 64k")
    calls = both("vol-clone v copy --pool p", "vol-clone v ahead --pool p --prealloc-metadata",
                 "vol-info copy --pool p", "!vol-clone v copy --pool p", "!vol-clone none other --pool p")
    assert all(c.startswith("convert ") for c in calls)
    same(ours, "v", "copy")
    same(ours, "v", "ahead")


@pytest.mark.parametrize("there,here", [("raw", "qcow2"), ("qcow2", "raw")])
def test_libvirt_makes_a_volume_from_another_of_another_format(both, ours, theirs, there, here):
    xml = f"<volume><name>copy</name><capacity>8388608</capacity><target><format type='{here}'/></target></volume>"
    if there == "qcow2":
        both("vol-create-as p v 8M --format qcow2")
    else:
        for pool in ours, theirs:
            pool("vol-create-as", "p", "v", "8M", "--format", "raw")
    fill((ours, theirs), "v", there, "write -P 1 1M 3M")
    both("vol-create-from p xml v --inputpool p", "vol-dumpxml copy --pool p", xml=xml)
    same(ours, "v", "copy")


def test_libvirt_resizes_a_volume(both, ours, peer):
    both("vol-create-as p v 16M --format qcow2", "vol-resize v 32M --pool p", "vol-info v --pool p",
         "vol-resize v 8M --delta --pool p", "vol-info v --pool p", "!vol-resize v 8M --pool p",
         "vol-resize v 8M --shrink --pool p", "!vol-resize v 12M --allocate --pool p", "vol-info v --pool p")
    peer("qemu-img", "check", ours.images / "v")


def test_libvirt_wipes_a_volume(both, ours, theirs):
    both("vol-create-as p v 2M --format qcow2")
    fill((ours, theirs), "v", "qcow2", "write -P 1 0 1M")
    for pool in ours, theirs:
        pool("vol-wipe", "v", "--pool", "p")
        assert not (pool.images / "v").read_bytes().strip(b"\0")


def test_libvirt_uploads_and_downloads_a_volume(both, ours, theirs, strata):
    for pool in ours, theirs:
        subprocess.run([strata, "create", "-q", "-f", "qcow2", pool.images / "made", "4M"], check=True)
        (pool.images / "made").chmod(0o644)
    both("vol-create-as p v 4M --format qcow2", "vol-upload v IMAGES/made --pool p", "pool-refresh p",
         "vol-info v --pool p", "vol-download v IMAGES/back --pool p", "pool-refresh p", "vol-info back --pool p")
