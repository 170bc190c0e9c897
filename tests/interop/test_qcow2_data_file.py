# SPDX-License-Identifier: MIT
"""qcow2 whose data lie in a file of their own, beside qemu-img both ways.

Random operations are in test_qcow2_model.py; here each rule by itself.
"""
import json
import os
import random
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from qcow2_image import COMPRESSED, COPIED, ZERO, Qcow2  # noqa: E402

K, M = 1 << 10, 1 << 20
RAW = "data_file_raw=on"


def create(run, tmp_path, size="4M", options="", image="a.qcow2", data="data", more=()):
    """The image a.qcow2, its data in `data` beside it."""
    o = f"data_file={tmp_path}/{data}" + ("," if options else "") + options
    run("create", "-q", "-f", "qcow2", "-o", o, *more, tmp_path / image, size)
    return tmp_path / image


def io(run, image, *commands, status=0, opts=()):
    return run("io", "-f", "qcow2", *opts, *[x for c in commands for x in ("-c", c)], image,
               status=status)


def peer_io(peer, image, *commands):
    return peer("qemu-io", "-f", "qcow2", *[x for c in commands for x in ("-c", c)], image)


def clean(run, peer, *images):
    for image in images:
        p = peer("qemu-img", "check", "-f", "qcow2", image, status=None)
        assert p.returncode == 0, p.stdout + p.stderr
        run("check", "-f", "qcow2", image)


def describe(run_or_peer, image, *program):
    return json.loads(run_or_peer(*program, "info", "--output=json", image).stdout)


@pytest.fixture
def qemu_img(strata, tmp_path):
    """strata under the name qemu-img."""
    link = tmp_path / "bin" / "qemu-img"
    link.parent.mkdir()
    link.symlink_to(strata)
    return lambda *a: subprocess.run([link, *map(str, a)], capture_output=True, text=True)


def without_children(text):
    return text.split("Child node")[0]


# ---------------------------------------------------------------- creation and description

@pytest.mark.parametrize("options", ["", RAW, "preallocation=metadata", "preallocation=falloc",
                                     "extended_l2=on", "extended_l2=on," + RAW,
                                     "cluster_size=512"])
def test_both_create_and_use_the_same_image(run, peer, tmp_path, options):
    a = create(run, tmp_path, "10M", options)
    b = tmp_path / "b.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o",
         f"data_file={tmp_path}/b.data" + ("," if options else "") + options, b, "10M")
    assert (tmp_path / "data").stat().st_size == (tmp_path / "b.data").stat().st_size == 10 * M
    for image, data in ((a, "data"), (b, "b.data")):
        clean(run, peer, image)
        io(run, image, "read -P 0 0 10M", "write -P 5 1000 3k", "write -P 6 9M 1M")
        peer_io(peer, image, "read -P 5 1000 3k", "read -P 6 9M 1M", "write -P 7 5M 100k",
                "write -z 9M 64k")
        io(run, image, "read -P 7 5M 100k", "read -P 0 9M 64k", "read -P 5 1000 3k")
        clean(run, peer, image)
        bytes_ = (tmp_path / data).read_bytes()
        assert bytes_[5 * M:5 * M + 100 * K] == b"\7" * (100 * K) and len(bytes_) == 10 * M
        if RAW in options:
            peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / data, image)
            run("compare", "-f", "raw", "-F", "qcow2", tmp_path / data, image)


@pytest.mark.parametrize("options", ["", RAW, "extended_l2=on,lazy_refcounts=on"])
def test_info_says_what_qemu_img_says_and_opens_nothing(run, peer, qemu_img, tmp_path, options):
    image = create(run, tmp_path, options=options)
    ours = describe(run, image)
    ours.pop("children", None)  # of later versions
    assert ours == describe(peer, image, "qemu-img")
    assert without_children(qemu_img("info", image).stdout) == peer("qemu-img", "info",
                                                                    image).stdout
    (tmp_path / "data").unlink()
    assert f"data file: {tmp_path}/data" in run("info", image).stdout
    run("check", image)


