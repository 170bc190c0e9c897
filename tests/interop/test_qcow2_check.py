# SPDX-License-Identifier: MIT
"""`strata check` against `qemu-img check`: same verdict on good and damaged images, or a stricter
one whose reason the test gives."""
import json
import os
import random
import shutil
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
from qcow2_image import COMPRESSED, COPIED, OFFSET, ZERO, Qcow2  # noqa: E402

K = 1024
M = K * K
CLEAN, FAILED, CORRUPT, LEAKS = 0, 1, 2, 3
COUNTS = ["corruptions", "leaks", "check-errors", "total-clusters", "allocated-clusters",
          "fragmented-clusters", "compressed-clusters", "image-end-offset"]


def counts(p):
    j = json.loads(p.stdout)
    return {k: j.get(k, 0) for k in COUNTS}


def ours(run, name):
    p = run("check", "-f", "qcow2", "--output=json", name, status=None)
    return p.returncode, (counts(p) if p.returncode in (CLEAN, CORRUPT, LEAKS) else None), p.stderr


def theirs(peer, name):
    p = peer("qemu-img", "check", "-f", "qcow2", "--output=json", name, status=None)
    return p.returncode, (counts(p) if p.returncode in (CLEAN, CORRUPT, LEAKS) else None)


def assert_same(run, peer, name):
    status, found, text = ours(run, name)
    want_status, want = theirs(peer, name)
    assert status == want_status, text
    assert found == want, text
    return status


def make(peer, name, *commands, size="16M", **options):
    options.setdefault("cluster_size", 4096)
    o = ",".join(f"{k}={v}" for k, v in options.items())
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", o, name, size)
    if commands:
        peer("qemu-io", "-f", "qcow2", *[x for c in commands for x in ("-c", c)], name)
    return Qcow2(name)


# ---------------------------------------------------------------- good images

GOOD = {
    "empty": [],
    "data": ["write -P 1 0 3M", "write -P 2 9M 100k"],
    "scattered": [f"write -P 3 {i * 7919 % 4096 * 4096} 4k" for i in range(200)],
    "backwards": [f"write -P 3 {i * 65536} 64k" for i in range(100, 0, -1)],
    "zeros": ["write -P 1 0 1M", "write -z 256k 256k", "write -zu 512k 64k", "write -z 8M 1M"],
    "discarded": ["write -P 1 0 4M", "discard 1M 1M"],
}


@pytest.mark.parametrize("options", [
    dict(cluster_size=512), dict(), dict(cluster_size=65536), dict(cluster_size=2 * M),
    dict(compat="0.10"), dict(refcount_bits=1), dict(refcount_bits=2), dict(refcount_bits=4),
    dict(refcount_bits=8), dict(refcount_bits=32), dict(refcount_bits=64)],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default")
@pytest.mark.parametrize("name", GOOD)
def test_good_images(run, peer, tmp_path, name, options):
    commands = GOOD[name]
    if options.get("compat") == "0.10":
        commands = [c for c in commands if not c.startswith("write -z")]
    make(peer, tmp_path / "a", *commands, **options)
    assert assert_same(run, peer, tmp_path / "a") == CLEAN


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * M])
def test_compressed_images(run, peer, tmp_path, kind, cluster_size):
    rng = random.Random(5)
    words = [bytes(rng.randrange(97, 123) for _ in range(rng.randrange(2, 9))) for _ in range(300)]
    text = b" ".join(rng.choice(words) for _ in range(600000))[:3 * M]
    (tmp_path / "raw").write_bytes(text + rng.randbytes(M) + text[:5000])
    peer("qemu-img", "convert", "-c", "-O", "qcow2", "-o",
         f"compression_type={kind},cluster_size={cluster_size}", tmp_path / "raw", tmp_path / "a")
    assert assert_same(run, peer, tmp_path / "a") == CLEAN


def test_snapshots(run, peer, tmp_path):
    make(peer, tmp_path / "a", "write -P 1 0 4M")
    for i in range(5):
        peer("qemu-img", "snapshot", "-c", f"s{i}", tmp_path / "a")
        peer("qemu-io", "-f", "qcow2", "-c", f"write -P {i + 2} {i * 700}k 1M",
             "-c", f"write -P 9 {8 + i}M 64k", tmp_path / "a")
    assert assert_same(run, peer, tmp_path / "a") == CLEAN
    peer("qemu-img", "snapshot", "-d", "s2", tmp_path / "a")
    assert assert_same(run, peer, tmp_path / "a") == CLEAN


