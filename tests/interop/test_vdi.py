# SPDX-License-Identifier: MIT
"""VDI: what only it has."""
import json
import struct
import uuid

import pytest

MIB = 1 << 20
AT = dict(signature=64, version=68, header_size=72, type=76, map=340, data=344, sector_size=360,
          block_size=376, extra=380, blocks=384, allocated=388)


@pytest.fixture
def image(run, tmp_path):
    path = tmp_path / "a.vdi"
    run("create", "-q", "-f", "vdi", path, "10M")
    run("io", "-f", "vdi", "-c", "write -q -P 5 3M 2M", path)
    return path


def patch(path, at, value, width="<I"):
    data = bytearray(path.read_bytes())
    struct.pack_into(width, data, at, value)
    path.write_bytes(data)


def field(path, name):
    return struct.unpack_from("<I", path.read_bytes(), AT[name])[0]


@pytest.mark.parametrize("name,value,words", [
    ("signature", 0x1234, "signature 0x00001234"),
    ("version", 0x00020001, "version 2.1"),
    ("header_size", 8, "header size 8"),
    ("type", 9, "image type 9"),
    ("map", 0x100, "block map at 256"),
    ("data", 0x200, "overlap"),
    ("sector_size", 4096, "sector size 4096"),
    ("block_size", 3 * MIB, "block size 3145728"),
    ("block_size", 0, "block size 0"),
    ("extra", 0xffffffff, "4294967295 extra bytes"),
    ("blocks", 0xffffffff, "4294967295 blocks"),
    ("blocks", 3, "disk size 10485760"),
    ("allocated", 11, "11 of 10 blocks"),
])
def test_a_field_out_of_its_range_is_named(run, image, name, value, words):
    patch(image, AT[name], value)
    p = run("info", "-f", "vdi", image, status=1)
    assert words in p.stderr, p.stderr


def test_a_map_behind_the_end_of_the_file_is_refused(run, image):
    image.write_bytes(image.read_bytes()[:520])
    assert "behind the end of the file" in run("info", "-f", "vdi", image, status=1).stderr


def test_a_block_that_the_file_does_not_hold_is_found_and_not_read(run, image):
    patch(image, 512, 77)
    p = run("check", image, status=2)
    assert "map entry 0 names block 77" in p.stdout + p.stderr
    assert run("io", "-r", "-c", "read 0 4k", image, status=1)


def test_a_block_named_twice_is_found(run, image):
    patch(image, 512, 0)
    assert "another entry names too" in "".join(
        [(p := run("check", image, status=2)).stdout, p.stderr])


def test_a_count_that_misses_a_named_block_is_damage_and_one_above_a_leak(run, image):
    patch(image, AT["allocated"], 1)
    run("check", image, status=2)
    patch(image, AT["allocated"], 4)
    run("check", image, status=3)


def test_a_stale_count_does_not_make_the_next_write_hit_a_block_in_use(run, image):
    patch(image, AT["allocated"], 0)
    run("io", "-c", "write -q -P 9 0 1M", "-c", "read -q -P 5 3M 2M", image)
    run("check", image)
    assert field(image, "allocated") == 3


def test_blocks_are_dense_and_counted(run, peer, image):
    run("io", "-c", "write -q -z -u 3M 1M", "-c", "discard -q 4M 1M", "-c", "write -q 0 1M", image)
    assert field(image, "allocated") == 3
    assert image.stat().st_size == 1024 + 3 * MIB
    peer("qemu-img", "check", "-f", "vdi", image)


def test_bytes_before_each_block_are_passed_over(run, image):
    data = image.read_bytes()
    head, blocks = bytearray(data[:1024]), data[1024:]
    struct.pack_into("<I", head, AT["extra"], 512)
    image.write_bytes(head + b"".join(b"\xee" * 512 + blocks[i:i + MIB]
                                      for i in range(0, len(blocks), MIB)))
    run("io", "-c", "read -q -P 5 3M 2M", "-c", "read -q -P 0 0 3M", "-c", "write -q -P 6 0 2M",
        "-c", "read -q -P 6 0 2M", "-c", "read -q -P 5 3M 2M", image)
    run("check", image)