def same_map(peer, qemu_img, image):
    assert qemu_img("map", image).stdout == peer("qemu-img", "map", image).stdout
    ours = json.loads(qemu_img("map", "--output=json", image).stdout)
    for row in ours:
        row.pop("compressed")  # a key of later versions
    assert ours == json.loads(peer("qemu-img", "map", "--output=json", image).stdout)


def test_the_map_names_the_data_file(run, peer, qemu_img, tmp_path):
    image = create(run, tmp_path)
    io(run, image, "write -P 1 1M 64k", "write -P 1 2M 100k", "write -z 3M 64k")
    same_map(peer, qemu_img, image)
    assert f"0x100000        0x10000         0x100000        {tmp_path}/data\n" in run(
        "map", image).stdout
    raw = create(run, tmp_path, options=RAW, image="b.qcow2", data="b")
    same_map(peer, qemu_img, raw)


def test_measure_counts_both_files(run, peer, qemu_img, tmp_path):
    for options in ("data_file=x", "data_file=x,data_file_raw=on"):
        args = ["measure", "-O", "qcow2", "-o", options, "--size", "100M", "--output=json"]
        assert qemu_img(*args).stdout == peer("qemu-img", *args).stdout
    raw = tmp_path / "s.raw"
    raw.write_bytes(random.Random(1).randbytes(3 * M))
    for options in ("", RAW):
        o = f"data_file={tmp_path}/m" + ("," if options else "") + options
        said = json.loads(run("measure", "-O", "qcow2", "-o", o, "--output=json", raw).stdout)
        run("convert", "-O", "qcow2", "-o", o, raw, tmp_path / "m.qcow2")
        sizes = [(tmp_path / n).stat().st_size for n in ("m", "m.qcow2")]
        assert said["required"] == sum(sizes)


@pytest.mark.parametrize("options,more,says", [
    ("data_file_raw=on", [], "data_file_raw=on needs data_file"),
    ("data_file=d,compat=0.10", [], "data_file needs compat=1.1"),
    ("data_file=d,data_file_raw=on", ["-b", "base", "-F", "raw"], "exclude one another"),
    ("data_file=", [], "a name of 0 bytes"),
    ("data_file=a.qcow2", [], "it is the image itself"),
    ("data_file=gone/d", [], "data file"),
])
def test_what_cannot_be_is_refused_and_makes_nothing(run, tmp_path, options, more, says):
    (tmp_path / "base").write_bytes(b"x" * 512)
    p = run("create", "-f", "qcow2", "-o", options, *more, "a.qcow2", "1M", status=1, cwd=tmp_path)
    assert says in p.stderr
    assert os.listdir(tmp_path) == ["base"]


def test_a_data_file_in_use_is_not_replaced(run, strata, tmp_path):
    image = create(run, tmp_path)
    user = subprocess.Popen([strata, "io", "-f", "qcow2", image], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)
    try:
        user.stdin.write("write -P 3 0 4k\nflush\n")
        user.stdin.flush()
        while "wrote" not in user.stdout.readline():
            pass
        p = run("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "b", "1M",
                status=1)
        assert "data file" in p.stderr and not (tmp_path / "b").exists()
        # The locks are on the data file itself, too.
        p = run("io", "-f", "raw", "-c", "write 0 512", tmp_path / "data", status=1)
        assert "lock" in p.stderr or "in use" in p.stderr, p.stderr
    finally:
        user.communicate("quit\n", timeout=30)
    io(run, image, "read -P 3 0 4k")


# ---------------------------------------------------------------- opening

