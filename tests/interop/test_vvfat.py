# SPDX-License-Identifier: MIT
"""A directory as a FAT disk, seen by dosfstools, mtools, 7-Zip and qemu-img."""
import json
import os
import random
import resource
import subprocess

import pytest

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FORMS = ["", "12:", "16:", "32:", "floppy:", "12:floppy:", "floppy:16:"]


class Disk:
    """The disk of a directory as raw files, and what others see in it."""

    def __init__(self, run, peer, name, path):
        self.run, self.peer, self.path = run, peer, path
        self.volume = path
        run("convert", "-q", "-O", "raw", name, path)
        if "floppy:" not in name:  # the partition alone, which most tools want
            self.volume = path.with_suffix(".part")
            part = {"driver": "raw", "offset": 63 * 512, "file": name}
            run("convert", "-q", "-O", "raw", "json:" + json.dumps(part), self.volume)

    def check(self):
        text = self.peer("fsck.fat", "-n", "-v", self.volume).stdout
        assert "differences" not in text and "Wrong" not in text, text
        return text

    def names(self):
        env = dict(os.environ, LC_ALL="C.UTF-8")
        text = self.peer("mdir", "-/", "-a", "-b", "-i", self.volume, env=env).stdout
        return {line[3:].rstrip("/") for line in text.splitlines()}

    def get(self, name):
        env = dict(os.environ, LC_ALL="C.UTF-8")
        return subprocess.run(["mtype", "-i", self.volume, f"::{name}"], env=env, check=True,
                              capture_output=True).stdout


@pytest.fixture
def tree(tmp_path):
    rng, root = random.Random(3), tmp_path / "tree"
    (root / "sub/deep/er").mkdir(parents=True)
    (root / "PLAIN.TXT").write_bytes(b"plain")
    (root / "Größe über alles.txt").write_bytes(rng.randbytes(9000))
    (root / "日本語").write_bytes(b"wide")
    (root / "empty").write_bytes(b"")
    for i in range(40):
        (root / f"sub/a rather long name, number {i}.text").write_bytes(rng.randbytes(i * 97))
    (root / "sub/deep/er/last").write_bytes(rng.randbytes(70000))
    return root


def shown(root):
    return {str(p.relative_to(root)) for p in root.rglob("*")}


def start(path):
    """What a small tree fills of a large disk."""
    with open(path, "rb") as f:
        return f.read(2 * MIB)


def peer_dir(d):
    return d.peer("mdir", "-i", d.volume, "::").stdout.replace(" ", "")


@pytest.fixture
def disk(run, peer, tmp_path):
    return lambda name, out="disk.raw": Disk(run, peer, name, tmp_path / out)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f or "plain")
def test_every_form_is_a_sound_file_system_with_every_file(disk, tree, form):
    d = disk(f"fat:{form}{tree}")
    d.check()
    assert d.names() == shown(tree)
    for p in tree.rglob("*"):
        if p.is_file():
            assert d.get(p.relative_to(tree)) == p.read_bytes(), p


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f or "plain")
def test_every_form_is_as_large_as_that_of_qemu(run, peer, tree, form):
    for p in tree.rglob("*"):  # qemu takes no such names
        if not p.name.isascii():
            p.unlink()
    size = json.loads(run("info", "--output=json", f"fat:{form}{tree}").stdout)["virtual-size"]
    info = peer("qemu-img", "info", "--output=json", f"fat:{form}{tree}").stdout
    assert json.loads(info)["virtual-size"] == size


def test_seven_zip_reads_the_disk(disk, peer, tree, tmp_path):
    (tree / "beyond 16 bits 😀").write_bytes(b"wide")  # mtools knows no such characters
    d = disk(f"fat:32:{tree}")
    peer("7zz", "x", "-y", f"-o{tmp_path}/out", d.volume)
    assert shown(tmp_path / "out") >= shown(tree)
    assert (tmp_path / "out/sub/deep/er/last").read_bytes() == \
        (tree / "sub/deep/er/last").read_bytes()


def test_the_same_directory_gives_the_same_bytes(disk, tree):
    a, b = disk(f"fat:{tree}", "a"), disk(f"fat:{tree}", "b")
    assert all(start(x) == start(y) for x, y in [(a.path, b.path), (a.volume, b.volume)])


