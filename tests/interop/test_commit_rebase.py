# SPDX-License-Identifier: MIT
"""strata commit, rebase and resize beside qemu-img: what the disks read as, and what check says.

Disks are made by qemu-img and qemu-io, changed by strata, and read again by both.
"""
import os
import random
import subprocess

import pytest

MIB = 1 << 20
K64 = 1 << 16


def write_at(peer, path, fmt, *runs):
    """runs: (pattern, offset, length); pattern None: zeros by metadata."""
    args = []
    for pattern, offset, length in runs:
        what = f"write -P {pattern} {offset} {length}" if pattern is not None else \
            f"write -z {offset} {length}"
        args += ["-c", what]
    peer("qemu-io", "-f", fmt, *args, path)


def content(peer, path, fmt, tmp_path):
    out = tmp_path / "content.raw"
    peer("qemu-img", "convert", "-f", fmt, "-O", "raw", path, out)
    return out.read_bytes()


def make(peer, path, fmt="qcow2", size="8M", backing=None, opts=""):
    args = ["create", "-q", "-f", fmt]
    if backing:
        args += ["-b", backing[0], "-F", backing[1]]
    if opts:
        args += ["-o", opts]
    peer("qemu-img", *args, path, *([size] if size else []))


@pytest.fixture
def chain(peer, tmp_path):
    """base.raw <- mid.qcow2 <- top.qcow2, each with data of its own."""
    base, mid, top = (tmp_path / n for n in ("base.raw", "mid.qcow2", "top.qcow2"))
    make(peer, base, "raw")
    write_at(peer, base, "raw", (1, 0, 4 * MIB))
    make(peer, mid, size=None, backing=(base, "raw"))
    write_at(peer, mid, "qcow2", (2, MIB, MIB), (2, 6 * MIB, 300))
    make(peer, top, size=None, backing=(mid, "qcow2"))
    write_at(peer, top, "qcow2", (3, MIB + 5000, 70000), (None, 2 * MIB, MIB), (3, 7 * MIB, 512))
    return base, mid, top


def check(peer, path):
    peer("qemu-img", "check", "-f", "qcow2", path)


# ---------------------------------------------------------------- commit


def test_commit_puts_all_into_the_backing_file_and_empties(run, peer, chain, tmp_path):
    base, mid, top = chain
    before = content(peer, top, "qcow2", tmp_path)
    p = run("commit", top)
    assert p.stdout == "Image committed.\n"
    assert content(peer, mid, "qcow2", tmp_path) == before
    assert content(peer, top, "qcow2", tmp_path) == before
    for image in mid, top:
        check(peer, image)
    runs = peer("qemu-img", "map", "--output=json", top).stdout
    assert '"depth": 0' not in runs, runs
    assert top.stat().st_blocks * 512 <= 6 * K64


def test_emptied_overlay_is_as_small_as_the_peers(run, peer, tmp_path):
    sizes = []
    for who in "ours", "theirs":
        base, top = tmp_path / f"b-{who}", tmp_path / f"t-{who}"
        make(peer, base, size="256M")
        make(peer, top, size=None, backing=(base, "qcow2"))
        write_at(peer, top, "qcow2", (7, 0, 40 * MIB), (8, 200 * MIB, 10 * MIB))
        if who == "ours":
            run("commit", top)
        else:
            peer("qemu-img", "commit", top)
        check(peer, top)
        sizes.append(top.stat().st_size)
    assert sizes[0] <= sizes[1] + K64


def test_commit_d_keeps_the_overlay(run, peer, chain, tmp_path):
    base, mid, top = chain
    before = content(peer, top, "qcow2", tmp_path)
    bytes_before = peer("qemu-img", "map", "--output=json", top).stdout
    run("commit", "-d", top)
    assert peer("qemu-img", "map", "--output=json", top).stdout == bytes_before
    assert content(peer, mid, "qcow2", tmp_path) == before


