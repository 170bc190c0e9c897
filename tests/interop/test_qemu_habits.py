# SPDX-License-Identifier: MIT
"""What QEMU's own tests found in the drop-in programs, one behaviour a test, each under the drop-in
name and where Debian's programs can tell, beside them."""
import json
import os
import subprocess

import pytest

MIB = 1 << 20


@pytest.fixture
def tool(strata, tmp_path):
    """tool("qemu-img", ..., status=0) in tmp_path."""
    links = tmp_path / "bin"
    links.mkdir()
    for name in ("qemu-img", "qemu-io"):
        (links / name).symlink_to(os.path.abspath(strata))

    def call(name, *args, status=0, peer=False):
        program = name if peer else str(links / name)
        p = subprocess.run([program, *map(str, args)], cwd=tmp_path, capture_output=True, text=True,
                           timeout=60)
        assert p.returncode == status, p.stdout + p.stderr
        return p

    return call


def entries(tool, *args):
    return json.loads(tool("qemu-img", "map", "--output=json", *args).stdout)


def test_vm_state_lies_beside_the_disk_and_survives_a_snapshot(tool):
    tool("qemu-img", "create", "-q", "-f", "qcow2", "a", "16M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -b -P 7 1M 64k", "-c", "read -P 0 1M 64k", "a")
    tool("qemu-io", "-f", "qcow2", "-c", "read -b -P 7 1M 64k", "a", peer=True)
    tool("qemu-img", "snapshot", "-c", "s", "a")
    tool("qemu-img", "snapshot", "-a", "s", "a")
    tool("qemu-io", "-f", "qcow2", "-c", "read -b -P 7 1M 64k", "-c", "read -b -P 0 0 1M", "a")
    tool("qemu-img", "check", "a", peer=True)


def test_vm_state_has_no_part_in_the_layer_below(tool):
    tool("qemu-img", "create", "-q", "-f", "raw", "base", "1G")
    tool("qemu-io", "-f", "raw", "-c", "write -q -P 9 512M 1M", "base")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "a", "16M")
    tool("qemu-io", "-f", "qcow2", "-c", "read -b -P 0 0 1M", "-c", "write -b -P 3 512 512",
         "-c", "read -b -P 0 0 512", "-c", "read -b -P 3 512 512", "a")


def test_raw_has_no_vm_state(tool):
    tool("qemu-img", "create", "-q", "-f", "raw", "a", "1M")
    assert "failed: Operation not supported" in tool("qemu-io", "-f", "raw", "-c", "read -b 0 512", "a",
                                                     status=1).stdout


@pytest.mark.parametrize("line", [["create", "-q", "-f", "raw", "a", "1M"],
                                  ["convert", "-f", "raw", "-O", "raw", "empty", "a"]],
                         ids=["create", "convert"])
def test_a_new_raw_file_has_its_first_block(tool, tmp_path, line):
    with open(tmp_path / "empty", "wb") as f:
        f.truncate(MIB)
    tool("qemu-img", *line)
    first = entries(tool, "-f", "raw", "a")[0]
    assert first["data"] and first["length"] == 4096


def test_convert_tells_of_each_piece(tool):
    tool("qemu-img", "create", "-q", "-f", "raw", "a", "128M")
    for at in (0, 2, 4, 32):
        tool("qemu-io", "-f", "raw", "-c", f"write -q {at}M 1M", "a")
    told = tool("qemu-img", "convert", "-p", "-f", "raw", "-O", "qcow2", "a", "b").stdout
    assert told.split() == [f"({x}.00/100%)" for x in (0, 25, 50, 75, 100, 100)]


