# SPDX-License-Identifier: MIT
"""qcow2 images that strata creates, in the eyes of qemu-img: accepted, and laid out alike."""
import filecmp
import json
import os
import resource
import signal
import subprocess
import time

import pytest

CLUSTER_SIZES = [512 << i for i in range(13)]
VERSIONS = [("0.10", 16)] + [("1.1", 1 << i) for i in range(7)]
PREALLOC = ["off", "metadata", "falloc", "full"]


def create(run, name, size, status=0, **options):
    o = ",".join(f"{k}={v}" for k, v in options.items())
    return run("create", "-q", "-f", "qcow2", *(["-o", o] if o else []), name, size, status=status)


def peer_create(peer, name, size, **options):
    o = ",".join(f"{k}={v}" for k, v in options.items())
    peer("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", o] if o else []), name, size)


def assert_clean(peer, name):
    p = peer("qemu-img", "check", "-f", "qcow2", name)
    assert p.stdout.startswith("No errors were found on the image.")
    assert p.stderr == ""


def info(peer, name):
    j = json.loads(peer("qemu-img", "info", "-f", "qcow2", "--output=json", name).stdout)
    return {k: j[k] for k in ("virtual-size", "cluster-size", "format-specific")}


@pytest.mark.parametrize("prealloc", PREALLOC)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_every_shape_is_as_qemu_img_makes_it(run, peer, tmp_path, cluster_size, prealloc):
    """Each version and width: clean, same format data, same length, reads as zeros."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    size = 5 * 1024 * 1024 + 512
    for compat, bits in VERSIONS:
        options = dict(cluster_size=cluster_size, compat=compat, refcount_bits=bits,
                       preallocation=prealloc)
        create(run, ours, size, **options)
        peer_create(peer, theirs, size, **options)
        assert_clean(peer, ours)
        assert info(peer, ours) == info(peer, theirs), options
        length, peers_length = os.stat(ours).st_size, os.stat(theirs).st_size
        if prealloc == "off":
            assert length == peers_length, options
        else:  # theirs grows its refcount table on the way, which leaves a gap in small clusters
            assert peers_length - length in range(0, 65536), options
        peer("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", ours, theirs)


@pytest.mark.parametrize("size", ["0", "1", "511", "513", "100M", "1G", "1000000000", "1T"])
def test_default_image_has_the_length_of_qemu_imgs(run, peer, tmp_path, size):
    create(run, tmp_path / "ours", size)
    peer_create(peer, tmp_path / "theirs", size)
    assert os.stat(tmp_path / "ours").st_size == os.stat(tmp_path / "theirs").st_size
    assert info(peer, tmp_path / "ours") == info(peer, tmp_path / "theirs")
    assert_clean(peer, tmp_path / "ours")


@pytest.mark.parametrize("cluster_size", [512, 4096, 8192, 65536, 2097152])
def test_every_byte_is_qemu_imgs(run, peer, tmp_path, cluster_size):
    """Feature names, extensions and tables too."""
    for options in (dict(), dict(compat="0.10"),
                    dict(compression_type="zstd", lazy_refcounts="on")):
        create(run, tmp_path / "ours", "50M", cluster_size=cluster_size, **options)
        peer_create(peer, tmp_path / "theirs", "50M", cluster_size=cluster_size, **options)
        assert filecmp.cmp(tmp_path / "ours", tmp_path / "theirs", shallow=False), options


def test_default_image_of_100_mib_is_196616_bytes(run, tmp_path):
    create(run, tmp_path / "a", "100M")
    assert os.stat(tmp_path / "a").st_size == 196616


@pytest.mark.parametrize("options", [
    dict(compression_type="zstd"), dict(lazy_refcounts="on"), dict(compat="v2"),
    dict(compat="v3"), dict(compression_type="zstd", lazy_refcounts="on", refcount_bits=1)])
def test_header_options_are_seen(run, peer, tmp_path, options):
    create(run, tmp_path / "ours", "10M", **options)
    peer_create(peer, tmp_path / "theirs", "10M", **options)
    assert info(peer, tmp_path / "ours") == info(peer, tmp_path / "theirs")
    assert_clean(peer, tmp_path / "ours")


def test_backing_file_and_format_are_recorded(run, peer, tmp_path):
    peer_create(peer, tmp_path / "base.qcow2", "10M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", tmp_path / "base.qcow2")
    create(run, tmp_path / "top.qcow2", "10M", backing_file="base.qcow2", backing_fmt="qcow2")
    j = json.loads(peer("qemu-img", "info", "--output=json", tmp_path / "top.qcow2").stdout)
    assert (j["backing-filename"], j["backing-filename-format"]) == ("base.qcow2", "qcow2")
    peer("qemu-img", "compare", tmp_path / "base.qcow2", tmp_path / "top.qcow2")


@pytest.mark.parametrize("prealloc", ["metadata", "falloc"])
def test_preallocated_image_is_written_in_place(run, peer, tmp_path, prealloc):
    """A peer's writes find every cluster there: the file does not grow."""
    create(run, tmp_path / "a", "20M", preallocation=prealloc)
    before = os.stat(tmp_path / "a").st_size
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 20M", tmp_path / "a")
    assert os.stat(tmp_path / "a").st_size == before
    assert_clean(peer, tmp_path / "a")