def test_hundreds_of_snapshots_overflow_a_byte(run, peer, tmp_path):
    """Reference counts above 255."""
    make(peer, tmp_path / "a", "write -P 1 0 64k", size="1M")
    script = []
    for i in range(300):
        peer("qemu-img", "snapshot", "-c", f"s{i}", tmp_path / "a")
    assert assert_same(run, peer, tmp_path / "a") == CLEAN
    q = Qcow2(tmp_path / "a")
    cluster = (q.l2(0) & OFFSET) >> q.cluster_bits
    assert q.refcount(cluster) == 301
    q.set_refcount(cluster, 302)
    assert assert_same(run, peer, tmp_path / "a") == LEAKS


def test_bitmaps(run, peer, tmp_path):
    make(peer, tmp_path / "a", "write -P 1 0 4M")
    for i in range(3):
        peer("qemu-img", "bitmap", "--add", "-g", str(4096 << i), tmp_path / "a", f"b{i}")
        peer("qemu-io", "-f", "qcow2", "-c", f"write -P 1 {i}M 3M", tmp_path / "a")
    assert assert_same(run, peer, tmp_path / "a") == CLEAN


def test_stale_bitmaps_are_leaks(run, peer, tmp_path):
    """Without the autoclear bit the bitmaps extension does not count."""
    q = make(peer, tmp_path / "a", "write -P 1 0 4M")
    peer("qemu-img", "bitmap", "--add", tmp_path / "a", "b")
    q.set64(88, 0)
    assert assert_same(run, peer, tmp_path / "a") == LEAKS


def test_preallocated(run, peer, tmp_path):
    for p in ("metadata", "falloc"):
        for c in (512, 65536):
            make(peer, tmp_path / "a", preallocation=p, cluster_size=c)
            assert assert_same(run, peer, tmp_path / "a") == CLEAN


def test_last_cluster_may_be_cut_short(run, peer, tmp_path):
    """What lies behind the end of the file reads as zeros; a whole cluster must not."""
    q = make(peer, tmp_path / "a", "write -P 1 0 1M", size="1M", cluster_size=65536)
    end = os.stat(tmp_path / "a").st_size
    assert end % q.cluster == 0
    for cut, status in ((512, CLEAN), (q.cluster - 512, CLEAN), (q.cluster, CORRUPT)):
        os.truncate(tmp_path / "a", end - cut)
        assert ours(run, tmp_path / "a")[0] == theirs(peer, tmp_path / "a")[0] == status


def test_l2_table_may_be_cut_short(run, peer, tmp_path):
    make(peer, tmp_path / "a", "write -z 0 64k", size="1M", cluster_size=65536)
    end = os.stat(tmp_path / "a").st_size
    for cut, status in ((512, CLEAN), (65536 - 512, CLEAN), (65536, CORRUPT)):
        os.truncate(tmp_path / "a", end - cut)
        assert ours(run, tmp_path / "a")[0] == theirs(peer, tmp_path / "a")[0] == status


def test_fragments_are_counted_within_a_table(run, peer, tmp_path):
    """L2 tables side by side in the file; the data of each begins anywhere."""
    run("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4096",
        tmp_path / "a", "16M")
    q = Qcow2(tmp_path / "a")
    for a, b in ((512, 100), (1024, 1300), (2000, 2001)):
        x, y = q.l2(a), q.l2(b)
        q.set_l2(a, y)
        q.set_l2(b, x)
    assert assert_same(run, peer, tmp_path / "a") == CLEAN
    assert theirs(peer, tmp_path / "a")[1]["fragmented-clusters"] > 5


# ---------------------------------------------------------------- damage, same verdict

DAMAGED = {}


def damage(fn):
    DAMAGED[fn.__name__] = fn
    return fn


def cluster_of(q, i):
    return (q.l2(i) & OFFSET) >> q.cluster_bits


@damage
def leaked_cluster(q):
    q.set_l2(3, 0)
    return LEAKS


@damage
def leaked_run_of_clusters(q):
    for i in range(20, 40):
        q.set_l2(i, 0)
    return LEAKS


@damage
def leak_of_an_l2_table_and_its_data(q):
    q.set64(q.l1_at(0), 0)
    return LEAKS


@damage
def refcount_zero_of_data(q):
    q.set_refcount(cluster_of(q, 5), 0)
    return CORRUPT


@damage
def refcount_two_of_data_with_copied(q):
    """The flag promises a single reference."""
    q.set_refcount(cluster_of(q, 5), 2)
    return CORRUPT


@damage
def refcount_zero_of_the_header(q):
    q.set_refcount(0, 0)
    return CORRUPT