@pytest.mark.parametrize("who", ["strata", "qemu-img"])
def test_commit_b_into_the_lowest_image(run, peer, chain, tmp_path, who):
    base, mid, top = chain
    before = content(peer, top, "qcow2", tmp_path)
    if who == "strata":
        p = run("commit", "-b", base, top)
        assert p.stdout == "Image committed.\n"
    else:
        peer("qemu-img", "commit", "-b", base, top)
    assert content(peer, base, "raw", tmp_path) == before
    assert content(peer, top, "qcow2", tmp_path) == before, "the overlay stays valid"


def test_commit_b_writes_zeros_behind_a_short_image_in_between(run, peer, tmp_path):
    """top 8M over mid 2M over base 8M: behind 2M the top reads as zeros, and base must too."""
    base, mid, top = (tmp_path / n for n in ("base", "mid", "top"))
    make(peer, base)
    write_at(peer, base, "qcow2", (1, 0, 8 * MIB))
    make(peer, mid, size="2M", backing=(base, "qcow2"))
    make(peer, top, size="8M", backing=(mid, "qcow2"))
    before = content(peer, top, "qcow2", tmp_path)
    assert before[2 * MIB:] == bytes(6 * MIB)
    run("commit", "-b", base, top)
    assert content(peer, base, "qcow2", tmp_path) == before
    check(peer, base)


def test_commit_b_grows_the_base_and_keeps_what_lies_between(run, peer, tmp_path):
    low, base, mid, top = (tmp_path / n for n in ("low", "base", "mid", "top"))
    make(peer, low)
    write_at(peer, low, "qcow2", (9, 0, 8 * MIB))
    make(peer, base, size="2M", backing=(low, "qcow2"))
    make(peer, mid, size="8M", backing=(base, "qcow2"))
    write_at(peer, mid, "qcow2", (2, 3 * MIB, 70000))
    make(peer, top, size="8M", backing=(mid, "qcow2"))
    before = content(peer, top, "qcow2", tmp_path)
    run("commit", "-b", base, top)
    assert content(peer, base, "qcow2", tmp_path) == before
    for image in base, mid, top:
        check(peer, image)


