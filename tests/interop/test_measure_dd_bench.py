# SPDX-License-Identifier: MIT
"""strata measure, dd and bench beside qemu-img."""
import json
import os
import random
import re
import subprocess

import pytest

MIB = 1 << 20


@pytest.fixture
def disks(peer, tmp_path):
    """A raw disk with data, zeros and holes; a qcow2 overlay over it."""
    raw, top = tmp_path / "a.raw", tmp_path / "top.qcow2"
    rnd = random.Random(7)
    with open(raw, "wb") as f:
        f.truncate(20 * MIB)
        for at in 5000, 3 * MIB, 9 * MIB + 512, 20 * MIB - 4096:
            f.seek(at)
            f.write(rnd.randbytes(4096 if at > 19 * MIB else 100000))
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", top)
    peer("qemu-io", "-c", "write -P 5 100k 10k", "-c", "write -z 3M 1M", top)
    return raw, top


MEASURES = [
    ["-O", "qcow2", "--size", "1G"],
    ["-O", "qcow2", "--size", "0"],
    ["-O", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "--size", "3G"],
    ["-O", "qcow2", "-o", "preallocation=full", "--size", "100M"],
    ["-O", "raw", "--size", "1000"],
    ["--size", "5G"],
    ["RAW"],
    ["-O", "qcow2", "-f", "raw", "RAW"],
    ["-O", "qcow2", "-o", "cluster_size=2M", "-f", "raw", "RAW"],
    ["-O", "qcow2", "-o", "cluster_size=512", "-f", "raw", "RAW"],
    ["-O", "qcow2", "TOP"],
    ["-O", "qcow2", "-o", "compat=0.10", "TOP"],
    ["-O", "qcow2", "-o", "backing_file=x,backing_fmt=raw", "TOP"],
    ["-O", "raw", "TOP"],
]


@pytest.mark.parametrize("args", MEASURES, ids=" ".join)
@pytest.mark.parametrize("output", ["human", "json"])
def test_measure_says_what_the_peer_says(strata, peer, disks, tmp_path, args, output):
    """Under its name.  Our own numbers are those of our own files, see below."""
    link = tmp_path / "qemu-img"
    link.symlink_to(os.path.abspath(strata))
    args = [{"RAW": disks[0], "TOP": disks[1]}.get(a, a) for a in args]
    ours = subprocess.run([link, "measure", f"--output={output}", *args], capture_output=True,
                          text=True, check=True).stdout
    assert ours == peer("qemu-img", "measure", f"--output={output}", *args).stdout


def measured(run, *args):
    m = json.loads(run("measure", "--output=json", "-O", "qcow2", *args).stdout)
    return m["required"], m["fully-allocated"]