def test_version_0_is_read_and_not_written(run, tmp_path):
    path = tmp_path / "old.vdi"
    head = bytearray(420)
    struct.pack_into("<II", head, 64, 0xbeda107f, 1)
    struct.pack_into("<I", head, 72, 1)
    struct.pack_into("<I", head, 348, 512)
    struct.pack_into("<QIII", head, 352, 3 * MIB, MIB, 3, 1)
    path.write_bytes(head + struct.pack("<III", 0xffffffff, 0, 0xffffffff) + b"\x21" * MIB)
    run("io", "-r", "-c", "read -q -P 0 0 1M", "-c", "read -q -P 33 1M 1M", "-c",
        "read -q -P 0 2M 1M", path)
    assert "only be read" in run("io", "-c", "write 0 1k", path, status=1).stderr


def test_an_image_grows_as_far_as_its_map_has_room(run, peer, image):
    run("resize", image, "128M")
    run("io", "-c", "write -q -P 7 127M 1M", "-c", "read -q -P 5 3M 2M", "-c", "read -q -P 7 127M 1M",
        image)
    peer("qemu-img", "check", "-f", "vdi", image)
    assert "room for 128" in run("resize", image, "129M", status=1).stderr
    assert "cannot shrink" in run("resize", "--shrink", image, "1M", status=1).stderr


@pytest.fixture
def child(image, tmp_path):
    """A differencing image over `image`: block 0 its own, block 1 zeros, block 3 the parent's."""
    path, head = tmp_path / "child.vdi", bytearray(image.read_bytes()[:1024])
    struct.pack_into("<I", head, AT["type"], 4)
    struct.pack_into("<I", head, AT["allocated"], 1)
    head[424:440] = head[392:408]
    head[392:408] = uuid.uuid4().bytes_le
    struct.pack_into("<10I", head, 512, 0, 0xfffffffe, *[0xffffffff] * 8)
    path.write_bytes(head + b"\x31" * MIB)
    return path


def test_a_differencing_image_reads_through_the_parent_that_is_named(run, image, child):
    tree = json.dumps({"driver": "vdi", "file": {"filename": str(child)},
                       "backing": {"driver": "vdi", "file": {"filename": str(image)}}})
    run("io", "-c", "read -q -P 49 0 1M", "-c", "read -q -P 0 1M 2M", "-c", "read -q -P 5 3M 2M",
        "-c", "write -q -z 3M 1M", "-c", "read -q -P 0 3M 1M", "-c", "read -q -P 5 4M 1M",
        "-c", "write -q -P 8 4M 512", "-c", "read -q -P 8 4M 512", "-c", "read -q -P 5 4097k 1023k",
        f"json:{tree}")
    run("check", child)


def test_a_differencing_image_alone_says_which_parent_it_wants(run, image, child, tmp_path):
    alone = tmp_path / "alone" / "child.vdi"
    alone.parent.mkdir()
    alone.write_bytes(child.read_bytes())
    p = run("io", "-r", "-c", "read 0 1k", alone, status=1)
    wanted = json.loads(run("info", "--output=json", image).stdout)
    assert wanted["format-specific"]["data"]["uuid"] in p.stderr and "backing.file.filename" in p.stderr
    assert "parent-uuid" in run("info", "--output=json", alone).stdout


def test_the_parent_is_found_beside_the_image(run, image, child):
    script = ["-c", "read -q -P 49 0 1M", "-c", "read -q -P 0 1M 2M", "-c", "read -q -P 5 3M 2M"]
    run("io", "-r", *script, child)
    run("io", "-c", "write -q -z 3M 1M", "-c", "read -q -P 0 3M 1M", "-c", "read -q -P 5 4M 1M", child)
    assert '"depth": 1' in run("map", "--output=json", child).stdout


