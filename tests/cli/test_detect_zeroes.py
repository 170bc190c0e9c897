# SPDX-License-Identifier: MIT
"""detect-zeroes=off|on|unmap and discard=: what written zeros and discards leave of the host's space."""
import json

import pytest

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(run, tmp_path):
    """16 MiB of disk in `fmt`, the first 8 MiB written."""
    def make(fmt):
        name = tmp_path / f"a.{fmt}"
        run("create", "-q", "-f", fmt, name, "16M")
        run("io", "-f", fmt, "-c", "write -P 7 0 8M", name)
        return name
    return make


def io(run, fmt, name, options, *commands, status=0):
    args = [x for c in commands for x in ("-c", c)]
    return run("io", *args, "--image-opts", f"driver={fmt},file.filename={name},{options}", status=status)


def held(name):
    return name.stat().st_blocks * 512


def runs(run, fmt, name):
    rows = json.loads(run("map", "-f", fmt, "--output=json", name).stdout)
    return [(r["start"], r["length"], r["zero"], r["data"]) for r in rows]


def test_off_writes_zeros_as_data(run, image):
    name = image("qcow2")
    io(run, "qcow2", name, "detect-zeroes=off", "write -P 0 0 1M")
    assert runs(run, "qcow2", name)[0] == (0, 8 * MIB, False, True)


def test_on_makes_zero_clusters_that_keep_their_room(run, peer, image):
    name = image("qcow2")
    before = held(name)
    io(run, "qcow2", name, "detect-zeroes=on,discard=unmap", "write -P 0 1M 2M", "read -P 0 1M 2M",
       "read -P 7 0 1M", "read -P 7 3M 5M")
    # a zero cluster whose room stays is "data": it is allocated
    rows = [r for r in json.loads(run("map", "-f", "qcow2", "--output=json", name).stdout) if r["zero"] and r["present"]]
    assert [(r["start"], r["length"]) for r in rows] == [(MIB, 2 * MIB)] and "offset" in rows[0]
    assert held(name) >= before
    peer("qemu-img", "check", "-q", "-f", "qcow2", name)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_unmap_gives_the_room_back(run, peer, image, fmt):
    name = image(fmt)
    before = held(name)
    io(run, fmt, name, "detect-zeroes=unmap,discard=unmap", "write -P 0 1M 4M", "read -P 0 1M 4M",
       "read -P 7 5M 3M", "flush")
    assert before - held(name) >= 4 * MIB - 128 * KIB
    if fmt == "qcow2":
        peer("qemu-img", "check", "-q", "-f", "qcow2", name)


def test_unmap_needs_discard_unmap(run, image):
    p = io(run, "qcow2", image("qcow2"), "detect-zeroes=unmap", "write -P 0 0 1M", status=None)
    if p.returncode == 0:  # io opens with discard=unmap by itself
        p = io(run, "qcow2", image("raw"), "detect-zeroes=unmap,discard=ignore", "read 0 1M", status=1)
    assert "detect-zeroes to unmap is not allowed without setting discard operation to unmap" in p.stderr


def test_an_unknown_mode_is_refused(run, image):
    p = io(run, "qcow2", image("qcow2"), "detect-zeroes=maybe", "read 0 1M", status=1)
    assert "detect-zeroes is 'off', 'on' or 'unmap', not 'maybe'" in p.stderr


def test_zeros_inside_a_larger_write_are_found(run, peer, tmp_path):
    """As the target of a copy that was told to write everything (-S 0)."""
    src, dst = tmp_path / "src.raw", tmp_path / "dst.qcow2"
    piece = b"".join(bytes([i % 3 and 65 + i]) * 64 * KIB for i in range(48))  # two of three are data
    src.write_bytes(piece)
    for detect, data in (("off", 48), ("on", 32)):
        run("create", "-q", "-f", "qcow2", dst, str(len(piece)))
        run("convert", "-n", "-S", "0", "-f", "raw", "--target-image-opts", src,
            f"driver=qcow2,file.filename={dst},detect-zeroes={detect}")
        rows = json.loads(peer("qemu-img", "map", "--output=json", dst).stdout)
        assert sum(r["length"] for r in rows if r["data"]) == data * 64 * KIB, detect
        peer("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", src, dst)


def test_parts_of_clusters_in_a_write_of_zeros_keep_their_neighbours(run, image):
    name = image("qcow2")
    io(run, "qcow2", name, "detect-zeroes=on", "write -P 0 1000 200000", "read -P 7 0 1000", "read -P 0 1000 200000",
       "read -P 7 201000 100000")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("mode,freed", [("unmap", True), ("on", True), ("ignore", False), ("off", False)])
def test_discard_reaches_the_file_where_asked(run, peer, image, fmt, mode, freed):
    name = image(fmt)
    before = held(name)
    io(run, fmt, name, f"discard={mode}", "discard 1M 4M", "flush")
    gone = before - held(name)
    assert gone >= 4 * MIB - 128 * KIB if freed else gone <= 128 * KIB
    if fmt == "qcow2":
        assert sum(n for _, n, z, d in runs(run, fmt, name) if d) == 4 * MIB
        peer("qemu-img", "check", "-q", "-f", "qcow2", name)
    elif not freed:
        io(run, fmt, name, "discard=off", "read -P 7 1M 4M")