def test_another_data_file_can_be_named(run, tmp_path):
    image = create(run, tmp_path)
    io(run, image, "write -P 3 0 1M")
    (tmp_path / "data").rename(tmp_path / "moved")
    p = io(run, image, "read 0 512", status=1)
    assert "data file" in p.stderr and "No such file" in p.stderr
    for key in (f"data-file={tmp_path}/moved", f"data-file.filename={tmp_path}/moved",
                f"data-file.driver=file,data-file.filename={tmp_path}/moved"):
        run("io", "--image-opts", "-c", "read -P 3 0 1M",
            f"driver=qcow2,file.filename={image},{key}")
    plain = tmp_path / "plain.qcow2"
    run("create", "-q", "-f", "qcow2", plain, "1M")
    p = run("io", "--image-opts", "-c", "read 0 512",
            f"driver=qcow2,file.filename={plain},data-file={tmp_path}/moved", status=1)
    assert "can only be set for images with an external data file" in p.stderr


def test_an_image_with_no_name_for_its_data_file_needs_the_option(run, peer, tmp_path):
    image = create(run, tmp_path)
    q = Qcow2(image)
    header = q.read(0, 4096)
    at = header.index(b"\x44\x41\x54\x41")
    q.write(at, b"\x12\x34\x56\x78")  # an extension that nobody knows
    p = io(run, image, "read 0 512", status=1)
    assert "'data-file' is required for this image" in p.stderr
    run("io", "--image-opts", "-c", "read -P 0 0 512",
        f"driver=qcow2,file.filename={image},data-file={tmp_path}/data")
    assert "data-file" not in describe(run, image)["format-specific"]["data"]


def rename_data(image, text):
    """The header names `text`, which is as long as what it names now."""
    q = Qcow2(image)
    header = q.read(0, 4096)
    at = header.index(b"\x44\x41\x54\x41")
    length = int.from_bytes(header[at + 4:at + 8], "big")
    assert len(text) <= length
    q.write(at + 4, len(text).to_bytes(4, "big") + text.encode().ljust((length + 7) // 8 * 8, b"\0"))
    pad = (length + 7) // 8 * 8 - (len(text) + 7) // 8 * 8
    if pad:  # what is left over becomes an extension of its own
        assert pad >= 8
        q.write(at + 8 + (len(text) + 7) // 8 * 8, (0x12345678).to_bytes(4, "big")
                + (pad - 8).to_bytes(4, "big"))


@pytest.mark.parametrize("claim", [
    'json:{"driver":"file","filename":"SECRET"}', "nbd://127.0.0.1:9/x", "file:SECRET", "SECRET",
    "../SECRET", "/etc/hostname", "a.qcow2", "fd:3", "memory:"])
def test_a_claimed_data_file_is_a_path_beside_the_image_or_nothing(run, strata, tmp_path, claim):
    """CVE-2024-4467: what an image names is not parsed, and not opened outside of its folder."""
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "SECRET").write_bytes(b"s" * M)
    image = create(run, folder, "1M", data="x" * 100)
    rename_data(image, claim)
    for verb in (["io", "-r", "-c", "read -v 0 512"], ["map"], ["compare", image]):
        p = subprocess.run([strata, *map(str, verb), image], capture_output=True, text=True,
                           cwd=folder)
        assert p.returncode in (1, 2) and "data file" in p.stderr, (verb, p.stdout, p.stderr)
        assert "73 73 73" not in p.stdout
    assert claim in json.loads(subprocess.run([strata, "info", "--output=json", image],
                                              capture_output=True, text=True).stdout)[
        "format-specific"]["data"]["data-file"]


def test_a_relative_name_lies_beside_the_image(run, strata, tmp_path):
    (tmp_path / "in").mkdir()
    run("create", "-q", "-f", "qcow2", "-o", "data_file=d", tmp_path / "in/a.qcow2", "1M")
    assert sorted(os.listdir(tmp_path / "in")) == ["a.qcow2", "d"]
    io(run, tmp_path / "in/a.qcow2", "write -P 1 0 4k")
    assert (tmp_path / "in/d").read_bytes()[:4096] == b"\1" * 4096


def test_the_drop_in_name_finds_a_relative_data_file_where_qemu_does(run, peer, qemu_img, tmp_path):
    (tmp_path / "in").mkdir()
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=d", "in/a.qcow2", "1M",
         cwd=tmp_path)
    assert (tmp_path / "d").exists()
    args = ["convert", "-O", "raw", "in/a.qcow2", "out"]
    p = subprocess.run([tmp_path / "bin/qemu-img", *args], cwd=tmp_path, capture_output=True)
    assert p.returncode == 0, p.stderr
    run(*args, status=1, cwd=tmp_path)