def test_commit_grows_a_shorter_base(run, peer, tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    make(peer, base, "raw", "1M")
    make(peer, top, size="4M", backing=(base, "raw"))
    write_at(peer, top, "qcow2", (5, 2 * MIB, 1000))
    before = content(peer, top, "qcow2", tmp_path)
    run("commit", top)
    assert content(peer, base, "raw", tmp_path) == before


def test_commit_leaves_a_longer_base_as_long_as_it_is(run, peer, tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    make(peer, base, "raw", "4M")
    write_at(peer, base, "raw", (1, 0, 4 * MIB))
    make(peer, top, size="1M", backing=(base, "raw"))
    write_at(peer, top, "qcow2", (5, 0, 1000))
    run("commit", top)
    data = base.read_bytes()
    assert data == b"\5" * 1000 + b"\1" * (4 * MIB - 1000)


def test_commit_refusals(run, peer, chain, tmp_path):
    base, mid, top = chain
    alone = tmp_path / "alone"
    make(peer, alone)
    assert "has no backing file" in run("commit", alone, status=1).stderr
    assert "not in the backing chain" in run("commit", "-b", alone, top, status=1).stderr
    os.rename(base, tmp_path / "gone")
    before = top.read_bytes()
    assert "base.raw" in run("commit", top, status=1).stderr
    assert top.read_bytes() == before


def test_commit_to_a_read_only_base_changes_nothing(run, peer, chain, strata, tmp_path):
    base, mid, top = chain
    before = top.read_bytes(), mid.read_bytes()
    mid.chmod(0o444)
    argv = [strata, "commit", top]
    if not os.geteuid():
        argv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] + argv
    p = subprocess.run(argv, capture_output=True, text=True)
    assert p.returncode == 1
    assert "Permission denied" in p.stderr, p.stderr
    assert (top.read_bytes(), mid.read_bytes()) == before


def test_commit_killed_on_the_way_can_be_run_again(strata, run, peer, tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    make(peer, base, size="64M")
    make(peer, top, size=None, backing=(base, "qcow2"))
    write_at(peer, top, "qcow2", (5, 0, 32 * MIB))
    before = content(peer, top, "qcow2", tmp_path)
    p = subprocess.Popen([strata, "commit", "-r", "16M", top], stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        p.wait(0.7)
    p.kill()
    p.wait()
    assert content(peer, top, "qcow2", tmp_path) == before
    run("commit", top)
    assert content(peer, base, "qcow2", tmp_path) == before
    assert content(peer, top, "qcow2", tmp_path) == before
    check(peer, top)


def test_commit_interrupted_leaves_the_overlay(strata, run, peer, tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    make(peer, base, size="64M")
    make(peer, top, size=None, backing=(base, "qcow2"))
    write_at(peer, top, "qcow2", (5, 0, 32 * MIB))
    before = content(peer, top, "qcow2", tmp_path)
    p = subprocess.Popen([strata, "commit", "-r", "16M", top], stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        p.wait(0.7)
    p.terminate()
    assert p.wait(10) == 1
    assert content(peer, top, "qcow2", tmp_path) == before
    for image in base, top:
        check(peer, image)


# ---------------------------------------------------------------- rebase


def rebased(run, peer, image, *args):
    run("rebase", *args, image)
    check(peer, image)


def test_rebase_keeps_what_the_image_reads_as(run, peer, chain, tmp_path):
    base, mid, top = chain
    before = content(peer, top, "qcow2", tmp_path)
    other = tmp_path / "other.qcow2"
    make(peer, other, size="5M")
    write_at(peer, other, "qcow2", (1, 0, MIB), (8, 3 * MIB + 100, 2 * MIB - 100))
    rebased(run, peer, top, "-b", other, "-F", "qcow2")
    assert content(peer, top, "qcow2", tmp_path) == before
    info = peer("qemu-img", "info", top).stdout
    assert f"backing file: {other}\n" in info and "backing file format: qcow2" in info


def test_rebase_onto_the_base_below_takes_in_the_middle_only(run, peer, chain, tmp_path):
    base, mid, top = chain
    before = content(peer, top, "qcow2", tmp_path)
    rebased(run, peer, top, "-b", base, "-F", "raw")
    assert content(peer, top, "qcow2", tmp_path) == before
    ours = top.stat().st_blocks
    # 1 MiB of the middle and some clusters: what both read from base.raw is not copied.
    assert ours * 512 < 2 * MIB


def test_rebase_to_none_stands_alone(run, peer, chain, tmp_path):
    base, mid, top = chain
    before = content(peer, top, "qcow2", tmp_path)
    rebased(run, peer, top, "-b", "")
    base.unlink()
    mid.unlink()
    assert content(peer, top, "qcow2", tmp_path) == before
    assert "backing" not in peer("qemu-img", "info", top).stdout


@pytest.mark.parametrize("opts", ["compat=0.10", "cluster_size=512", "cluster_size=2M"])
def test_rebase_of_other_geometries(run, peer, chain, tmp_path, opts):
    base, mid, _ = chain
    top = tmp_path / "other-top"
    make(peer, top, size="9M", backing=(mid, "qcow2"), opts=opts)
    write_at(peer, top, "qcow2", (3, MIB + 5000, 70000), (3, 9 * MIB - 700, 512))
    before = content(peer, top, "qcow2", tmp_path)
    new = tmp_path / "new"
    make(peer, new, "raw", "20M")
    write_at(peer, new, "raw", (6, 0, 20 * MIB))
    rebased(run, peer, top, "-b", new, "-F", "raw")
    assert content(peer, top, "qcow2", tmp_path) == before


def test_rebase_of_random_disks(run, peer, tmp_path):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rnd = random.Random(seed)
    for i in range(4):
        old, new, top = (tmp_path / f"{n}{i}" for n in ("old", "new", "top"))
        size = 4 * MIB + 512 * rnd.randrange(100)
        for path, fmt, length in (old, "qcow2", size - 512 * rnd.randrange(4000)), \
                (new, "raw", size - 512 * rnd.randrange(4000)):
            make(peer, path, fmt, str(length))
            write_at(peer, path, fmt, *(
                (rnd.choice([0, 1, 1, 2]), at, min(512 * rnd.randrange(1, 300), length - at))
                for at in (512 * rnd.randrange(length // 512) for _ in range(12))))
        make(peer, top, size=str(size), backing=(old, "qcow2"))
        write_at(peer, top, "qcow2", *((4, 512 * rnd.randrange(7000), 3000) for _ in range(4)))
        before = content(peer, top, "qcow2", tmp_path)
        rebased(run, peer, top, "-b", new, "-F", "raw", *(["-c"] if i % 2 else []))
        assert content(peer, top, "qcow2", tmp_path) == before


def test_rebase_c_compresses_what_it_writes(run, peer, chain, tmp_path):
    base, mid, top = chain
    before = content(peer, top, "qcow2", tmp_path)
    rebased(run, peer, top, "-c", "-b", "")
    assert content(peer, top, "qcow2", tmp_path) == before
    runs = peer("qemu-img", "check", top).stdout
    assert " 0.00% compressed" not in runs


def test_rebase_u_only_changes_the_name(run, peer, chain, tmp_path):
    base, mid, top = chain
    head = top.read_bytes()[K64:]
    os.rename(mid, tmp_path / "moved.qcow2")
    run("rebase", "-u", "-b", "moved.qcow2", "-F", "qcow2", top)
    assert top.read_bytes()[K64:] == head
    assert "backing file: moved.qcow2" in peer("qemu-img", "info", top).stdout
    content(peer, top, "qcow2", tmp_path)


def test_rebase_makes_the_difference_of_two_images(run, peer, tmp_path):
    """The example of qemu-img's documentation."""
    base, modified, diff = (tmp_path / n for n in ("base.img", "modified.img", "diff.qcow2"))
    base.write_bytes(random.Random(3).randbytes(8 * MIB))
    modified.write_bytes(base.read_bytes())
    write_at(peer, modified, "raw", (5, 3 * MIB, 1000))
    make(peer, diff, size=None, backing=(modified, "raw"))
    rebased(run, peer, diff, "-b", base, "-F", "raw")
    want = modified.read_bytes()
    modified.unlink()
    assert content(peer, diff, "qcow2", tmp_path) == want
    assert diff.stat().st_blocks * 512 < 8 * K64


def test_rebase_refusals(run, peer, chain, tmp_path):
    base, mid, top = chain
    before = top.read_bytes()
    cases = [
        (["rebase", top], "backing file is missing"),
        (["rebase", "-b", base, top], "without its format"),
        (["rebase", "-b", base, "-F", "fancy", top], "unknown format 'fancy'"),
        (["rebase", "-b", "none.raw", "-F", "raw", top], "none.raw"),
        (["rebase", "-b", top, "-F", "qcow2", top], "its own backing file"),
        (["rebase", "-f", "raw", "-b", mid, "-F", "qcow2", base], "no backing files"),
        (["rebase", "-u", "-b", "x" * 1024, "-F", "raw", top], "1023"),
    ]
    for args, words in cases:
        assert words in run(*args, status=1).stderr, args
    assert top.read_bytes() == before


# ---------------------------------------------------------------- resize


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_resize_up_and_down(run, peer, tmp_path, fmt):
    disk = tmp_path / "disk"
    make(peer, disk, fmt, "8M")
    write_at(peer, disk, fmt, (5, 0, 8 * MIB))
    sizes = []
    for want in "12M", "+1M", "13M":
        assert run("resize", "-f", fmt, disk, want).stdout == "Image resized.\n"
    assert content(peer, disk, fmt, tmp_path) == b"\5" * (8 * MIB) + bytes(5 * MIB)
    for want, size in ("-6M", 7 * MIB), ("3M", 3 * MIB), ("1000448", 1000448):
        assert "--shrink" in run("resize", "-f", fmt, disk, want, status=1).stderr
        run("resize", "-f", fmt, "--shrink", disk, want)
        assert content(peer, disk, fmt, tmp_path) == b"\5" * size
        sizes.append(disk.stat().st_size)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    run("resize", "-f", fmt, disk, "4M")
    assert content(peer, disk, fmt, tmp_path) == b"\5" * 1000448 + bytes(4 * MIB - 1000448)
    if fmt == "qcow2":
        check(peer, disk)


def test_shrinking_frees_whole_tables_and_leaks_nothing(run, peer, tmp_path):
    disk = tmp_path / "disk"
    make(peer, disk, size="64M", opts="cluster_size=512")
    write_at(peer, disk, "qcow2", *((i % 250 + 1, i * MIB, 3000) for i in range(64)))
    before = content(peer, disk, "qcow2", tmp_path)
    for size in 50 * MIB + 1536, 32768 * 3, 512:
        run("resize", "--shrink", disk, size)
        check(peer, disk)
        assert content(peer, disk, "qcow2", tmp_path) == before[:size]


def test_shrinking_frees_compressed_clusters(run, peer, tmp_path):
    raw, disk = tmp_path / "raw", tmp_path / "disk"
    raw.write_bytes(b"".join(bytes([i]) * 4096 for i in range(256)) * 4)
    peer("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, disk)
    run("resize", "--shrink", disk, "100000")
    check(peer, disk)
    # qcow2 counts in sectors
    assert content(peer, disk, "qcow2", tmp_path)[:100000] == raw.read_bytes()[:100000]
    run("resize", disk, "4M")
    assert content(peer, disk, "qcow2", tmp_path)[100352:] == bytes(4 * MIB - 100352)
    check(peer, disk)


def test_shrinking_keeps_what_a_snapshot_holds(run, peer, tmp_path):
    disk = tmp_path / "disk"
    make(peer, disk, size="8M", opts="cluster_size=512")
    write_at(peer, disk, "qcow2", (5, 0, 8 * MIB))
    peer("qemu-img", "snapshot", "-c", "one", disk)
    write_at(peer, disk, "qcow2", (6, 2 * MIB, 3 * MIB))
    run("resize", "--shrink", disk, "1M")
    check(peer, disk)
    peer("qemu-img", "snapshot", "-a", "one", disk)
    assert content(peer, disk, "qcow2", tmp_path) == b"\5" * (8 * MIB)


def test_growing_over_a_longer_backing_file_shows_zeros(run, peer, tmp_path):
    base, top = tmp_path / "base", tmp_path / "top"
    make(peer, base, "raw", "4M")
    write_at(peer, base, "raw", (1, 0, 4 * MIB))
    make(peer, top, size="1M", backing=(base, "raw"))
    run("resize", top, "6M")
    assert content(peer, top, "qcow2", tmp_path) == b"\1" * MIB + bytes(5 * MIB)
    check(peer, top)


def test_resize_with_preallocation(run, peer, tmp_path):
    disk = tmp_path / "disk"
    make(peer, disk, "raw", "1M")
    run("resize", "-f", "raw", "--preallocation=falloc", disk, "+2M")
    assert disk.stat().st_size == 3 * MIB and disk.stat().st_blocks * 512 >= 2 * MIB
    p = run("resize", "-f", "raw", "--shrink", "--preallocation=falloc", disk, "-1M", status=1)
    assert "--preallocation" in p.stderr


def test_resize_refusals(run, peer, tmp_path):
    disk = tmp_path / "disk"
    make(peer, disk, "raw", "1M")
    for size, words in ("-2M", "between 1 and"), ("0", "between 1 and"), ("+8E", ""), \
            ("1X", "is not a size"), ("", "is not a size"), ("+", "is not a size"):
        assert words in run("resize", "-f", "raw", disk, size, status=1).stderr
    assert disk.stat().st_size == MIB