def test_names_that_fat_cannot_say_are_shown_short_and_once(disk, run, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    names = ["Case", "case", "CASE", "a:b?", "ab ", "ab.", "...", "über", "ÜBER", "tab\tin"]
    for i, name in enumerate(names):
        (root / name).write_bytes(b"%d" % i)
    with open(os.fsencode(root) + b"/bad\xff\xfe", "wb") as f:
        f.write(b"10")
    d = disk(f"fat:{root}")
    d.check()
    got = d.names()
    assert len(got) == 11 and len({n.lower() for n in got}) == 11
    assert {d.get(n) for n in got} == {b"%d" % i for i in range(11)}
    assert "short names only: 9" in run("info", f"fat:{root}").stdout


def test_short_names_stay_apart_in_large_directories(disk, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    for i in range(3000):
        (root / f"directory entry {i:05}").write_bytes(b"")
    d = disk(f"fat:{root}")
    d.check()
    assert d.names() == shown(root)


def test_links_and_special_files_are_left_out(disk, run, tmp_path):
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "folder").symlink_to(tmp_path)
    (root / "loop").symlink_to(".")
    os.mkfifo(root / "sub/fifo")
    d = disk(f"fat:{root}")
    assert d.names() == {"file", "sub"}
    assert b"outside" not in start(d.path)
    out = run("info", f"fat:{root}").stdout
    assert "skipped links: 3" in out and "skipped special: 1" in out


def test_a_sparse_file_over_2_gib_makes_a_larger_disk_and_stays_sparse(disk, run, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    with open(root / "large", "wb") as f:
        f.truncate(4 * GIB - 64 * KIB)  # fsck.fat miscounts the last cluster below 4 GiB
        f.seek(3 * GIB)
        f.write(b"here")
    d = disk(f"fat:{root}")
    assert os.stat(d.path).st_blocks < 64 * 2048 and os.stat(d.path).st_size > 4 * GIB
    assert "fat type: 32" in run("info", f"fat:{root}").stdout
    assert "4294901760" in peer_dir(d)
    d.check()


@pytest.mark.parametrize("size,name,word", [(4 * GIB, "fat:", "a file on FAT at most 4294967295"),
                                            (3 * GIB, "fat:16:", "do not fit in FAT16"),
                                            (4 * MIB, "fat:floppy:", "do not fit on a floppy"),
                                            (1, "fat:floppy:32:", "too small for FAT32")])
def test_what_does_not_fit_is_refused_with_its_reason(run, tmp_path, size, name, word):
    root = tmp_path / "tree"
    root.mkdir()
    with open(root / "file", "wb") as f:
        f.truncate(size)
    assert word in run("info", f"{name}{root}", status=1).stderr


@pytest.mark.parametrize("options,word", [({"dir": "/nowhere"}, "No such file"),
                                          ({"dir": ""}, "dir is missing"),
                                          ({"dir": "/", "fat-type": 13}, "12, 16 or 32"),
                                          ({"dir": "/", "label": "a/b"}, "label 'a/b'"),
                                          ({"dir": "/", "label": "x" * 12}, "up to 11 signs"),
                                          ({"dri": "/"}, "dir")])
def test_bad_options_are_named(run, options, word):
    name = "json:" + json.dumps({"driver": "vvfat", **options})
    assert word in run("info", name, status=1).stderr


def test_the_options_do_what_the_name_does(run, tree):
    name = "json:" + json.dumps({"driver": "vvfat", "dir": str(tree), "fat-type": 12,
                                 "floppy": True, "label": "CIDATA"})
    data = json.loads(run("info", "--output=json", name).stdout)["format-specific"]["data"]
    assert (data["fat-type"], data["floppy"], data["label"]) == (12, True, "CIDATA")


@pytest.mark.parametrize("form,word", [("", "can only be read"), ("rw:", "only in a temporary snapshot")])
def test_writing_is_refused(run, tree, form, word):
    assert "format: raw" in run("info", f"fat:{form}{tree}").stdout
    assert word in run("io", "-c", "write 0 512", f"fat:{form}{tree}", status=1).stderr


def test_few_descriptors_are_open_at_once(strata, tmp_path):
    root, out = tmp_path / "tree", tmp_path / "out"
    root.mkdir()
    for i in range(400):
        (root / f"{i}").write_bytes(b"%d" % i)
    subprocess.run([strata, "convert", "-q", "-O", "raw", f"fat:{root}", out], check=True,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (110, 110)))
    assert out.stat().st_size == 528482304


def test_files_that_change_meanwhile_give_zeros_or_an_error(strata, tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    for name in ["cut", "gone", "new", "sound"]:
        (root / name).write_bytes(name.encode() * 1000)
    # 512-byte boot sector, two FATs of 252 sectors, 32 sectors of root directory
    data = (63 + 1 + 2 * 252 + 32) * 512
    p = subprocess.Popen([strata, "io", "-r", f"fat:{root}"], stdin=subprocess.PIPE, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    p.stdin.write("length\n")
    p.stdin.flush()
    while "504" not in p.stdout.readline():
        pass
    (root / "cut").write_bytes(b"")
    (root / "gone").unlink()
    (root / "other").write_bytes(b"x" * 5000)
    (root / "other").rename(root / "new")
    for i in range(4):
        p.stdin.write(f"read -v {data + i * 8192} 16\n")
    out = p.communicate(timeout=20)[0]
    assert out.count("Input/output error") == 2 and "soundsound" in out, out
    assert "00 00 00 00 00 00 00 00" in out, out