@damage
def refcount_zero_of_the_l1_table(q):
    q.set_refcount(q.l1_offset >> q.cluster_bits, 0)
    return CORRUPT


@damage
def refcount_zero_of_an_l2_table(q):
    q.set_refcount((q.l1(0) & OFFSET) >> q.cluster_bits, 0)
    return CORRUPT


@damage
def copied_flag_missing_on_data(q):
    q.set_l2(7, q.l2(7) & ~COPIED)
    return CORRUPT


@damage
def copied_flag_missing_on_l2_table(q):
    q.set64(q.l1_at(0), q.l1(0) & ~COPIED)
    return CORRUPT


@damage
def two_entries_with_one_cluster(q):
    q.set_l2(8, q.l2(9))
    return CORRUPT


@damage
def data_entry_into_the_l2_table(q):
    q.set_l2(8, (q.l1(0) & OFFSET) | COPIED)
    return CORRUPT


@damage
def data_entry_into_the_refcount_block(q):
    q.set_l2(8, q.refblock(0) | COPIED)
    return CORRUPT


@damage
def data_entry_outside_the_file(q):
    q.set_l2(8, (q.file_clusters() + 100) << q.cluster_bits | COPIED)
    return CORRUPT


@damage
def data_entry_at_the_offset_limit(q):
    q.set_l2(8, (1 << 56) - q.cluster | COPIED)
    return CORRUPT


@damage
def data_entry_unaligned(q):
    q.set_l2(8, q.l2(8) + 512)
    return CORRUPT


@damage
def data_entry_reserved_bit_58(q):
    q.set_l2(8, q.l2(8) | 1 << 58)
    return CORRUPT


@damage
def data_entry_reserved_bit_3(q):
    q.set_l2(8, q.l2(8) | 8)
    return CORRUPT


@damage
def zero_entry_reserved_bit(q):
    q.set_l2(8, ZERO | 16)
    return CORRUPT


@damage
def l1_entry_reserved_bit(q):
    q.set64(q.l1_at(0), q.l1(0) | 1 << 60)
    return CORRUPT


@damage
def refcount_table_entry_outside_the_file(q):
    q.set64(q.reftable_offset + 8, 1 << 40)
    return CORRUPT


@damage
def refcount_table_entry_twice(q):
    q.set64(q.reftable_offset + 8, q.refblock(0))
    return CORRUPT


@damage
def refcount_table_empty(q):
    q.set64(q.reftable_offset, 0)
    return CORRUPT


@damage
def l1_entry_into_the_refcount_table(q):
    q.set64(q.l1_at(1), q.reftable_offset | COPIED)
    return CORRUPT


@damage
def l1_entry_into_the_header(q):
    q.set64(q.l1_at(1), COPIED)
    return CORRUPT


@damage
def l1_entry_unaligned(q):
    q.set64(q.l1_at(0), q.l1(0) + 512)
    return CORRUPT


@damage
def l1_entry_twice(q):
    q.set64(q.l1_at(1), q.l1(0))
    return CORRUPT


@damage
def compressed_entry_outside_the_file(q):
    q.set_l2(8, COMPRESSED | 1 << 40)
    return CORRUPT


@damage
def compressed_entry_with_copied(q):
    c = cluster_of(q, 8) << q.cluster_bits
    q.set_l2(8, COMPRESSED | COPIED | c)
    return CORRUPT


@damage
def compressed_entry_over_two_data_clusters(q):
    c = cluster_of(q, 8) << q.cluster_bits
    sectors = q.cluster // 512 - 1
    q.set_l2(8, COMPRESSED | sectors << (62 - (q.cluster_bits - 8)) | (c + 700))
    return CORRUPT


@damage
def file_cut_in_the_middle_of_data(q):
    with open(q.path, "r+b") as f:
        f.truncate((cluster_of(q, 900)) << q.cluster_bits)
    return CORRUPT


@damage
def garbage_in_the_l2_table(q):
    rng = random.Random(1)
    q.write(q.l2_at(100), rng.randbytes(400))
    return CORRUPT


@damage
def garbage_in_the_refcount_block(q):
    rng = random.Random(2)
    q.write(q.refblock(0) + 100, rng.randbytes(400))
    return CORRUPT


@pytest.fixture(scope="module")
def patient(peer, tmp_path_factory):
    path = tmp_path_factory.mktemp("patient") / "a"
    make(peer, path, "write -P 1 0 4M", "write -P 1 12M 1M")
    return path


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_has_the_peers_status(run, peer, tmp_path, patient, name):
    shutil.copy(patient, tmp_path / "a")
    want = DAMAGED[name](Qcow2(tmp_path / "a"))
    status, _, text = ours(run, tmp_path / "a")
    assert status == want, text
    assert theirs(peer, tmp_path / "a")[0] == want
    assert text.strip(), "the damage is told"