def sparse_source(path, rnd, size):
    """Runs of bytes that are not zero, aligned and not, and nothing between."""
    with open(path, "wb") as f:
        f.truncate(size)
        for _ in range(rnd.choice([0, 1, 3, 20])):
            at = rnd.randrange(max(size, 1))
            at -= at % rnd.choice([1, 512, 4096, 65536])
            n = min(rnd.choice([1, 512, 5000, 65536, 700 * 1024]), size - at)
            # Whole file system blocks, since the map knows nothing smaller.
            low, high = at // 4096 * 4096, min(-(-(at + n) // 4096) * 4096, size)
            f.seek(low)
            f.write(bytes(rnd.randrange(1, 256) for _ in range(64)) * (-(-(high - low) // 64)))
        f.truncate(size)


def options_of(rnd, big):
    cluster = rnd.choice([4096, 65536, 262144, 1 << 21] if big else [512, 1024, 2048, 4096, 65536])
    o = [f"cluster_size={cluster}"]
    if rnd.random() < .2:
        return ",".join(o + ["compat=0.10"])
    o.append(f"refcount_bits={rnd.choice([1, 2, 4, 8, 16, 32, 64])}")
    if cluster >= 16384 and rnd.random() < .4:
        o.append("extended_l2=on")
    if rnd.random() < .15:
        o.append(f"preallocation={rnd.choice(['metadata', 'falloc', 'full'])}")
    return ",".join(o)


@pytest.mark.parametrize("seed", range(30))
def test_measure_is_exact(run, peer, tmp_path, seed):
    """Sources as the map says they are: required is the length of our file, and no less than that of
    the peer; of a disk full of data it is what "fully allocated" said."""
    rnd = random.Random(seed)
    size = rnd.choice([0, 512, 5 * MIB + 512, 3 * MIB + 1000, 9 * MIB, 17 * MIB])
    raw, full, out = tmp_path / "raw", tmp_path / "full", tmp_path / "out"
    sparse_source(raw, rnd, size)
    source, fmt = raw, "raw"
    if rnd.random() < .4:
        peer("qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=4k", raw, tmp_path / "q")
        source, fmt = tmp_path / "q", "qcow2"
    options = options_of(rnd, rnd.random() < .5)
    required, fully = measured(run, "-f", fmt, "-o", options, source)
    if size:
        assert measured(run, "-o", options, "--size", size)[1] == fully
    run("convert", "-f", fmt, "-O", "qcow2", "-o", options, source, out)
    assert out.stat().st_size == required, options
    peer("qemu-img", "check", out)
    peer("qemu-img", "convert", "-f", fmt, "-O", "qcow2", "-o", options, source, tmp_path / "theirs")
    if "=512" not in options:  # with those, its refcount tables grow otherwise
        assert (tmp_path / "theirs").stat().st_size <= required, options
    full.write_bytes(b"\x5a" * size)
    run("convert", "-f", "raw", "-O", "qcow2", "-o", options, full, out)
    assert out.stat().st_size == fully, options


@pytest.mark.parametrize("cluster,bits", [(512, 64), (512, 1), (1024, 32), (4096, 64)])
def test_measure_counts_the_growth_of_refcount_tables(run, peer, tmp_path, cluster, bits):
    """At every length up to where the table has been made anew a few times."""
    options = f"cluster_size={cluster},refcount_bits={bits}"
    raw, out = tmp_path / "raw", tmp_path / "out"
    for size in [n * cluster * 64 // bits * cluster // 512 * 97 for n in (1, 2, 3, 5, 9)]:
        size = min(max(size, 64 * 1024), 48 * MIB) // 4096 * 4096
        with open(raw, "wb") as f:
            f.truncate(size * 2)
            f.write(b"\x11" * size)
        required, _ = measured(run, "-f", "raw", "-o", options, raw)
        run("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, out)
        assert out.stat().st_size == required
        peer("qemu-img", "check", out)


def test_measure_scan_sees_zeros_that_were_written(run, tmp_path):
    rnd = random.Random(3)
    raw, out = tmp_path / "raw", tmp_path / "out"
    for options in "cluster_size=512", "cluster_size=64k", "cluster_size=2M":
        blocks = [rnd.choice([b"\0" * 4096, b"\0" * 65536, rnd.randbytes(700), b"x" * 5000])
                  for _ in range(200)]
        raw.write_bytes(b"".join(blocks))
        run("convert", "-f", "raw", "-O", "qcow2", "-o", options, raw, out)
        exact = measured(run, "--scan", "-f", "raw", "-o", options, raw)[0]
        assert out.stat().st_size == exact <= measured(run, "-f", "raw", "-o", options, raw)[0]


def test_measure_refusals(run, disks):
    for args, words in (
            ([], "a FILE or --size"), (["--size", "1G", disks[0]], "exclude"),
            (["-f", "raw", "--size", "1G"], "go with a FILE"), (["-O", "fancy", "--size", "1"], "fancy"),
            (["-O", "qcow2", "-o", "clustersize=1", "--size", "1"], "cluster"),
            (["--size", "-1"], "not a size"), (["--size", "9E"], "9E")):
        assert words in run("measure", *args, status=1).stderr


# ---------------------------------------------------------------- dd


@pytest.mark.parametrize("args", [[], ["bs=100k", "count=9999"],
                                  ["bs=4096", "skip=5119"], ["bs=1M", "skip=3"], ["count=0"]],
                         ids=lambda a: " ".join(a) or "all")
def test_dd_takes_what_the_peer_takes(run, peer, disks, tmp_path, args):
    for source in disks:
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        run("dd", f"if={source}", f"of={ours}", *args)
        peer("qemu-img", "dd", f"if={source}", f"of={theirs}", *args)
        assert ours.read_bytes() == theirs.read_bytes()


def test_dd_skips_more_than_it_copies(run, disks, tmp_path):
    """qemu-img 7.2 does not: it takes the skip off the count, so the two are not compared."""
    run("dd", f"if={disks[0]}", f"of={tmp_path / 'o'}", "bs=1M", "skip=3", "count=2")
    assert (tmp_path / "o").read_bytes() == disks[0].read_bytes()[3 * MIB:5 * MIB]


def test_dd_into_qcow2(run, peer, disks, tmp_path):
    out = tmp_path / "out"
    run("dd", "-O", "qcow2", f"if={disks[1]}", f"of={out}", "bs=1M", "skip=2")
    peer("qemu-img", "check", out)
    peer("qemu-img", "convert", "-O", "raw", out, tmp_path / "raw")
    peer("qemu-img", "convert", "-O", "raw", disks[1], tmp_path / "whole")
    assert (tmp_path / "raw").read_bytes() == (tmp_path / "whole").read_bytes()[2 * MIB:]
    assert out.stat().st_blocks * 512 < 2 * MIB, "holes stay holes"


def test_dd_behind_the_end_says_so_and_makes_an_empty_disk(run, disks, tmp_path):
    p = run("dd", f"if={disks[0]}", f"of={tmp_path / 'o'}", "bs=1M", "skip=21")
    assert "shorter" in p.stderr
    assert (tmp_path / "o").stat().st_size == 0


def test_dd_refusals(run, disks, tmp_path):
    out = tmp_path / "out"
    for args, words in ((["if=x"], "of=FILE"), ([f"if={disks[0]}", f"of={out}", "bs=0"], "bs=0"),
                        ([f"if={disks[0]}", f"of={out}", "bs=4G"], "2147483647"),
                        ([f"if={disks[0]}", f"of={out}", "skp=1"], "did you mean 'skip'"),
                        (["foo"], "unknown operand"), ([f"if={disks[0]}", f"of={out}", "count=x"], "size"),
                        ([f"if={disks[0]}", f"of={disks[0]}"], "overwritten")):
        assert words in run("dd", *args, status=1).stderr
    assert not out.exists()


# ---------------------------------------------------------------- bench


def plan_of(text):
    assert re.search(r"^Run completed in \d+\.\d{3} seconds\.$", text, re.M), text
    return re.sub(r"in \d+\.\d{3} s", "in N s", text)


@pytest.mark.parametrize("args", [["-c", "100"], ["-c", "50", "-d", "4", "-s", "8k", "-S", "64k", "-o", "1M"],
                                  ["-w", "-c", "64", "-d", "8", "--flush-interval", "16"],
                                  ["-w", "-c", "64", "-d", "8", "--flush-interval", "16", "--no-drain"]],
                         ids=" ".join)
def test_bench_prints_what_the_peer_prints(run, peer, disks, args):
    ours = run("bench", "-f", "raw", *args, disks[0]).stdout
    assert plan_of(ours) == plan_of(peer("qemu-img", "bench", "-f", "raw", *args, disks[0]).stdout)


def test_bench_writes_the_pattern_where_it_says(run, disks):
    before = disks[0].read_bytes()
    run("bench", "-f", "raw", "-w", "--pattern=7", "-c", "10", "-d", "3", "-s", "512", "-S", "4096",
        "-o", "8192", disks[0])
    data = bytearray(before)
    for i in range(10):
        data[8192 + i * 4096:8192 + i * 4096 + 512] = b"\7" * 512
    assert disks[0].read_bytes() == bytes(data)


def test_bench_goes_round_the_disk(run, peer, tmp_path):
    small = tmp_path / "small"
    peer("qemu-img", "create", "-q", small, "1M")
    run("bench", "-f", "raw", "-w", "--pattern=9", "-c", "20", "-d", "1", "-s", "64k", small)
    assert small.read_bytes() == b"\x09" * MIB


def test_bench_reads_leave_the_image_alone(run, disks):
    before = disks[1].read_bytes()
    run("bench", "-c", "1000", "-i", "threads", disks[1])
    assert disks[1].read_bytes() == before


def test_bench_refusals(run, disks):
    for args, words in ((["--flush-interval=5"], "write tests"),
                        (["-w", "--flush-interval=5"], "smaller than the depth"),
                        (["-s", "1G"], "too small"), (["-o", "1T"], "too small"), (["-n"], "-t none"),
                        (["-d", "0"], "between"), (["-s", "2M", "-d", "1000"], "memory"),
                        (["-i", "magic"], "threads")):
        assert words in run("bench", "-f", "raw", *args, disks[0], status=1).stderr