def test_a_missing_data_file_changes_nothing(run, tmp_path):
    image = create(run, tmp_path)
    Qcow2(image).set64(88, 1 << 5)  # an autoclear bit that a writer would clear
    before = image.read_bytes()
    (tmp_path / "data").unlink()
    io(run, image, "write 0 512", status=1)
    assert image.read_bytes() == before and not (tmp_path / "data").exists()


def test_a_short_data_file_reads_as_zeros_behind_its_end(run, peer, tmp_path):
    image = create(run, tmp_path)
    io(run, image, "write -P 3 0 4M")
    os.truncate(tmp_path / "data", M + 100)
    io(run, image, f"read -P 3 0 {M + 100}", f"read -P 0 {M + 100} {3 * M - 100}",
       "write -P 4 3M 1k", "read -P 0 2M 1M")
    peer_io(peer, image, f"read -P 3 0 {M + 100}", f"read -P 0 {M + 100} {2 * M - 100}",
            "read -P 4 3M 1k")
    clean(run, peer, image)


def test_the_raw_bit_stays_and_others_go(run, peer, tmp_path):
    image = create(run, tmp_path, options=RAW)
    q = Qcow2(image)
    q.set64(88, 2 | 1 << 5)
    io(run, image, "write -P 1 0 512")
    assert q.get64(88) == 2
    plain = tmp_path / "plain.qcow2"
    run("create", "-q", "-f", "qcow2", plain, "1M")
    Qcow2(plain).set64(88, 2)
    io(run, plain, "write -P 1 0 512")  # without a data file the bit means nothing
    assert Qcow2(plain).get64(88) == 0


# ---------------------------------------------------------------- what it does

def test_zeros_and_discards_reach_a_raw_data_file(run, peer, tmp_path):
    image, data = create(run, tmp_path, options=RAW), tmp_path / "data"
    io(run, image, "write -P 7 0 4M", "write -z 1M 100k", "write -z -u 2M 64k", "discard 3M 256k")
    for r in (lambda *a: run(*a), lambda *a: peer("qemu-img", *a)):
        r("compare", "-f", "raw", "-F", "qcow2", data, image)
    bytes_ = data.read_bytes()
    assert bytes_[M:M + 100 * K] == bytes(100 * K) and bytes_[2 * M:2 * M + 64 * K] == bytes(64 * K)
    assert Qcow2(image).l2(16) & ZERO == 0
    clean(run, peer, image)


def test_discards_punch_holes_where_asked(run, tmp_path):
    image, data = create(run, tmp_path), tmp_path / "data"
    io(run, image, "write -P 7 0 4M", "discard 0 4M", opts=["-d", "unmap"])
    assert data.stat().st_blocks == 0 and data.stat().st_size == 4 * M
    io(run, image, "read -P 0 0 4M")


def test_there_is_no_compression(run, peer, tmp_path):
    image = create(run, tmp_path, "1M")
    p = io(run, image, "write -c 0 64k", status=1)
    assert "not supported" in p.stdout + p.stderr
    raw = tmp_path / "s.raw"
    raw.write_bytes(b"strata" * 100000)
    p = run("convert", "-c", "-O", "qcow2", "-o", f"data_file={tmp_path}/c", raw, tmp_path / "c.q",
            status=1)
    assert "data file" in p.stderr
    assert not (tmp_path / "c.q").exists()
    clean(run, peer, image)


def test_there_are_no_snapshots(run, peer, tmp_path):
    image = create(run, tmp_path, "1M")
    p = run("snapshot", "-c", "s", image, status=1)
    assert "external data file" in p.stderr
    clean(run, peer, image)