def test_the_gate_decides_where_the_parent_is_looked_for(run, image, child, tmp_path):
    assert "--trust none" in run("io", "-r", "--trust", "none", "-c", "read 0 1k", child, status=1).stderr
    inside = tmp_path / "Snapshots" / "child.vdi"
    inside.parent.mkdir()
    inside.write_bytes(child.read_bytes())
    assert "no file beside it" in run("io", "-r", "-c", "read 0 1k", inside, status=1).stderr
    run("io", "-r", "--trust", "local", "-c", "read -q -P 5 3M 2M", inside)
    # A link in the folder is not looked at: it could lead anywhere.
    (inside.parent / "link.vdi").symlink_to(image)
    assert "no file beside it" in run("io", "-r", "-c", "read 0 1k", inside, status=1).stderr


def test_two_files_that_could_be_the_parent_are_named(run, image, child, tmp_path):
    (tmp_path / "copy.vdi").write_bytes(image.read_bytes())
    error = run("io", "-r", "-c", "read 0 1k", child, status=1).stderr
    assert "copy.vdi" in error and image.name in error


def test_zeros_written_without_the_parent_hide_it_too(run, image, child):
    run("io", "-c", "write -q -z 3M 1M", json_alone(child))
    run("io", "-r", "-c", "read -q -P 0 3M 1M", "-c", "read -q -P 5 4M 1M", child)


def json_alone(path):
    return "json:" + json.dumps({"driver": "vdi", "backing": None, "file": {"filename": str(path)}})


def test_a_differencing_image_is_made_over_its_parent(run, image, tmp_path):
    path = tmp_path / "new.vdi"
    run("create", "-q", "-f", "vdi", "-b", image.name, "-F", "vdi", path)
    run("io", "-c", "read -q -P 5 3M 2M", "-c", "write -q -P 6 4M 1k", path)
    run("io", "-r", "-c", "read -q -P 5 3M 1M", "-c", "read -q -P 6 4M 1k", "-c", "read -q -P 5 4097k 1023k", path)
    run("check", path)
    assert field(path, "type") == 4
    # The parent as it was: after a write it is another image.
    run("io", "-c", "write -q -P 1 9M 1M", image)
    assert "unchanged" in run("io", "-r", "-c", "read 0 1k", path, status=1).stderr


def test_a_parent_of_another_format_cannot_be_recorded(run, tmp_path):
    run("create", "-q", "-f", "qcow2", tmp_path / "b", "10M")
    p = run("create", "-q", "-f", "vdi", "-b", "b", "-F", "qcow2", tmp_path / "c", status=1)
    assert "not qcow2" in p.stderr and not (tmp_path / "c").exists()


@pytest.mark.parametrize("kind", [2, 3])
def test_fixed_and_undo_images_are_read_and_written(run, image, kind):
    patch(image, AT["type"], kind)
    run("io", "-c", "read -q -P 5 3M 2M", "-c", "write -q -P 7 1M 1M", "-c", "read -q -P 7 1M 1M", "-c",
        "read -q -P 0 0 1M", image)
    run("check", image)
    assert {2: "fixed", 3: "undo"}[kind] in run("info", image).stdout


def test_another_parent_is_refused(run, tmp_path, child):
    other = tmp_path / "other.vdi"
    run("create", "-q", "-f", "vdi", other, "10M")
    tree = json.dumps({"driver": "vdi", "file": {"filename": str(child)},
                       "backing": {"driver": "vdi", "file": {"filename": str(other)}}})
    assert "the parent is" in run("io", "-r", "-c", "read 0 1k", f"json:{tree}", status=1).stderr


# ---- rebase and commit

def told(run, path):
    return json.loads(run("info", "--output=json", path).stdout)["format-specific"]["data"]