def test_falloc_and_full_take_the_space(run, tmp_path):
    for prealloc in ("falloc", "full"):
        create(run, tmp_path / prealloc, "20M", preallocation=prealloc)
        assert os.stat(tmp_path / prealloc).st_blocks * 512 >= 20 << 20


def test_one_tebibyte_of_preallocated_metadata(run, peer, tmp_path):
    """128 MiB of L2 tables in about a second, and not in memory."""
    start = time.monotonic()
    create(run, tmp_path / "a", "1T", preallocation="metadata")
    assert time.monotonic() - start < 20, "not a bench, but it must not be minutes"
    p = peer("qemu-img", "check", "-f", "qcow2", tmp_path / "a")
    assert "16777216/16777216 = 100.00% allocated, 0.00% fragmented" in p.stdout
    os.unlink(tmp_path / "a")


def test_tables_of_many_clusters(run, peer, tmp_path):
    """4096 clusters of refcount table and blocks, L1 table of 512 clusters."""
    create(run, tmp_path / "a", "1G", cluster_size=512, refcount_bits=64, preallocation="metadata")
    assert_clean(peer, tmp_path / "a")
    create(run, tmp_path / "b", "64G", cluster_size=512)
    assert_clean(peer, tmp_path / "b")


@pytest.mark.parametrize("size, options, text", [
    ("129G", dict(cluster_size=512), "the largest size is 128 GiB"),
    ("100G", dict(cluster_size=512, refcount_bits=64, preallocation="metadata"),
     "the largest preallocated size is "),
    ("1M", dict(compat="0.10", refcount_bits=8), "refcount_bits=8 needs compat=1.1"),
    ("1M", dict(compat="v2", compression_type="zstd"), "compression_type=zstd needs compat=1.1"),
    ("1M", dict(compat="0.10", lazy_refcounts="on"), "lazy_refcounts=on needs compat=1.1"),
    ("1M", dict(extended_l2="on", cluster_size=8192), "needs clusters of at least 16384 bytes"),
    ("1M", dict(extended_l2="on", compat="v2"), "extended_l2=on needs compat=1.1"),
    ("1M", dict(data_file="x.raw", compat="v2"), "data_file needs compat=1.1"),
    ("1M", {"encrypt.format": "luks"}, "encryption of qcow2 images is not yet supported"),
    ("1M", dict(encryption="on"), "encryption of qcow2 images is not yet supported"),
    ("1M", dict(cluster_size=256), "option 'cluster_size': 256 is not between 512 B and 2 MiB"),
    ("1M", dict(cluster_size=65537), "65537 is not a power of two"),
    ("1M", dict(refcount_bits=128), "128 is not between 1 and 64"),
    ("1M", dict(compat="1.0"), "expected one of 0.10, 1.1, v2, v3, found '1.0'"),
])
def test_what_cannot_be_is_refused_and_makes_nothing(run, tmp_path, size, options, text):
    p = create(run, tmp_path / "a", size, status=1, **options)
    assert text in p.stderr
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_nothing(strata, tmp_path):
    """A limit on the file's size stands in for the disk; at every stage of the creation."""
    limit = [0]

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit[0], limit[0]))

    for limit[0] in (0, 100, 70000, 140000, 200000, 300000, 5 << 20):
        for prealloc in PREALLOC:
            if prealloc == "off" and limit[0] >= 200000:
                continue
            p = subprocess.run([strata, "create", "-q", "-f", "qcow2", "-o",
                                f"preallocation={prealloc}", tmp_path / "a", "10M"],
                               stdin=subprocess.DEVNULL, capture_output=True, text=True,
                               preexec_fn=small_disk)
            assert p.returncode == 1, (limit, prealloc)
            assert "File too large" in p.stderr, p.stderr
            assert os.listdir(tmp_path) == []


def test_info_tells_what_qemu_img_tells(run, peer, tmp_path):
    for options in (dict(), dict(compat="0.10"), dict(compression_type="zstd", refcount_bits=2),
                    dict(lazy_refcounts="on", cluster_size=512)):
        peer_create(peer, tmp_path / "a", "10M", **options)
        j = json.loads(run("info", "--output=json", tmp_path / "a").stdout)
        want = info(peer, tmp_path / "a")
        assert {k: j[k] for k in want} == want


def test_preallocation_over_a_backing_file_is_refused(run, peer, tmp_path):
    peer_create(peer, tmp_path / "base", "10M")
    p = create(run, tmp_path / "a", "10M", status=1, backing_file="base", backing_fmt="qcow2",
               preallocation="metadata")
    assert "preallocation=metadata would hide the backing file" in p.stderr
    assert os.listdir(tmp_path) == ["base"]