def test_a_copy_does_not_overwrite_what_it_reads(run, tmp_path):
    image = create(run, tmp_path, "1M")
    io(run, image, "write -P 1 0 1M")
    raw = tmp_path / "r.raw"
    raw.write_bytes(b"r" * M)
    for args in (["-O", "raw", image, tmp_path / "data"],
                 ["-O", "qcow2", "-o", f"data_file={raw}", raw, tmp_path / "b"],
                 ["-O", "qcow2", "-o", "data_file=data", image, tmp_path / "b"]):
        p = run("convert", *args, status=1)
        assert "would be overwritten" in p.stderr
    p = run("convert", "-O", "qcow2", "-o", "data_file=d", image, "-", status=1)
    assert "a stream is one file" in p.stderr
    assert raw.read_bytes() == b"r" * M and (tmp_path / "data").read_bytes() == b"\1" * M


def test_the_recorded_name_is_amended_without_the_file(run, peer, tmp_path):
    image = create(run, tmp_path, "1M")
    io(run, image, "write -P 1 0 1M")
    (tmp_path / "data").rename(tmp_path / "moved")
    run("amend", "-o", f"data_file={tmp_path}/moved", image)
    io(run, image, "read -P 1 0 1M")
    run("amend", "-o", "size=2M", image)
    assert (tmp_path / "moved").stat().st_size == 2 * M
    p = run("amend", "-o", "compat=0.10", image, status=1)
    assert "external data file" in p.stderr
    clean(run, peer, image)


@pytest.mark.parametrize("options", ["", RAW, "extended_l2=on", "extended_l2=on," + RAW])
def test_sizes_change_in_both_files(run, peer, tmp_path, options):
    image, data = create(run, tmp_path, "1M", options), tmp_path / "data"
    io(run, image, "write -P 7 0 1M")
    run("resize", "-q", "--shrink", image, str(700 * K + 512))
    assert data.stat().st_size == 700 * K + 512
    clean(run, peer, image)
    run("resize", "-q", image, str(5 * M + 512))
    assert data.stat().st_size == 5 * M + 512
    peer_io(peer, image, f"read -P 7 0 {700 * K + 512}",
            f"read -P 0 {700 * K + 512} {4 * M}", "write -P 8 5M 512")
    run("resize", "-q", "--preallocation=metadata", image, "6M")
    clean(run, peer, image)
    if RAW in options:
        run("compare", "-f", "raw", "-F", "qcow2", data, image)
        peer("qemu-img", "compare", "-f", "raw", "-F", "qcow2", data, image)


def test_a_chain_over_data_files_commits_rebases_and_converts(run, peer, tmp_path):
    base = create(run, tmp_path, "1M", image="base.qcow2", data="base.data")
    io(run, base, "write -P 1 0 1M")
    top = create(run, tmp_path, "1M", image="top.qcow2", data="top.data",
                 more=["-b", base, "-F", "qcow2"])
    io(run, top, "write -P 2 100k 1k", "write -z 300k 70k", "write -P 3 900k 10k")
    model = bytearray(b"\1" * M)
    model[100 * K:101 * K], model[300 * K:370 * K] = b"\2" * K, bytes(70 * K)
    model[900 * K:910 * K] = b"\3" * (10 * K)
    want = tmp_path / "want"
    want.write_bytes(model)

    def equal(image, fmt="qcow2"):
        peer("qemu-img", "compare", "-f", "raw", "-F", fmt, want, image)
        run("compare", "-f", "raw", "-F", fmt, want, image)

    equal(top)
    for options in ("", RAW):
        o = f"data_file={tmp_path}/flat.data" + ("," if options else "") + options
        run("convert", "-O", "qcow2", "-o", o, top, tmp_path / "flat.qcow2")
        equal(tmp_path / "flat.qcow2")
    assert (tmp_path / "flat.data").read_bytes() == model
    run("convert", "-n", "-O", "qcow2", want, tmp_path / "flat.qcow2")
    equal(tmp_path / "flat.qcow2")
    run("convert", "-O", "raw", top, tmp_path / "flat.raw")
    equal(tmp_path / "flat.raw", "raw")
    other = create(run, tmp_path, "1M", image="other.qcow2", data="other.data")
    run("rebase", "-b", other, "-F", "qcow2", top)
    equal(top)
    run("commit", "-q", top)
    equal(other)
    clean(run, peer, base, top, other)
    p = run("rebase", "-u", "-b", base, "-F", "qcow2", create(run, tmp_path, "1M", RAW, "r", "r.d"),
            status=1)
    assert "data_file_raw" in p.stderr


