# SPDX-License-Identifier: MIT
"""What a guest wrote to a directory shown as a FAT disk, committed back into the directory.

mtools write the disk through `strata mount --snapshot --commit-on-exit fat:rw:DIR`; hostile file systems are made
by writing over the bytes there.
"""
import os
import random
import resource
import signal
import struct
import subprocess
import time

import pytest

FORMS = ["", "12:", "32:", "floppy:", "floppy:16:"]
TEMP = ".strata-commit-"


def wait_until(true, what, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Guest:
    """The disk of `tree`, mounted; end() unmounts it, and the commit happens."""

    def __init__(self, strata, run, peer, tree, folder, form="", trace=None, log=None, more=(),
                 **kw):
        self.run, self.peer, self.tree, self.folder = run, peer, tree, folder
        self.floppy = "floppy" in form
        self.volume = folder / ("disk" if self.floppy else "p1")
        self.server = subprocess.Popen([*(trace or []), strata, "mount", "--foreground", "--snapshot",
                                        "--commit-on-exit", *more, f"fat:rw:{form}{tree}", folder],
                                       stderr=open(log, "wb") if log else None, **kw)
        wait_until(lambda: self.volume.exists() or self.server.poll() is not None, "not mounted")
        assert self.server.poll() is None
        with open(self.volume, "rb") as f:
            self.boot = f.read(512)

    def mtool(self, prog, *args, **kw):
        env = dict(os.environ, LC_ALL="C.UTF-8", MTOOLS_SKIP_CHECK="1")
        return subprocess.run([prog, "-i", self.volume, *args], env=env, check=True, timeout=60, **kw)

    def write(self, name, content):
        self.mtool("mcopy", "-o", "-D", "o", "-", f"::{name}", input=content)

    def end(self):
        self.run("unmount", self.folder, status=None)
        return self.server.wait(60)

    # ---- the bytes, for hostile ones
    def number(self, at, size):
        return int.from_bytes(self.boot[at:at + size], "little")

    def fat(self):
        return self.number(14, 2) * 512

    def root(self):
        return self.fat() + 2 * self.number(22, 2) * 512

    def data(self, cluster):
        return self.root() + self.number(17, 2) * 32 + (cluster - 2) * self.number(13, 1) * 512

    def patch(self, at, content):
        with open(self.volume, "r+b") as f:
            f.seek(at)
            f.write(content)

    def slot(self, short, at=None):
        """Where the short slot of that name lies in the root directory."""
        with open(self.volume, "rb") as f:
            f.seek(self.root())
            slots = f.read(512 * 32)
        for i in range(0, len(slots), 32):
            if slots[i:i + 11] == short and slots[i + 11] != 0x0f:
                return self.root() + i
        raise AssertionError(short)


@pytest.fixture
def tree(tmp_path):
    rng, root = random.Random(5), tmp_path / "tree"
    (root / "sub/deep").mkdir(parents=True)
    (root / "A.TXT").write_bytes(b"first")
    (root / "B.BIN").write_bytes(rng.randbytes(30000))
    (root / "a long name.text").write_bytes(rng.randbytes(9000))
    (root / "Größe").write_bytes(b"wide")
    (root / "empty").write_bytes(b"")
    (root / "sub/one").write_bytes(b"one")
    (root / "sub/deep/last").write_bytes(rng.randbytes(20000))
    return root


@pytest.fixture
def guest(strata, run, peer, tmp_path, tree):
    folder, made = tmp_path / "mnt", []
    folder.mkdir()

    def make(form="", **kw):
        made.append(Guest(strata, run, peer, tree, folder, form, **kw))
        return made[-1]

    yield make
    for g in made:
        if g.server.poll() is None:
            g.server.kill()
            g.server.wait()
        subprocess.run(["umount", "-l", folder], stderr=subprocess.DEVNULL)


def content(root):
    """Path -> bytes, None for folders, "->TARGET" for links."""
    out = {}
    for p in root.rglob("*"):
        name = str(p.relative_to(root))
        out[name] = "->" + os.readlink(p) if p.is_symlink() else None if p.is_dir() else p.read_bytes()
    return out


def times(root):
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- what a guest does

@pytest.mark.parametrize("form", FORMS, ids=lambda f: f or "plain")
def test_new_changed_renamed_and_deleted_files_arrive(guest, tree, form):
    want = content(tree)
    g = guest(form)
    g.write("A.TXT", b"second, and longer")
    g.write("new file, long name.txt", b"n" * 20000)
    g.write("Übermut", b"umlaut")
    g.mtool("mmd", "::made", "::made/inner")
    g.write("made/inner/leaf", b"leaf")
    g.mtool("mren", "::a long name.text", "::another long name.text")
    g.mtool("mdel", "::B.BIN", "::sub/one")
    assert g.end() == 0
    want.update({"A.TXT": b"second, and longer", "new file, long name.txt": b"n" * 20000, "Übermut": b"umlaut",
                 "made": None, "made/inner": None, "made/inner/leaf": b"leaf",
                 "another long name.text": want.pop("a long name.text")})
    del want["B.BIN"], want["sub/one"]
    assert content(tree) == want


def test_a_disk_that_nobody_wrote_to_changes_nothing(guest, tree):
    before, seen = content(tree), times(tree)
    assert guest().end() == 0
    assert content(tree) == before and times(tree) == seen


def test_files_that_the_guest_left_alone_are_the_same_files(guest, tree):
    seen = times(tree)
    g = guest()
    g.write("A.TXT", b"second")
    g.mtool("mren", "::B.BIN", "::C.BIN")
    g.mtool("mmove", "::sub/deep", "::")
    assert g.end() == 0
    now = times(tree)
    assert now[tree / "C.BIN"] == seen[tree / "B.BIN"]
    moved = next(p for p in tree.iterdir() if p.name.lower() == "deep")
    assert now[moved / "last"] == seen[tree / "sub/deep/last"]
    for name in ["a long name.text", "Größe", "empty", "sub/one"]:
        assert now[tree / name] == seen[tree / name]
    assert now[tree / "A.TXT"][0] != seen[tree / "A.TXT"][0]


def test_a_changed_file_keeps_its_mode_and_gets_the_time_of_the_guest(guest, tree):
    os.chmod(tree / "A.TXT", 0o751)
    g = guest()
    g.write("A.TXT", b"second")
    g.patch(g.slot(b"A       TXT") + 22, struct.pack("<HH", 12 << 11 | 30 << 5, 20 << 9 | 2 << 5 | 3))
    assert g.end() == 0
    st = (tree / "A.TXT").stat()
    assert st.st_mode & 0o7777 == 0o751
    assert time.localtime(st.st_mtime)[:6] == (2000, 2, 3, 12, 30, 0)


def test_a_file_that_is_changed_in_place_is_rewritten(guest, tree):
    want = bytearray((tree / "B.BIN").read_bytes())
    g = guest()
    want[9000:9004] = b"HERE"
    g.patch(g.data(cluster_of(g, b"B       BIN")) + 9000, b"HERE")
    assert g.end() == 0
    assert (tree / "B.BIN").read_bytes() == want


def test_folders_are_removed_with_what_was_in_them(guest, tree):
    g = guest()
    g.mtool("mdeltree", "::sub")
    assert g.end() == 0
    assert not (tree / "sub").exists()


def test_a_file_becomes_a_folder_and_a_folder_a_file(guest, tree):
    g = guest()
    g.mtool("mdel", "::A.TXT")
    g.mtool("mmd", "::A.TXT")
    g.write("A.TXT/inside", b"in")
    g.mtool("mdeltree", "::sub")
    g.write("sub", b"a file now")
    assert g.end() == 0
    assert (tree / "A.TXT/inside").read_bytes() == b"in"
    assert (tree / "sub").read_bytes() == b"a file now"
    assert not [p for p in tree.rglob("*") if p.name.startswith(TEMP)]


def test_two_files_that_exchange_their_names_exchange_their_contents(guest, tree):
    a, b = (tree / "A.TXT").read_bytes(), (tree / "B.BIN").read_bytes()
    g = guest()
    g.mtool("mren", "::A.TXT", "::T.TMP")
    g.mtool("mren", "::B.BIN", "::A.TXT")
    g.mtool("mren", "::T.TMP", "::B.BIN")
    assert g.end() == 0
    assert (tree / "A.TXT").read_bytes() == b and (tree / "B.BIN").read_bytes() == a


def test_a_moved_file_whose_old_name_is_taken_again_arrives_with_both(guest, tree):
    g = guest()
    g.mtool("mmove", "::sub/one", "::")
    g.write("sub/one", b"another")
    assert g.end() == 0
    moved = next(p for p in tree.iterdir() if p.name.lower() == "one")
    assert moved.read_bytes() == b"one" and (tree / "sub/one").read_bytes() == b"another"


def test_folders_that_change_places_keep_their_files(guest, tree):
    g = guest()  # sub/deep becomes deep/sub
    g.mtool("mmove", "::sub/deep", "::")
    g.mtool("mmove", "::sub", "::deep/")
    assert g.end() == 0
    got = {k.lower(): v for k, v in content(tree).items()}
    assert got["deep/sub/one"] == b"one" and len(got["deep/last"]) == 20000 and "sub" not in got


def test_names_that_fat_cannot_say_stay_as_they_are(guest, tree):
    (tree / "what?").write_bytes(b"sign")
    (tree / "a.txt").write_bytes(b"lower")  # as A.TXT but for its case
    g = guest()
    g.write("A.TXT", b"second")
    assert g.end() == 0
    assert (tree / "what?").read_bytes() == b"sign" and (tree / "a.txt").read_bytes() == b"lower"
    assert (tree / "A.TXT").read_bytes() == b"second"


def test_zeros_of_the_guest_take_no_room(guest, tree):
    g = guest()
    g.write("zeros", bytes(2 << 20))
    assert g.end() == 0
    assert (tree / "zeros").read_bytes() == bytes(2 << 20) and (tree / "zeros").stat().st_blocks < 64


def test_serve_commits_when_it_ends(run, strata, peer, tmp_path, tree):
    raw, sock = tmp_path / "new.raw", tmp_path / "s"
    name = f"fat:rw:floppy:{tree}"
    run("convert", "-q", "-O", "raw", name, raw)
    peer("mdel", "-i", raw, "::B.BIN")
    server = subprocess.Popen([strata, "serve", "--snapshot", "--commit-on-exit", "-k", sock, name],
                              stdout=subprocess.DEVNULL)
    wait_until(sock.exists, "not served")
    peer("nbdcopy", raw, f"nbd+unix:///?socket={sock}")
    assert server.wait(30) == 0
    assert not (tree / "B.BIN").exists() and (tree / "A.TXT").read_bytes() == b"first"


GUEST = """#!/usr/bin/python3
import nbd, re, sys
fd = next(m.group(1) for a in sys.argv if (m := re.match(r"driver=nbd,.*server.type=fd,server.str=(\\d+),", a)))
h = nbd.NBD()
h.connect_socket(int(fd))
with open(%r, "rb") as f:
    for at in range(0, h.get_size(), 65536):
        h.pwrite(f.read(65536), at)
h.shutdown()
"""


def test_run_commits_when_the_guest_has_ended_well(run, peer, tmp_path, tree):
    raw, qemu = tmp_path / "new.raw", tmp_path / "fake-qemu"  # a guest that writes the disk `raw`
    name = f"fat:rw:floppy:{tree}"
    run("convert", "-q", "-O", "raw", name, raw)
    peer("mdel", "-i", raw, "::B.BIN")
    qemu.write_text(GUEST % str(raw))
    qemu.chmod(0o755)
    args = ["--snapshot", "--commit-on-exit", "--qemu", qemu, "--transport", "nbd"]
    assert "reading only" in run("run", *args, f"fat:floppy:{tree}", status=1).stderr
    run("run", *args, name)
    assert not (tree / "B.BIN").exists() and (tree / "A.TXT").read_bytes() == b"first"


# ---------------------------------------------------------------- what is refused, with nothing changed

@pytest.fixture
def refused(guest, tree, tmp_path, run):
    """refused(change, word): the directory stays as `change` left it, and the disk is saved."""

    def call(change, word, form=""):
        g = guest(form, log=tmp_path / "log")
        change(g)
        before = content(tree)
        status = g.end()
        text = (tmp_path / "log").read_text()
        assert status == 1 and word in text, text
        assert content(tree) == before
        saved = tmp_path / "tree.uncommitted.qcow2"
        assert str(saved) in text
        run("check", "-q", saved)
        return saved

    return call


def test_files_that_changed_on_the_host_are_not_overwritten(refused, tree):
    def change(g):
        g.write("A.TXT", b"by the guest")
        (tree / "A.TXT").write_bytes(b"by the host")
    refused(change, "A.TXT changed in the directory")


def test_files_that_changed_on_the_host_are_not_deleted(refused, tree):
    def change(g):
        g.mtool("mdel", "::sub/one")
        (tree / "sub/one").write_bytes(b"by the host")
    refused(change, "sub/one changed in the directory")


def test_a_folder_that_holds_what_the_guest_never_saw_is_not_removed(refused, tree):
    (tree / "sub/link").symlink_to("/etc/passwd")
    refused(lambda g: g.mtool("mdeltree", "::sub"), "holds 'link'")


def test_a_name_that_a_hidden_file_has_is_not_taken(refused, tree):
    (tree / "LINK").symlink_to("/etc/passwd")
    refused(lambda g: g.write("LINK", b"x"), "LINK is new in the guest")


def test_a_folder_that_became_a_link_is_not_followed(refused, tree, tmp_path):
    outside = tmp_path / "outside"

    def change(g):
        g.write("sub/new", b"x")
        (tree / "sub").rename(outside)  # the very same folder
        (tree / "sub").symlink_to(outside)
    refused(change, "sub changed in the directory")
    assert not (outside / "new").exists()


def test_the_saved_disk_is_what_the_guest_left(refused, run, peer, tree, tmp_path):
    def change(g):
        g.write("NEW", b"kept")
        g.write("A.TXT", b"by the guest")
        (tree / "A.TXT").write_bytes(b"by the host")
    saved = refused(change, "changed in the directory", "floppy:")
    run("convert", "-q", "-O", "raw", saved, tmp_path / "raw")
    assert peer("mtype", "-i", tmp_path / "raw", "::NEW").stdout == "kept"


def small_files_only():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_contents_that_cannot_be_written_change_nothing(guest, tree, tmp_path):
    before, log = content(tree), tmp_path / "log"
    g = guest(log=log, more=["--scratch", "memory:64M"], preexec_fn=small_files_only, restore_signals=False)
    g.write("A.TXT", b"second")
    g.mtool("mmd", "::made")
    g.write("made/large", b"x" * (3 << 20))
    g.mtool("mdel", "::B.BIN")
    assert g.end() == 1
    assert "writing made/large" in log.read_text() and "could not be saved" in log.read_text()
    assert content(tree) == before


A = b"A       TXT"


def fat16(g, cluster, value):
    g.patch(g.fat() + 2 * cluster, struct.pack("<H", value))


def cluster_of(g, short):
    with open(g.volume, "rb") as f:
        f.seek(g.slot(short) + 26)
        return int.from_bytes(f.read(2), "little")


def long_slot(g, name, short=b"X          ", cluster=0, attr=0x20):
    """An entry of a long name of up to 13 units, behind all others of the root."""
    units = name.encode("utf-16-le", "surrogatepass") if isinstance(name, str) else name
    units = (units + b"\0\0" + b"\xff" * 26)[:26]
    total = 0
    for c in short:
        total = ((total >> 1 | total << 7) + c) & 255
    slot = b"\x41" + units[:10] + b"\x0f\0" + bytes([total]) + units[10:22] + b"\0\0" + units[22:]
    slot += short + bytes([attr]) + bytes(14) + struct.pack("<HI", cluster, 0)
    with open(g.volume, "rb") as f:
        f.seek(g.root())
        slots = f.read(512 * 32)
    at = next(i for i in range(0, len(slots), 32) if not slots[i])
    g.patch(g.root() + at, slot)


HOSTILE = {
    "loop": (lambda g: fat16(g, cluster_of(g, b"B       BIN") + 1, cluster_of(g, b"B       BIN")), "used twice"),
    "folder-loop": (lambda g: fat16(g, cluster_of(g, b"SUB        "), cluster_of(g, b"SUB        ")), "used twice"),
    "folder-in-itself": (lambda g: g.patch(g.data(cluster_of(g, b"SUB        ")) + 4 * 32,
                                           b"ME         \x10" + bytes(14)
                                           + struct.pack("<HI", cluster_of(g, b"SUB        "), 0) + bytes(32)),
                         "used twice"),
    "cross-link": (lambda g: g.patch(g.slot(A) + 26, struct.pack("<H", cluster_of(g, b"B       BIN"))), "used twice"),
    "cluster-beyond": (lambda g: g.patch(g.slot(A) + 26, b"\xf0\xff"), "begins at cluster 65520"),
    "cluster-one": (lambda g: g.patch(g.slot(A) + 26, b"\1\0"), "begins at cluster 1"),
    "chain-beyond": (lambda g: fat16(g, cluster_of(g, A), 0xfff0), "breaks off"),
    "chain-free": (lambda g: fat16(g, cluster_of(g, A), 0), "breaks off"),
    "bad-cluster": (lambda g: fat16(g, cluster_of(g, A), 0xfff7), "breaks off"),
    "size-absurd": (lambda g: g.patch(g.slot(A) + 28, b"\xff" * 4), "too few"),
    "size-without-cluster": (lambda g: g.patch(g.slot(A) + 26, b"\0\0"), "too few"),
    "folder-without-cluster": (lambda g: g.patch(g.slot(b"SUB        ") + 26, b"\0\0"), "begins at cluster 0"),
    "slash": (lambda g: long_slot(g, "../../x"), "forbidden"),
    "short-slash": (lambda g: g.patch(g.slot(A), b"A/B"), "forbidden"),
    "dot-dot": (lambda g: long_slot(g, ".."), "no name that a file can have"),
    "short-dot-dot": (lambda g: g.patch(g.slot(A), b"..         "), "no name that a file can have"),
    "control-sign": (lambda g: long_slot(g, "a\x01b"), "not UTF-16 text"),
    "half-pair": (lambda g: long_slot(g, "a\ud800b"), "not UTF-16 text"),
    "reserved-name": (lambda g: g.write(f"{TEMP}1-1", b"x"), "reserved"),
    "too-long": (lambda g: g.write("ü" * 200, b"x"), "bytes, and the host takes 255 at most"),
    "two-of-a-name": (lambda g: long_slot(g, "a.txt"), "differ by upper and lower case"),
    "code-page": (lambda g: g.patch(g.slot(A), b"\x9a"), "code page"),
    "formatted": (lambda g: g.patch(13, b"\x04"), "changed the boot sector"),
    "boot-sector-gone": (lambda g: g.patch(0, bytes(512)), "changed the boot sector"),
    "in-use": (lambda g: g.patch(37, b"\x01"), "not unmounted"),
    "fat-in-use": (lambda g: fat16(g, 1, 0x7fff), "not unmounted"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_damaged_file_system_is_refused_before_anything_changes(refused, what):
    change, word = HOSTILE[what]

    def all_of_it(g):
        g.write("NEW", b"would be new")
        change(g)
    refused(all_of_it, word)


def test_a_new_partition_table_is_refused(refused):
    def change(g):
        with open(g.folder / "disk", "r+b") as f:
            f.seek(446)
            f.write(bytes(16))
    refused(change, "changed the partition table")


def test_only_a_directory_named_with_rw_takes_a_commit(run, tree, tmp_path):
    (tmp_path / "m").mkdir()
    p = run("mount", "--foreground", "--snapshot", "--commit-on-exit", f"fat:{tree}", tmp_path / "m", status=1)
    assert "reading only" in p.stderr and "fat:rw:" in p.stderr
    p = run("serve", "--snapshot", "--commit-on-exit", "-k", tmp_path / "s", f"fat:{tree}", status=1)
    assert "reading only" in p.stderr


def test_an_overlay_that_was_kept_is_not_committed(run, tree, tmp_path):
    over = tmp_path / "over.qcow2"
    run("create", "-q", "-f", "qcow2", over, "528482304")
    run("rebase", "-u", "-q", "-b", f"fat:rw:{tree}", "-F", "raw", over, status=None)
    p = run("commit", "-q", "--trust", "any", over, status=1)
    assert "only at the end" in p.stderr, p.stderr


# ---------------------------------------------------------------- in the middle of it

def changes(g):
    for i in range(6):
        g.write(f"CHANGE{i}", b"new %d" % i * 1000)
        g.write(f"NEW{i}", b"made %d" % i * 1000)
    g.mtool("mren", "::RENAME", "::RENAMED")
    g.mtool("mdel", "::GONE")
    g.mtool("mmd", "::FOLDER")
    g.write("FOLDER/LEAF", b"leaf")


@pytest.mark.parametrize("call,at", [("renameat2", 1), ("renameat2", 4), ("renameat", 1), ("renameat", 3),
                                     ("fsync", 1), ("unlinkat", 1), ("mkdirat", 1)])  # counted in each thread
def test_kill_9_in_the_middle_leaves_the_old_or_the_new_of_each_file(guest, tree, tmp_path, call, at):
    for i in range(6):
        (tree / f"CHANGE{i}").write_bytes(b"old %d" % i)
    (tree / "RENAME").write_bytes(b"same")
    (tree / "GONE").write_bytes(b"gone")
    before = content(tree)
    g = guest("", trace=["strace", "-f", "-qq", "-o", tmp_path / "trace", "-e", f"trace={call}", "-e",
                         f"inject={call}:signal=KILL:when={at}"])
    changes(g)
    assert g.end() != 0
    now = {k: v for k, v in content(tree).items() if not k.startswith(TEMP)}
    for name, old in before.items():
        if name.startswith("CHANGE"):
            assert now[name] in (old, b"new %d" % int(name[-1]) * 1000), name
        elif name == "RENAME":
            assert ("RENAME" in now) != ("RENAMED" in now) and now.get("RENAMED", b"same") == b"same"
        elif name == "GONE":
            assert now.get(name, old) == old
        else:
            assert now[name] == old
    for name in set(now) - set(before):
        assert now[name] in (b"made %d" % int(name[-1]) * 1000 if name.startswith("NEW") else None, b"same", b"leaf",
                             None), name
    if "FOLDER" in now:
        assert now["FOLDER/LEAF"] == b"leaf"  # it comes with what is in it


def test_what_a_killed_commit_left_is_never_shown(run, tree):
    (tree / f"{TEMP}1-0").write_bytes(b"half")
    assert "skipped special: 1" in run("info", f"fat:{tree}").stdout
