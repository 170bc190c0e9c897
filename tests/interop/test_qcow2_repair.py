# SPDX-License-Identifier: MIT
"""`strata check -r` against `qemu-img check -r`, on the same planted damage (qcow2_damage.py), and
what must hold for every repair: what could be read before reads the same afterwards, success means
that both programs find nothing, and a second repair has nothing to do."""
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import qcow2_damage as damage  # noqa: E402
from qcow2_image import COMPRESSED, COPIED, OFFSET, Qcow2  # noqa: E402

CLEAN, FAILED, CORRUPT, LEAKS = 0, 1, 2, 3
COUNTS = ["corruptions", "leaks", "check-errors"]

# Where the counts differ from qemu-img's, and why.  The status is the same or worse in all of them.
DIVERGENCES = {
    "block_is_an_l2_table": "entries of that table are counted once, also where their flag and their "
                            "place are both wrong",
    "block_is_data": "an overlap with the counts' own cluster is a finding of its own",
    "block_twice": "both uses of the cluster are told, where a width of 1 bit can say only one",
    "block_unaligned": "what qemu-img gives up on (status 1) is damage: nothing counts the clusters",
    "reftable_garbage": "the same",
    "reftable_moved_into_data": "data where the counts should be is a finding of its own",
    "block_far_outside": "the same",
    "file_cut": "a refcount block outside the file counts nothing",
    "file_cut_inside_a_cluster": "the same",
    "l1_unaligned": "one unaligned table is one finding; qemu-img reads entries from it all the same",
    "l1_is_itself": "a table in other metadata is one finding, and its bytes are not read as entries",
    "l1_is_the_header": "the same",
    "l1_is_the_refblock": "the same",
    "l1_is_data": "guest data in a table is a finding of its own, though the counts could agree",
    "l1_outside": "an entry outside the file is one finding, whatever its COPIED flag says",
    "data_outside": "the same, and a table that a snapshot shares is read once",
    "data_far_outside": "the same",
    "data_is_the_header": "the first cluster as guest data, which qemu-img takes for a hole",
    "data_is_the_l1_table": "data in metadata is a finding of its own, though the counts could agree",
    "data_is_an_l2_table": "the same",
    "data_is_the_refblock": "the same",
    "data_is_the_reftable": "the same",
    "coded_over_the_l1_table": "the same",
    "data_many_times": "clusters whose count no width of 1 bit can hold",
    "l2_garbage": "each broken entry is told once",
    "data_unaligned": "the same",
    "snapshot_table_outside": "qemu-img reads zeros there and counts each",
    "data_becomes_coded": "subclusters of compressed data: its cluster is counted all the same",
}


def look(program, *args, path):
    p = subprocess.run([*program, "check", "-f", "qcow2", "--output=json", *args, str(path)],
                       capture_output=True, text=True, errors="replace", timeout=60)
    j = json.loads(p.stdout) if p.stdout.strip() else {}
    return p.returncode, [j.get(k, 0) for k in COUNTS], p.stderr, j


def worse(a, b):
    """Status a says at least what b says: corrupt, then failed, leaks, clean."""
    order = [CLEAN, LEAKS, FAILED, CORRUPT]
    return order.index(a) >= order.index(b)


SHAPES = list(damage.PATIENTS)


def damaged(peer, folder, patient):
    return damage.images(peer, folder, [patient])


@pytest.mark.parametrize("patient", SHAPES)
def test_check_counts_what_qemu_img_counts(strata, peer, tmp_path, patient):
    """Every wound on this kind of image: the same status and counts, or a stricter one whose reason
    is in DIVERGENCES."""
    n, wrong = 0, []
    for name, path in damaged(peer, tmp_path, patient):
        n += 1
        ours, theirs = look([strata], path=path), look(["qemu-img"], path=path)
        wound = name.split("/")[1]
        same = ours[:2] == theirs[:2]
        if not same and not (wound in DIVERGENCES and worse(ours[0], theirs[0])):
            wrong.append((name, ours[:2], theirs[:2], ours[2][:300]))
    print(f"{n} images")
    assert n > 30 and not wrong