def test_it_is_served_as_any_image(run, strata, peer, tmp_path):
    image = create(run, tmp_path)
    sock = tmp_path / "sock"
    server = subprocess.Popen([strata, "serve", "-f", "qcow2", "--socket", sock, image],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for _ in range(100):
            if sock.exists():
                break
            subprocess.run(["sleep", "0.05"])
        url = f"nbd+unix:///?socket={sock}"
        peer("qemu-io", "-f", "raw", "-c", "write -P 9 1M 100k", "-c", "flush", "-c",
             "write -z 1M 4k", url)
    finally:
        server.terminate()
        server.communicate(timeout=30)
    io(run, image, "read -P 0 1M 4k", f"read -P 9 {M + 4 * K} 96k")
    clean(run, peer, image)


# ---------------------------------------------------------------- damage

DAMAGE = {
    "another-place": lambda q: q.set_l2(1, q.l2(1) + q.cluster),
    "unaligned": lambda q: q.set_l2(1, q.l2(1) + 512),
    "compressed": lambda q: q.set_l2(1, COMPRESSED | q.cluster),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_entries_are_found_and_not_read(run, peer, tmp_path, kind):
    image = create(run, tmp_path)
    io(run, image, "write -P 7 0 256k")
    DAMAGE[kind](Qcow2(image))
    run("check", "-f", "qcow2", image, status=2)
    for command in ("read 64k 512", "write 64k 512"):
        p = io(run, image, command, status=1)
        assert "Input/output error" in p.stdout + p.stderr
    io(run, image, "read -P 7 0 64k", "read -P 7 128k 128k")


def test_an_entry_without_copied_is_written_where_it_is(run, peer, tmp_path):
    image = create(run, tmp_path)
    io(run, image, "write -P 7 0 256k")
    q = Qcow2(image)
    q.set_l2(1, q.l2(1) & ~COPIED)
    io(run, image, "write -P 8 65k 1k", "read -P 7 64k 1k", "read -P 8 65k 1k", "read -P 7 66k 62k")
    assert q.l2(1) == COPIED | 64 * K
    clean(run, peer, image)


# ---------------------------------------------------------------- the drop-in name

@pytest.mark.parametrize("args", [
    "create -f qcow2 -o extended_l2=on,cluster_size=4k a 1M",
    "create -f qcow2 -o extended_l2=on,compat=0.10 a 1M",
    "create -f qcow2 -o data_file_raw=on a 1M",
    "create -f qcow2 -o data_file=d,compat=0.10 a 1M",
    "create -f qcow2 -o data_file=d,data_file_raw=on -b base -F raw a 1M",
    "create -f qcow2 -o preallocation=metadata -b base -F raw a 1M",
    "create -f qcow2 -o data_file=d a 1M",
    "info gone", "map gone", "convert -O raw gone z", "resize gone 2M",
])
def test_the_drop_in_name_says_it_in_qemu_imgs_words(peer, qemu_img, tmp_path, args):
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=gone.d", "gone", "1M",
         cwd=tmp_path)
    (tmp_path / "gone.d").unlink()
    (tmp_path / "base").write_bytes(b"x" * 512)
    said = []
    for program in ("qemu-img", tmp_path / "bin/qemu-img"):
        p = subprocess.run([program, *args.split()], cwd=tmp_path, capture_output=True, text=True)
        lines = without_children(p.stdout).splitlines()
        said.append((p.returncode, [l for l in lines if "disk size" not in l], p.stderr))
    assert said[0] == said[1]
