# SPDX-License-Identifier: MIT
"""check -r of the formats whose maps have no counts: vdi, qed, parallels; with qemu-img's word on what is left."""
import random
import struct
from dataclasses import dataclass

import pytest

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Table:
    """How a format names its clusters."""
    fmt: str
    options: str
    cluster: int
    width: str      # of an entry
    nothing: int    # the entry of what is not there
    outside: int    # an entry that no file holds
    peer: bool = True

    def __str__(self):
        return self.fmt

    def entry_at(self, data, i):
        """Where the entry of cluster `i` lies in the image."""
        size = struct.calcsize(self.width)
        if self.fmt == "vdi":
            return struct.unpack_from("<I", data, 340)[0] + i * size
        if self.fmt == "parallels":
            return 64 + i * size
        l1, = struct.unpack_from("<Q", data, 40)
        return struct.unpack_from("<Q", data, l1)[0] + i * size


TABLES = [
    Table("vdi", "", MIB, "<I", 0xffffffff, 500),
    Table("qed", "cluster_size=64k,table_size=1", 64 * KIB, "<Q", 0, 900 * MIB, peer=False),
    Table("qed", "cluster_size=4k,table_size=2", 4 * KIB, "<Q", 0, 900 * MIB),
    Table("parallels", "cluster_size=64k", 64 * KIB, "<I", 0, 30000),
]
CLUSTERS = 10
tables = pytest.mark.parametrize("table", TABLES, ids=lambda t: "%s-%s" % (t.fmt, t.cluster // KIB))


@pytest.fixture
def image(run, tmp_path, table):
    """Clusters 1 to 6 hold bytes of their own number, the others nothing."""
    path = tmp_path / "image"
    options = ["-o", table.options] if table.options else []
    run("create", "-q", "-f", table.fmt, *options, path, CLUSTERS * table.cluster)
    for i in range(1, 7):
        run("io", "-f", table.fmt, "-c", f"write -q -P {i} {i * table.cluster} {table.cluster}", path)
    return path


def entry(path, table, i):
    data = path.read_bytes()
    return struct.unpack_from(table.width, data, table.entry_at(data, i))[0]


def set_entry(path, table, i, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(table.width, data, table.entry_at(data, i), value)
    path.write_bytes(data)


def holds(run, path, table, content):
    """content: what byte each cluster is full of."""
    script = [x for i, byte in content.items()
              for x in ("-c", f"read -q -P {byte} {i * table.cluster} {table.cluster}")]
    run("io", "-r", "-f", table.fmt, *script, path)


def sound(run, peer, path, table):
    run("check", "-f", table.fmt, path)
    if table.peer:
        peer("qemu-img", "check", "-f", table.fmt, path)


@tables
def test_an_entry_outside_the_file_becomes_free(run, peer, image, table):
    set_entry(image, table, 2, table.outside)
    run("check", "-f", table.fmt, image, status=2)
    out = run("check", "-f", table.fmt, "-r", "all", image).stdout
    assert "1 corruptions" in out
    assert entry(image, table, 2) == table.nothing
    holds(run, image, table, {0: 0, 1: 1, 2: 0, 3: 3, 6: 6})
    sound(run, peer, image, table)


@tables
def test_a_cluster_with_two_names_is_copied_for_the_second(run, peer, image, table):
    set_entry(image, table, 2, entry(image, table, 4))
    holds(run, image, table, {2: 4, 4: 4})
    run("check", "-f", table.fmt, "-r", "all", image)
    sound(run, peer, image, table)
    holds(run, image, table, {0: 0, 1: 1, 2: 4, 3: 3, 4: 4, 5: 5})
    run("io", "-f", table.fmt, "-c", f"write -q -P 9 {2 * table.cluster} {table.cluster}", image)
    holds(run, image, table, {2: 9, 4: 4})


@tables
def test_leaks_are_given_back_and_the_file_is_shorter(run, peer, image, table):
    for i in (3, 6):
        set_entry(image, table, i, table.nothing)
    before = image.stat().st_size
    leaks = 1 if table.fmt == "parallels" else 2  # one in the middle is room that nobody counts there
    assert f"{leaks} leaked clusters" in run("check", "-f", table.fmt, image, status=3).stdout
    run("check", "-f", table.fmt, "-r", "leaks", image)
    assert image.stat().st_size == before - leaks * table.cluster
    holds(run, image, table, {0: 0, 1: 1, 2: 2, 3: 0, 4: 4, 5: 5, 6: 0})
    sound(run, peer, image, table)


@tables
def test_leaks_alone_leaves_errors_as_they_are(run, image, table):
    set_entry(image, table, 2, table.outside)
    before = image.read_bytes()
    run("check", "-f", table.fmt, "-r", "leaks", image, status=2)
    assert image.read_bytes() == before


@tables
def test_a_sound_image_is_not_touched(run, image, table):
    before = image.read_bytes()
    run("check", "-f", table.fmt, "-r", "all", image)
    assert image.read_bytes() == before


def readable(run, path, table):
    """What each cluster reads as; None: it cannot be read."""
    found = {}
    for i in range(CLUSTERS):
        p = run("io", "-r", "-f", table.fmt, "-c", f"read -v {i * table.cluster} 512", path, status=None)
        lines = [x for x in p.stdout.splitlines() if ": " in x[:12]]
        found[i] = "\n".join(lines) if lines else None
    return found


@tables
def test_random_damage_is_repaired_and_what_could_be_read_stays(run, peer, image, table, seed):
    rng, sane = random.Random(seed), image.read_bytes()
    for _ in range(4):
        image.write_bytes(sane)
        for _ in range(rng.randrange(1, 6)):
            value = rng.choice([table.outside, table.nothing, entry(image, table, rng.randrange(1, 7)), table.outside - 1])
            set_entry(image, table, rng.randrange(CLUSTERS), value)
        before = readable(run, image, table)
        run("check", "-f", table.fmt, "-r", "all", image)
        sound(run, peer, image, table)
        after = readable(run, image, table)
        assert [after[i] for i in before if before[i] is not None] == [x for x in before.values() if x is not None]
        assert None not in after.values()


@pytest.mark.parametrize("table", [t for t in TABLES if t.fmt != "vdi" and t.peer], ids=str)
def test_what_qemu_img_repairs_reads_the_same_as_what_strata_repairs(run, peer, image, table, tmp_path):
    set_entry(image, table, 2, table.outside)
    theirs = tmp_path / "theirs"
    theirs.write_bytes(image.read_bytes())
    peer("qemu-img", "check", "-f", table.fmt, "-r", "all", theirs, status=None)
    run("check", "-f", table.fmt, "-r", "all", image)
    run("compare", "-f", table.fmt, "-F", table.fmt, image, theirs)


def mark(path, table):
    """As a writer leaves it that was killed."""
    data = bytearray(path.read_bytes())
    if table.fmt == "qed":
        data[16] |= 2
    else:
        struct.pack_into("<I", data, 44, 0x746f6e59)
    path.write_bytes(data)


def is_marked(path, table):
    data = path.read_bytes()
    return bool(data[16] & 2) if table.fmt == "qed" else struct.unpack_from("<I", data, 44)[0] == 0x746f6e59


marked = pytest.mark.parametrize("table", [t for t in TABLES if t.fmt != "vdi"], ids=lambda t: "%s-%s" % (t.fmt, t.cluster // KIB))


@marked
def test_an_image_left_in_use_is_repaired_by_the_next_writer(run, peer, image, table):
    set_entry(image, table, 2, table.outside)
    set_entry(image, table, 6, entry(image, table, 1))
    mark(image, table)
    holds(run, image, table, {1: 1, 6: 1, 3: 3})
    assert is_marked(image, table)
    run("io", "-f", table.fmt, "-c", f"write -q -P 8 {2 * table.cluster} {table.cluster}", image)
    assert not is_marked(image, table)
    holds(run, image, table, {0: 0, 1: 1, 2: 8, 3: 3, 6: 1})
    sound(run, peer, image, table)


@marked
def test_a_repair_takes_the_mark_away(run, image, table):
    set_entry(image, table, 2, table.outside)
    mark(image, table)
    run("check", "-f", table.fmt, "-r", "all", image)
    assert not is_marked(image, table)


@pytest.mark.parametrize("table", TABLES[1:3], ids=lambda t: "%s" % (t.cluster // KIB))
def test_qed_tables_that_overlap_are_left_alone(run, image, table):
    """Whose bytes they are could only be guessed."""
    set_entry(image, table, 2, struct.unpack_from("<Q", image.read_bytes(), 40)[0])
    set_entry(image, table, 3, table.outside)
    before = image.read_bytes()
    run("check", "-f", "qed", "-r", "all", image, status=2)
    assert image.read_bytes() == before
    mark(image, table)
    assert "not closed cleanly" in run("io", "-f", "qed", "-c", "write 0 1k", image, status=1).stderr


@pytest.mark.parametrize("table", TABLES[1:3], ids=lambda t: "%s" % (t.cluster // KIB))
def test_a_qed_table_moves_where_a_run_is_free(run, peer, tmp_path, table):
    path, size, span = tmp_path / "image", 160 * MIB, 2 * 1024 * 4096 if table.cluster == 4096 else 8192 * 65536
    size = span * 2
    run("create", "-q", "-f", "qed", "-o", table.options, path, size)
    run("io", "-f", "qed", "-c", f"write -q -P 1 0 {6 * table.cluster}", "-c", f"write -q -P 7 {span} {2 * table.cluster}", path)
    for i in range(4):
        set_entry(path, table, i, 0)
    before = path.stat().st_size
    assert "4 leaked" in run("check", path, status=3).stdout
    run("check", "-r", "leaks", path)
    assert path.stat().st_size == before - 4 * table.cluster
    run("io", "-r", "-f", "qed", "-c", f"read -q -P 0 0 {4 * table.cluster}", "-c",
        f"read -q -P 1 {4 * table.cluster} {2 * table.cluster}", "-c", f"read -q -P 7 {span} {2 * table.cluster}", path)
    sound(run, peer, path, table)


@pytest.mark.parametrize("table", TABLES[3:], ids=str)
def test_a_wrong_data_offset_of_parallels_is_repaired(run, peer, image, table):
    data = bytearray(image.read_bytes())
    right, = struct.unpack_from("<I", data, 48)
    for wrong in (0, 1, right - 1):
        struct.pack_into("<I", data, 48, wrong)
        image.write_bytes(data)
        assert "strata check -r all" in run("io", "-r", "-f", "parallels", "-c", "read 0 1k", image, status=1).stderr
        assert "data offset" in run("check", "-f", "parallels", image, status=2).stderr
        run("check", "-f", "parallels", "-r", "all", image)
        assert struct.unpack_from("<I", image.read_bytes(), 48)[0] == right
        holds(run, image, table, {0: 0, 1: 1, 6: 6})


@pytest.mark.parametrize("table", TABLES[:1], ids=str)
def test_a_full_vdi_disk_with_leaks_takes_the_unused_blocks(run, peer, image, table):
    """Readers refuse a header that counts more blocks than the disk has."""
    for i in (2, 3):
        set_entry(image, table, i, table.nothing)
    run("io", "-f", "vdi", *[x for i in (0, 2, 3, 7, 8, 9) for x in ("-c", f"write -q -P {i + 20} {i}M 1M")], image)
    assert struct.unpack_from("<I", image.read_bytes(), 388)[0] == 10
    holds(run, image, table, {0: 20, 1: 1, 2: 22, 3: 23, 4: 4, 9: 29})
    sound(run, peer, image, table)