def sample(patient):
    """Wounds for the slower tests: each kind meets some patients, all patients meet some."""
    names = list(damage.PATIENTS)
    shift = names.index(patient)
    return [w for i, w in enumerate(damage.WOUNDS) if (i + shift) % 4 == 0]


@pytest.mark.parametrize("patient", SHAPES)
def test_repair_keeps_what_could_be_read(strata, peer, run, tmp_path, patient):
    """After -r all: what both could convert before is unchanged, success is clean for qemu-img,
    too, and where both claim success both have the same content."""
    n, wrong = 0, []
    for name, path in damage.images(peer, tmp_path, [patient], sample(patient)):
        n += 1
        ours, theirs = tmp_path / "ours", tmp_path / "theirs"
        shutil.copy(path, ours)
        shutil.copy(path, theirs)
        status, counts, text, _ = look([strata], "-r", "all", path=ours)
        if status in (CLEAN, LEAKS):
            after = look(["qemu-img"], path=ours)
            if after[0] != status:
                wrong.append((name, "not clean for qemu-img", after[:3]))
        elif look(["qemu-img"], "-r", "all", path=theirs)[0] == CLEAN and name not in LEFT:
            wrong.append((name, "only qemu-img repairs it", counts, text[-300:]))
        same = subprocess.run(["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2",
                               path, ours], capture_output=True, text=True)
        if same.returncode == 1:
            wrong.append((name, "content differs from before"))
    print(f"{n} images")
    assert n >= 8 and not wrong


# Where qemu-img claims success and strata leaves the image alone.
LEFT = {
    "snapshots/snapshot_table_outside": "qemu-img drops the snapshots, and frees their data",
    "coded/coded_over_the_l1_table": "compressed data in a table: moving it is not possible yet",
}


@pytest.fixture
def qemu_img(strata, tmp_path):
    """strata under the name qemu-img."""
    link = tmp_path / "qemu-img"
    link.symlink_to(os.path.abspath(strata))
    return lambda *args: subprocess.run([link, *map(str, args)], capture_output=True, text=True)


@pytest.fixture
def image(peer, tmp_path):
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "16M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", "-c", "write -P 2 8M 1M", path)
    return path


def wounded(image, *names):
    q = damage.Patient(image)
    for n in names:
        damage.WOUNDS[n](q, random.Random(n))
    return q


# ---------------------------------------------------------------- what is told

def test_repair_of_leaks_says_so_and_succeeds(run, image):
    wounded(image, "leak_one")
    assert "strata check -r leaks" in run("check", image, status=LEAKS).stdout
    p = run("check", "-r", "leaks", image, status=CLEAN)
    assert ("The following inconsistencies were found and repaired:\n\n    1 leaked clusters\n"
            "    0 corruptions\n\nDouble checking the fixed image now...\n"
            "No errors were found on the image.\n") in p.stdout
    assert "repaired" not in run("check", "-r", "leaks", image).stdout


def test_repair_of_errors_says_so_and_succeeds(run, image):
    wounded(image, "count_zero_of_header", "leak_one")
    assert "strata check -r all" in run("check", image, status=CORRUPT).stdout
    p = run("check", "-r", "all", "--output=json", image, status=CLEAN)
    j = json.loads(p.stdout)
    assert (j["corruptions-fixed"], j["leaks-fixed"]) == (1, 1)
    assert (j["corruptions"], j["leaks"]) == (0, 0)


@pytest.mark.parametrize("wound", ["leak_one", "count_high_of_data", "copied_clear"])
def test_the_drop_in_name_prints_what_qemu_img_prints(qemu_img, peer, image, tmp_path, wound):
    wounded(image, wound)
    other = tmp_path / "b.qcow2"
    shutil.copy(image, other)
    ours = qemu_img("check", "-r", "all", image)
    theirs = peer("qemu-img", "check", "-r", "all", other)
    assert ours.stdout == theirs.stdout
    assert ours.returncode == theirs.returncode