def test_salvage_gives_up_sectors_and_names_each(tool, tmp_path):
    (tmp_path / "a").write_bytes(b"\x2a" * MIB)
    faults = [{"event": "none", "iotype": kind, "errno": 5, "sector": s}
              for kind, s in (("block-status", 512), ("read", 1024), ("read", 1025))]
    source = "json:" + json.dumps({"driver": "blkdebug", "inject-error": faults, "image": {
        "driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "a")}}})
    told = tool("qemu-img", "convert", "--salvage", "-O", "raw", source, "b").stderr.splitlines()
    prefix = "qemu-img: warning: error while reading "
    assert told[-2:] == [prefix + f"offset {s * 512}: Input/output error" for s in (1024, 1025)]
    assert set(told[:-2]) == {prefix + "block status at offset 262144: Input/output error"}
    want = bytearray(b"\x2a" * MIB)
    want[1024 * 512:1026 * 512] = bytes(1024)
    assert (tmp_path / "b").read_bytes() == want


def test_devices_are_told_from_files(tool, tmp_path):
    def said(driver, name, *opts):
        return tool("qemu-io", "-c", f"open {' '.join(opts)} -o driver={driver},filename={name}",
                    status=1).stderr

    assert "'file' driver requires '/dev/null' to be a regular file" in said("file", "/dev/null")
    for driver in ("host_device", "host_cdrom"):
        assert f"'{driver}' driver requires '{tmp_path}' to be either a character or block device" \
            in said(driver, tmp_path, "-r")
        assert f"Could not open '{tmp_path}': Is a directory" in said(driver, tmp_path)
        tool("qemu-io", "-c", f"open -o driver={driver},filename=/dev/null,locking=off")


def test_part_of_a_cluster_becomes_a_zero_cluster_where_the_rest_reads_so(tool):
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "base", "1M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 65k 1k", "-c", "write -q -P 1 128k 1k", "base")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "a")
    # All of the data of one cluster; beside the data of another; over the border of two empty ones.
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -z 65k 2k", "-c", "write -q -z 130k 1k",
         "-c", "write -q -z 319k 2k", "a")
    tool("qemu-io", "-f", "qcow2", "-c", "read -P 0 64k 64k", "-c", "read -P 1 128k 1k",
         "-c", "read -P 0 129k 500k", "a")
    top = {e["start"] // 65536: e for e in entries(tool, "-f", "qcow2", "a") if not e["depth"]}
    assert top[1]["zero"] and not top[1]["data"]
    assert top[2]["data"] and top[4]["zero"] and top[4]["length"] == 2 * 65536


def test_convert_with_the_option_backing_file_copies_the_top_layer(tool):
    tool("qemu-img", "create", "-q", "-f", "qcow2", "base", "4M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 1M", "base")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 2 2M 64k", "top")
    tool("qemu-img", "convert", "-O", "qcow2", "-o", "backing_file=base,backing_fmt=qcow2", "top", "a")
    assert [e["start"] for e in entries(tool, "-f", "qcow2", "a")
            if not e["depth"] and e["data"]] == [2 * MIB]
    tool("qemu-img", "compare", "top", "a")


def test_discards_smaller_than_the_limit_of_the_fault_filter_go_through(tool):
    tool("qemu-img", "create", "-q", "-f", "qcow2", "a", "64M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 64M", "a")
    tool("qemu-io", "-c", "open -o driver=blkdebug,image.driver=qcow2,align=512,opt-discard=15M,"
         "max-discard=15M blkdebug::a", "-c", "discard 1M 32M")
    tool("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 0 1M 32M", "a")


@pytest.mark.parametrize("options, words", [
    ("cache-size=1M,l2-cache-size=64k,refcount-cache-size=64k", "may not be set at the same time"),
    ("cache-size=1M,l2-cache-size=2M", "l2-cache-size may not exceed cache-size"),
    ("cache-size=1M,refcount-cache-size=2M", "refcount-cache-size may not exceed cache-size"),
    ("l2-cache-entry-size=128k", "must be a power of two between 512 and the cluster size (65536)"),
])
def test_cache_sizes_that_do_not_go_together_are_refused(tool, options, words):
    tool("qemu-img", "create", "-q", "-f", "qcow2", "a", "1M")
    assert words in tool("qemu-io", "-c", f"open -o {options} a", status=1).stderr


def test_the_smallest_caches_work(tool):
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a", "64M")
    tool("qemu-io", "-c", "open -o driver=qcow2,cache-size=0,l2-cache-entry-size=512 a",
         "-c", "write -q -P 5 0 32M", "-c", "read -P 5 0 32M")
    tool("qemu-img", "check", "a", peer=True)


def test_the_base_of_commit_is_named_as_seen_from_the_image(tool, tmp_path):
    (tmp_path / "d").mkdir()
    tool("qemu-img", "create", "-q", "-f", "qcow2", "d/base", "1M")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "d/top")
    assert "Did not find 'd/base' in the backing chain of 'd/top'" in tool(
        "qemu-img", "commit", "-b", "d/base", "d/top", status=1).stderr
    tool("qemu-img", "commit", "-b", "base", "d/top")


def test_a_repair_clears_unknown_autoclear_bits(tool, tmp_path):
    tool("qemu-img", "create", "-q", "-f", "qcow2", "a", "1M")
    with open(tmp_path / "a", "r+b") as f:
        f.seek(88)
        f.write(b"\x80")
    tool("qemu-img", "check", "-r", "all", "a")
    assert (tmp_path / "a").read_bytes()[88:96] == bytes(8)