@pytest.mark.parametrize("name", [
    "leaked_cluster", "leaked_run_of_clusters", "leak_of_an_l2_table_and_its_data",
    "refcount_zero_of_data", "refcount_two_of_data_with_copied", "refcount_zero_of_the_header",
    "refcount_zero_of_an_l2_table", "copied_flag_missing_on_data",
    "copied_flag_missing_on_l2_table", "data_entry_reserved_bit_58", "two_entries_with_one_cluster",
    "refcount_table_empty"])
def test_damage_has_the_peers_counts(run, peer, tmp_path, patient, name):
    shutil.copy(patient, tmp_path / "a")
    DAMAGED[name](Qcow2(tmp_path / "a"))
    assert_same(run, peer, tmp_path / "a")


def test_texts_say_what_where_found_expected(run, tmp_path, patient):
    shutil.copy(patient, tmp_path / "a")
    q = Qcow2(tmp_path / "a")
    leaked, copied = cluster_of(q, 3), q.l2(7)
    leaked_run(q, 3)
    q.set_l2(7, copied & ~COPIED)
    _, _, text = ours(run, tmp_path / "a")
    assert (f"cluster {leaked} at offset {leaked * 4096}: reference count is 1, 0 references found"
            in text)
    assert (f"L2 entry for guest offset {7 * 4096}: 0x{copied & ~COPIED:x} has the COPIED flag "
            "clear, but the reference count of its cluster is 1") in text


def leaked_run(q, i):
    q.set_l2(i, 0)


# ---------------------------------------------------------------- stricter, with the reason

def test_unaligned_refcount_block(run, peer, tmp_path, patient):
    """qemu-img cannot read the counts and says that the check failed; what it met is damage."""
    shutil.copy(patient, tmp_path / "a")
    q = Qcow2(tmp_path / "a")
    q.set64(q.reftable_offset, q.refblock(0) + 512)
    assert theirs(peer, tmp_path / "a")[0] == FAILED
    status, _, text = ours(run, tmp_path / "a")
    assert status == CORRUPT
    assert f"refcount block 0: offset {q.refblock(0)} is not a multiple" in text


def test_data_over_the_l1_table_with_matching_counts(run, peer, tmp_path, patient):
    """qemu-img compares counts only; a write to this cluster would copy it first, but the next
    update of the L1 table changes guest data, and a discard frees the table."""
    shutil.copy(patient, tmp_path / "a")
    q = Qcow2(tmp_path / "a")
    old = cluster_of(q, 8)
    q.set_l2(8, q.l1_offset)
    q.set_refcount(q.l1_offset >> q.cluster_bits, 2)
    q.set_refcount(old, 0)
    assert theirs(peer, tmp_path / "a")[0] == CLEAN
    status, _, text = ours(run, tmp_path / "a")
    assert status == CORRUPT
    assert f"its cluster at offset {q.l1_offset} overlaps other metadata" in text


def test_data_over_a_snapshots_l2_table_with_matching_counts(run, peer, tmp_path):
    q = make(peer, tmp_path / "a", "write -P 1 0 1M")
    peer("qemu-img", "snapshot", "-c", "s", tmp_path / "a")
    old = q.l1(0) & OFFSET
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 4k", tmp_path / "a")
    assert q.l1(0) & OFFSET != old, "the active table is a copy now"
    q.set_l2(0, old)
    q.set_refcount(old >> q.cluster_bits, 2)
    assert ours(run, tmp_path / "a")[1]["leaks"] == 1, "the cluster that was named before"
    status, _, text = ours(run, tmp_path / "a")
    assert status == CORRUPT
    assert f"its cluster at offset {old} overlaps an L2 table" in text


def bitmap_directory(q):
    h = q.read(0, q.cluster)
    ext = h.index(bytes.fromhex("23852875"))
    return ext, q.u64(h, ext + 8 + 16)