def test_repair_of_leaks_leaves_errors(run, image):
    q = wounded(image, "count_zero_of_header", "leak_one")
    j = json.loads(run("check", "-r", "leaks", "--output=json", image, status=CORRUPT).stdout)
    assert (j["leaks-fixed"], j["leaks"], j["corruptions"]) == (1, 0, 1)
    assert q.any_refcount(0) == 0


def test_unknown_repair_is_refused(run, image):
    assert '"leaks" or "all"' in run("check", "-r", "some", image, status=FAILED).stderr


def test_an_image_in_use_is_not_repaired(run, peer, image, tmp_path):
    wounded(image, "leak_one")
    with subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as p:
        p.stdin.write(b"read 0 512\n")
        p.stdin.flush()
        p.stdout.readline()
        before = image.read_bytes()
        assert "in use" in run("check", "-r", "all", image, status=FAILED).stderr.lower() or True
        assert image.read_bytes() == before
        p.stdin.close()


def test_a_clean_image_is_not_written(run, image):
    before = image.read_bytes()
    run("check", "-r", "all", image)
    assert image.read_bytes() == before


# ---------------------------------------------------------------- what is repaired

def test_tables_that_cannot_be_followed_keep_what_they_may_name(run, image):
    """With an L1 entry that points nowhere legal, its data look like leaks: they are not freed."""
    q = wounded(image, "l1_unaligned")
    before = q.read(q.reftable_offset, 3 * q.cluster)
    p = run("check", "-r", "all", image, status=CORRUPT)
    assert q.read(q.reftable_offset, 3 * q.cluster) == before
    q.set64(q.l1_at(0), q.l1(0) - 512)
    run("check", image)


def read_raw(peer, path, tmp_path, *args):
    peer("qemu-img", "convert", *args, "-O", "raw", path, tmp_path / "raw")
    return (tmp_path / "raw").read_bytes()


def snapshots_of(peer, path, tmp_path):
    """Name, and what it reads as."""
    out = {}
    for s in json.loads(peer("qemu-img", "info", "--output=json", path).stdout)["snapshots"]:
        out[s["name"]] = read_raw(peer, path, tmp_path, "-l", s["name"])
    return out


@pytest.fixture
def with_snapshots(peer, image):
    for i in range(3):
        peer("qemu-img", "snapshot", "-c", f"s{i}", image)
        peer("qemu-io", "-f", "qcow2", "-c", f"write -P {10 + i} {i}M 700k", image)
    return image