def test_a_commit_empties_a_child_that_names_its_changed_parent(run, image, child):
    run("rebase", "-u", "-b", image.name, "-F", "vdi", child)
    run("io", "-c", "write -q -P 8 4M 512", "-c", "write -q -P 9 9M 1M", child)
    before = told(run, image)["modification-uuid"]
    run("commit", "-q", child)
    script = ["-c", "read -q -P 49 0 1M", "-c", "read -q -P 0 1M 2M", "-c", "read -q -P 5 3M 1M",
              "-c", "read -q -P 8 4M 512", "-c", "read -q -P 5 4097k 1023k", "-c", "read -q -P 9 9M 1M"]
    for path in image, child:
        run("io", "-r", *script, path)
        run("check", path)
    now = told(run, image)["modification-uuid"]
    assert now != before and child.read_bytes()[440:456] == uuid.UUID(now).bytes_le
    assert field(child, "allocated") == 0 and child.stat().st_size == 1024
    run("io", "-c", "write -q -P 3 3M 1M", child)
    run("commit", "-q", child)
    run("io", "-r", "-c", "read -q -P 3 3M 1M", "-c", "read -q -P 8 4M 512", image)


def test_a_child_whose_parent_has_changed_is_linked_anew(run, image, child):
    run("commit", "-q", "-d", child)
    run("io", "-c", "write -q -P 8 9M 1M", image)
    patched = bytearray(child.read_bytes())
    patched[440:456] = uuid.uuid4().bytes_le
    child.write_bytes(patched)
    assert "unchanged" in run("io", "-r", "-c", "read 0 1k", child, status=1).stderr
    run("rebase", "-u", "-b", image.name, "-F", "vdi", child)
    run("io", "-r", "-c", "read -q -P 49 0 1M", "-c", "read -q -P 8 9M 1M", child)


def test_a_rebase_moves_a_child_to_another_parent_and_to_none(run, image, child, tmp_path):
    other = tmp_path / "other.vdi"
    run("create", "-q", "-f", "vdi", other, "10M")
    run("io", "-c", "write -q -P 5 3M 1M", "-c", "write -q -P 6 8M 1M", other)
    run("rebase", "-q", "-b", other.name, "-F", "vdi", child)
    image.unlink()
    script = ["-c", "read -q -P 49 0 1M", "-c", "read -q -P 0 1M 2M", "-c", "read -q -P 5 3M 2M", "-c",
              "read -q -P 0 5M 5M"]
    run("io", "-r", *script, child)
    run("check", child)
    run("rebase", "-q", "-b", "", child)
    other.unlink()
    run("io", "-r", *script, child)
    run("check", child)
    assert field(child, "type") == 1 and "parent-uuid" not in told(run, child)


def test_an_image_without_a_parent_gets_one(run, image, tmp_path):
    top = tmp_path / "top.vdi"
    run("create", "-q", "-f", "vdi", top, "10M")
    run("io", "-c", "write -q -P 2 4M 512", top)
    run("rebase", "-q", "-b", image.name, "-F", "vdi", top)
    assert field(top, "type") == 4
    run("io", "-r", "-c", "read -q -P 0 0 4M", "-c", "read -q -P 2 4M 512", "-c", "read -q -P 0 4097k 5M", top)
    run("check", top)


def test_parents_that_cannot_be_recorded_are_refused_and_nothing_changes(run, image, child, tmp_path):
    run("create", "-q", "-f", "qcow2", tmp_path / "b.qcow2", "10M")
    fixed = tmp_path / "fixed.vdi"
    run("create", "-q", "-f", "vdi", "-o", "static=on", fixed, "10M")
    before = child.read_bytes(), fixed.read_bytes()
    assert "not qcow2" in run("rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", child, status=1).stderr
    assert "fixed image" in run("rebase", "-u", "-b", image.name, "-F", "vdi", fixed, status=1).stderr
    run("rebase", "-u", "-b", "missing.vdi", "-F", "vdi", child, status=1)
    assert (child.read_bytes(), fixed.read_bytes()) == before