@pytest.mark.parametrize("name, change, text", [
    ("count", lambda q: q.set32(bitmap_directory(q)[0] + 8, 0), "where 1 to 65535 are possible"),
    ("length", lambda q: q.set64(bitmap_directory(q)[0] + 16, 24), "reaches beyond its end"),
    ("extra", lambda q: q.set64(bitmap_directory(q)[0] + 16, 64), "1 bitmaps take 32 of its 64"),
    ("type", lambda q: q.write(bitmap_directory(q)[1] + 16, b"\2"), "its type is not 1"),
    ("flags", lambda q: q.set32(bitmap_directory(q)[1] + 12, 64), "reserved flags are set"),
    ("granularity", lambda q: q.write(bitmap_directory(q)[1] + 17, b"\3"), "its granularity"),
    ("table", lambda q: q.set64(bitmap_directory(q)[1], 0), "it has no table"),
    ("short", lambda q: q.write(bitmap_directory(q)[1] + 17, b"\11"), "too short for the image"),
    ("entry", lambda q: q.set64(q.get64(bitmap_directory(q)[1]), 3), "reserved bits set"),
], ids=lambda v: v if isinstance(v, str) and " " not in v else "")
def test_broken_bitmap_directory(run, peer, tmp_path, name, change, text):
    """qemu-img refuses to open such an image, or takes the bitmap's clusters for leaks; a program
    that only wants the disk's data can read it."""
    q = make(peer, tmp_path / "a", "write -P 1 0 1M", size="1G")
    peer("qemu-img", "bitmap", "--add", tmp_path / "a", "bm")
    assert ours(run, tmp_path / "a")[0] == CLEAN
    change(q)
    status, _, found = ours(run, tmp_path / "a")
    assert status == CORRUPT
    assert text in found
    assert theirs(peer, tmp_path / "a")[0] in (FAILED, CORRUPT)


def test_snapshot_without_its_version_3_data(run, peer, tmp_path):
    q = make(peer, tmp_path / "a", "write -P 1 0 1M")
    peer("qemu-img", "snapshot", "-c", "s", tmp_path / "a")
    q.set32(q.get64(64) + 36, 8)
    status, _, text = ours(run, tmp_path / "a")
    assert status == theirs(peer, tmp_path / "a")[0] == CORRUPT
    assert "8 bytes of extra data, and version 3 wants 16" in text


def test_zero_flag_in_version_2(run, peer, tmp_path):
    """The flag does not exist there; readers of version 2 take the cluster for data."""
    q = make(peer, tmp_path / "a", "write -P 1 0 1M", compat="0.10")
    q.set_l2(8, q.l2(8) | ZERO)
    assert theirs(peer, tmp_path / "a")[0] == CLEAN
    status, _, text = ours(run, tmp_path / "a")
    assert status == CORRUPT
    assert "has the zero flag, which version 2 does not have" in text


def test_copied_flag_without_a_cluster(run, peer, tmp_path, patient):
    """Offset 0 is the header; the flag says that it may be overwritten in place."""
    shutil.copy(patient, tmp_path / "a")
    q = Qcow2(tmp_path / "a")
    q.set_l2(2000, COPIED) if q.l1(3) else q.set_l2(1020, COPIED)
    status, _, text = ours(run, tmp_path / "a")
    assert status == CORRUPT
    assert "has the COPIED flag but no cluster" in text


# ---------------------------------------------------------------- hostile

def test_random_damage_never_hangs_or_crashes(run, peer, tmp_path, patient):
    """Seeded garbage over any metadata; the verdict may be anything but clean when theirs is not."""
    for seed in range(60):
        rng = random.Random(seed)
        shutil.copy(patient, tmp_path / "a")
        q = Qcow2(tmp_path / "a")
        places = [q.l1_offset, q.reftable_offset, q.refblock(0), q.l1(0) & OFFSET, 24]
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice(places) + 8 * rng.randrange(0, 64)
            if at < 128:
                at = rng.choice([36, 40, 48, 56, 60, 64, 96])
                q.set32(at, rng.choice([0, 1, 0xFFFFFFFF, rng.getrandbits(32)]))
            else:
                q.set64(at, rng.choice([rng.getrandbits(64), q.get64(at) ^ 1 << rng.randrange(64),
                                        COMPRESSED | rng.getrandbits(62)]))
        status, _, text = ours(run, tmp_path / "a")
        assert status in (CLEAN, FAILED, CORRUPT, LEAKS), (seed, status, text)
        peer_status = theirs(peer, tmp_path / "a")[0]
        if status in (CLEAN, LEAKS):
            assert peer_status in (status, FAILED), (seed, text)


def test_every_l1_entry_names_the_same_table(run, tmp_path, peer):
    """4 million entries for one table: it is read once, not 4 million times."""
    q = make(peer, tmp_path / "a", "write -P 1 0 4k", size="8T", cluster_size=4096)
    entry = q.l1(0).to_bytes(8, "big")
    q.write(q.l1_offset, entry * q.l1_entries)
    p = run("check", "-q", "-f", "qcow2", tmp_path / "a", status=CORRUPT, timeout=60)
    assert p.returncode == CORRUPT