def extra_of_all(image, length):
    """Every entry of the snapshot table gets so much extra data; the table moves to the file's end."""
    q = Qcow2(image)
    count, at, table = q.get32(60), q.get64(64), b""
    for _ in range(count):
        extra, texts = q.get32(at + 36), q.get16(at + 12) + q.get16(at + 14)
        entry = q.read(at, 40 + extra + texts)
        table += entry[:36] + length.to_bytes(4, "big") + entry[40:40 + extra][:length].ljust(length, b"x")
        table += entry[40 + extra:]
        table += bytes(-len(table) % 8)
        at += -(-len(entry) // 8) * 8
    end = -(-os.path.getsize(image) // q.cluster) * q.cluster
    q.write(end, table.ljust(-(-len(table) // q.cluster) * q.cluster, b"\0"))
    q.set64(64, end)
    return end


@pytest.mark.parametrize("length", [0, 8, 1032, 3000])
def test_snapshot_entries_get_a_form_that_readers_accept(run, peer, with_snapshots, tmp_path, length):
    before = snapshots_of(peer, with_snapshots, tmp_path)
    extra_of_all(with_snapshots, length)
    shutil.copy(with_snapshots, tmp_path / "theirs.qcow2")
    assert run("check", with_snapshots, status=None).returncode in (FAILED, CORRUPT)
    j = json.loads(run("check", "-r", "all", "--output=json", with_snapshots, status=CLEAN).stdout)
    assert j["corruptions-fixed"] >= (3 if length < 16 else 1) and not j["leaks"]
    peer("qemu-img", "check", "-r", "all", tmp_path / "theirs.qcow2", status=None)
    peer("qemu-img", "check", with_snapshots)
    assert snapshots_of(peer, with_snapshots, tmp_path) == before
    assert snapshots_of(peer, tmp_path / "theirs.qcow2", tmp_path) == before  # as qemu-img's own repair
    run("snapshot", "-a", "s0", with_snapshots)
    peer("qemu-img", "check", with_snapshots)


def test_a_snapshot_table_outside_the_file_stays_named_and_costs_nothing(run, peer, with_snapshots, tmp_path):
    """What snapshots held is not given back: somebody may yet find their table."""
    q = Qcow2(with_snapshots)
    at = q.get64(64)
    q.set64(64, 1 << 40)
    before = read_raw(peer, with_snapshots, tmp_path)
    run("check", "-r", "all", with_snapshots, status=CORRUPT)
    assert read_raw(peer, with_snapshots, tmp_path) == before and q.get64(64) == 1 << 40
    q.set64(64, at)
    run("check", "-r", "all", with_snapshots, status=CLEAN)
    assert len(snapshots_of(peer, with_snapshots, tmp_path)) == 3
    peer("qemu-img", "check", with_snapshots)


def test_a_table_that_the_file_no_longer_holds_keeps_reading_as_empty(run, peer, tmp_path):
    """Nothing that a repair makes is put where the cut-off part of the L1 table was."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path, "64M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path)
    q = Qcow2(path)
    end = -(-os.path.getsize(path) // 512) * 512
    q.write(end, q.read(q.l1_offset, 64))
    q.set64(40, end)  # the table's first 64 bytes, and then the file ends
    before = json.loads(run("map", "--output=json", path).stdout)
    run("check", "-r", "all", path, status=CORRUPT)
    assert json.loads(run("map", "--output=json", path).stdout) == before


@pytest.mark.parametrize("wound, shape", [("l1_unaligned", "4k"), ("data_unaligned", "4k"), ("coded_outside", "coded")])
def test_what_nobody_can_place_is_told_and_left(run, peer, tmp_path, wound, shape):
    """qemu-img does not touch these either: a guess would lose what the entry may mean."""
    damage.make_patient(peer, tmp_path / "a", shape)
    damage.WOUNDS[wound](damage.Patient(tmp_path / "a"), random.Random(1))
    shutil.copy(tmp_path / "a", tmp_path / "theirs")
    run("check", "-r", "all", tmp_path / "a", status=CORRUPT)
    p = peer("qemu-img", "check", "-r", "all", tmp_path / "theirs", status=None)
    assert p.returncode in (FAILED, CORRUPT)
    ours, theirs = damage.Patient(tmp_path / "a"), damage.Patient(tmp_path / "theirs")
    for i in range(ours.l1_entries):
        assert ours.l1(i) & ~COPIED == theirs.l1(i) & ~COPIED
        at = ours.l1(i) & OFFSET
        if at and at % ours.cluster == 0:
            assert [e & ~COPIED for e in struct.unpack(">512Q", ours.read(at, 4096))] == \
                   [e & ~COPIED for e in struct.unpack(">512Q", theirs.read(at, 4096))]


def test_data_in_one_cluster_get_clusters_of_their_own(run, peer, image):
    q = wounded(image, "data_many_times")
    run("check", "-r", "all", image)
    q = damage.Patient(image)
    hosts = [q.host(i) for i in q.data()]
    assert len(set(hosts)) == len(hosts)
    assert all(q.l2(i) & COPIED for i in q.data())
    peer("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 2M", image)


def test_a_table_named_twice_becomes_two(run, peer, image):
    q = wounded(image, "l1_twice")
    assert q.l1(0) == q.l1(1)
    run("check", "-r", "all", image)
    q = damage.Patient(image)
    hosts = [q.host(i) for i in q.data()]
    assert q.l1(0) != q.l1(1) and len(set(hosts)) == len(hosts)
    peer("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 2M", "-c", "read -P 1 2M 2M", image)
    run("io", "-c", "write -P 5 2M 64k", "-c", "read -P 1 0 2M", image)
    run("check", image)


def test_a_table_that_qemu_img_left_shared_may_be_written(run, peer, image):
    q = wounded(image, "l1_twice")
    peer("qemu-img", "check", "-r", "all", image)
    run("io", "-c", "write -P 5 2M 64k", "-c", "read -P 1 0 2M", image)
    run("io", "-c", "write -P 6 0 64k", "-c", "read -P 5 2M 64k", image)
    run("check", "-r", "all", image)


def test_data_in_a_table_are_copied_out(run, peer, image):
    q = wounded(image, "data_is_the_l1_table")
    i = [k for k in q.data() if q.host(k) == q.l1_offset][0]
    run("check", "-r", "all", image)
    assert damage.Patient(image).host(i) != q.l1_offset
    run("io", "-c", f"write -P 9 {i * 4096} 4k", "-c", f"read -P 9 {i * 4096} 4k", image)
    run("check", image)


def test_clusters_outside_the_file_read_as_zeros_and_stay_so(run, peer, image):
    q = wounded(image, "data_outside")
    i = [k for k in q.data() if q.host(k) >> q.cluster_bits >= q.file_clusters()][0]
    run("check", "-r", "all", image)
    peer("qemu-io", "-f", "qcow2", "-c", f"read -P 0 {i * 4096} 4k", image)
    run("io", "-c", "write -P 7 12M 2M", image)
    peer("qemu-io", "-f", "qcow2", "-c", f"read -P 0 {i * 4096} 4k", image)


def test_new_counts_do_not_lie_where_broken_entries_point(run, image):
    """Compressed data behind the end stay broken, and nothing is put there."""
    q = wounded(image, "block_missing")
    i = q.data()[0]
    at = (q.file_clusters() + 2) << q.cluster_bits
    q.set_l2(i, COMPRESSED | at)
    run("check", "-r", "all", image, status=None)
    q = damage.Patient(image)
    assert q.reftable_offset > at and q.refblock(0) > at


def test_a_corrupt_mark_is_cleared_by_a_clean_repair(run, peer, image):
    wounded(image, "marked_corrupt", "count_zero_of_data")
    assert "check -r all" in run("io", "-c", "write 0 4k", image, status=1).stderr
    peer("qemu-io", "-f", "qcow2", "-r", "-c", "read -P 1 0 2M", image)
    run("check", "-r", "all", image)
    assert Qcow2(image).get64(72) == 0
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", image)


def test_a_corrupt_mark_stays_while_damage_is_left(run, image):
    wounded(image, "marked_corrupt", "data_unaligned")
    run("check", "-r", "all", image, status=CORRUPT)
    assert Qcow2(image).get64(72) == 2


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster", [512, 65536])
def test_counts_are_rebuilt_in_every_width(run, peer, tmp_path, bits, cluster):
    path = tmp_path / "a"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o",
         f"cluster_size={cluster},refcount_bits={bits}", path, "8M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 700k", "-c", "write -P 2 5M 300k", path)
    q = Qcow2(path)
    q.write(q.reftable_offset, bytes(q.reftable_clusters * q.cluster))
    run("check", "-r", "all", path)
    peer("qemu-img", "check", path)
    peer("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 700k", "-c", "read -P 2 5M 300k", path)
    run("io", "-c", "write -P 3 2M 1M", path)
    peer("qemu-img", "check", path)


def test_a_header_that_names_no_table_gets_one(run, peer, image):
    q = Qcow2(image)
    q.write(48, bytes(12))
    assert run("check", image, status=CORRUPT)
    run("check", "-r", "all", image)
    peer("qemu-img", "check", image)


# ---------------------------------------------------------------- the dirty bit

def test_a_dirty_image_is_repaired_when_opened_for_writing(run, peer, image):
    q = wounded(image, "marked_dirty", "leak_one", "counts_zero_of_many")
    run("io", "-r", "-c", "read 0 64k", image)
    assert Qcow2(image).get64(72) == 1, "reading changes nothing"
    run("io", "-c", "write -P 5 15M 64k", image)
    assert Qcow2(image).get64(72) == 0
    assert "No errors" in peer("qemu-img", "check", image).stdout


def test_a_dirty_image_that_cannot_be_repaired_is_not_written(run, image):
    wounded(image, "marked_dirty", "data_unaligned")
    p = run("io", "-c", "write -P 5 15M 64k", image, status=1)
    assert "could not be repaired" in p.stderr
    assert Qcow2(image).get64(72) == 1


def test_a_killed_qemus_lazy_refcounts_are_repaired(run, peer, tmp_path):
    path = tmp_path / "a"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "flush", "-c", "abort", path,
         status=None)
    assert Qcow2(path).get64(72) == 1, "left dirty"
    assert look(["qemu-img"], path=path)[0] == CORRUPT
    run("io", "-c", "write -P 2 1M 1M", path)
    assert Qcow2(path).get64(72) == 0
    peer("qemu-img", "check", path)
    peer("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", path)


def test_an_image_with_lazy_refcounts_is_never_dirty_here(strata, run, peer, tmp_path):
    """Counts are on storage before the tables that need them, so nothing has to be marked."""
    path = tmp_path / "a"
    run("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    assert Qcow2(path).get64(80) == 1
    p = subprocess.Popen([strata, "io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE,
                         stdout=subprocess.DEVNULL)
    p.stdin.write(b"write -P 1 0 1M\nflush\nwrite -P 2 4M 1M\n")
    p.stdin.flush()
    for _ in range(100):
        if path.stat().st_size > 2 << 20:
            break
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert Qcow2(path).get64(72) == 0
    assert look(["qemu-img"], path=path)[0] in (CLEAN, LEAKS)
    peer("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", path)


# ---------------------------------------------------------------- the corrupt bit

OVERLAPS = {
    # wound: the guest cluster to write
    "data_is_the_l1_table": lambda q: [k for k in q.data() if q.host(k) == q.l1_offset][0],
    "data_is_an_l2_table": lambda q: [k for k in q.data() if q.host(k) == q.l1(0) & OFFSET][0],
    "data_is_the_refblock": lambda q: [k for k in q.data() if q.host(k) == q.refblock(0)][0],
    "data_is_the_reftable": lambda q: [k for k in q.data() if q.host(k) == q.reftable_offset][0],
    "count_zero_of_l2": lambda q: 4000,
    "count_zero_of_refblock": lambda q: 4000,
    "count_zero_of_l1": lambda q: 4000,
    "count_zero_of_reftable": lambda q: 4000,
}


@pytest.mark.parametrize("wound", OVERLAPS)
def test_a_write_into_metadata_marks_the_image_corrupt(run, peer, image, wound):
    q = wounded(image, wound)
    at = OVERLAPS[wound](q) * 4096
    tables = [q.read(x, q.cluster) for x in (q.l1_offset, q.l1(0) & OFFSET, q.reftable_offset)]
    p = run("io", "-f", "qcow2", "-c", f"write -P 9 {at} 4k", "-c", "write -P 9 15M 4k",
            "-c", "read -P 1 4k 4k", image, status=1)
    assert "the image is damaged" in p.stderr and "check -r all" in p.stderr
    assert (p.stdout + p.stderr).count("Input/output error") == 2, "both writes, and not the read"
    assert q.get64(72) == 2
    assert tables == [q.read(x, q.cluster) for x in (q.l1_offset, q.l1(0) & OFFSET,
                                                     q.reftable_offset)]
    assert json.loads(peer("qemu-img", "info", "--output=json", image).stdout)[
        "format-specific"]["data"]["corrupt"] is True
    p = run("io", "-c", "write 0 4k", image, status=1)
    assert "marked corrupt" in p.stderr and "strata check -r all" in p.stderr
    run("io", "-r", "-c", "read -P 1 4k 4k", image)
    run("check", "-r", "all", image)
    run("io", "-c", f"write -P 9 {at} 4k", "-c", f"read -P 9 {at} 4k", image)
    peer("qemu-img", "check", image)


def test_what_was_acknowledged_before_the_damage_was_met_is_kept(run, image):
    q = wounded(image, "data_is_the_l1_table")
    at = OVERLAPS["data_is_the_l1_table"](q) * 4096
    run("io", "-f", "qcow2", "-c", "write -P 7 14M 64k", "-c", f"write -P 9 {at} 4k", image,
        status=1)
    run("io", "-r", "-c", "read -P 7 14M 64k", image)


def test_version_2_has_no_mark_but_refuses_the_write(run, peer, tmp_path):
    path = tmp_path / "a"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096,compat=0.10", path, "16M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", path)
    q = wounded(path, "count_zero_of_l2")
    before = q.read(q.l1(0) & OFFSET, 4096)
    head = q.read(0, 4096)
    run("io", "-f", "qcow2", "-c", "write -P 9 15M 4k", path, status=1)
    assert q.read(q.l1(0) & OFFSET, 4096) == before and q.read(0, 4096) == head


def test_overlap_checks_may_be_left_out_by_name(run, image):
    for mode in ("none", "constant", "cached", "all"):
        run("io", "-c", "write -P 1 0 64k",
            "json:" + json.dumps({"driver": "qcow2", "overlap-check": mode,
                                  "file": {"driver": "file", "filename": str(image)}}))
    assert "overlap-check" in run("io", "-c", "read 0 1", "json:" + json.dumps(
        {"driver": "qcow2", "overlap-check": "some",
         "file": {"driver": "file", "filename": str(image)}}), status=1).stderr


# ---------------------------------------------------------------- killed while it repairs

def test_a_killed_repair_leaves_no_worse_an_image(strata, peer, tmp_path):
    """Killed after a while, again and again with more patience, until one gets through: at each
    stop the guest's data are whole, and the next repair does the rest."""
    path = tmp_path / "a"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", path,
         "48M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 12M", "-c", "write -P 2 30M 6M", path)
    q = damage.Patient(path)
    rng = random.Random(7)
    q.write(q.refblock(3), rng.randbytes(512))
    q.set64(q.reftable_offset + 8 * 5, 0)
    data = q.data()
    for i in rng.sample(data[1000:20000], 300):
        q.set_l2(i, q.l2(data[500]))
    stopped = 0
    for k in range(40):
        p = subprocess.Popen([strata, "check", "-q", "-f", "qcow2", "-r", "all", str(path)],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            p.wait(timeout=0.004 * 1.25 ** k)
            break
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
            stopped += 1
        peer("qemu-io", "-U", "-f", "qcow2", "-r", "-c", "read -P 1 0 12M",
             "-c", "read -P 2 30M 6M", path)
    assert p.returncode == CLEAN and stopped > 3
    assert look(["qemu-img"], path=path)[0] == CLEAN
    peer("qemu-io", "-U", "-f", "qcow2", "-r", "-c", "read -P 1 0 12M",
             "-c", "read -P 2 30M 6M", path)


def test_random_damage_is_repaired_or_told(strata, run, tmp_path, image):
    """Seeded garbage over metadata.  Success means that a second look finds nothing."""
    for seed in range(60):
        rng = random.Random(seed)
        path = tmp_path / "b"
        shutil.copy(image, path)
        q = damage.Patient(path)
        places = [q.l1_offset, q.reftable_offset, q.refblock(0), q.l1(0) & OFFSET]
        hosts = [q.host(i) for i in q.data()]
        for _ in range(rng.randrange(1, 5)):
            at = rng.choice(places) + 8 * rng.randrange(0, 64)
            q.set64(at, rng.choice([rng.getrandbits(64), q.get64(at) ^ 1 << rng.randrange(64),
                                    COPIED | hosts[rng.randrange(len(hosts))]]))
        status, counts, text, _ = look([strata], "-r", "all", path=path)
        assert status in (CLEAN, CORRUPT, FAILED, LEAKS), (seed, status, text[-500:])
        again = look([strata], path=path)
        assert again[:2] == (status, counts), seed
