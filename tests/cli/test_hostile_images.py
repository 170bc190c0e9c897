# SPDX-License-Identifier: MIT
"""Images made to do harm: each gets one clear line, exit status 1, and nothing is written.

Every run is bounded: 1 GiB of address space, 20 s of processor time, so that an image cannot make
strata allocate or compute without end.  What other tests show is not repeated here: what is no
disk at all (test_info, test_map, ...), lying header fields under info and map (test_info_qcow2).
"""
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys

import pytest

sys.path[:0] = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
from conftest import sanitized  # noqa: E402
from images import NOT_DISKS, assert_one_line_error, without_root  # noqa: E402
from test_info_qcow2 import LIES  # noqa: E402

CLUSTER = 65536
SANITIZED = sanitized()


def bounded():
    """Before exec: limits of memory and time.  AddressSanitizer reserves terabytes of addresses."""
    if not SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


@pytest.fixture
def strict(run):
    """run() within the limits."""
    def call(*args, **kw):
        return run(*args, preexec_fn=bounded, **{"timeout": 60, **kw})
    return call


@pytest.fixture
def make(run, tmp_path):
    """make(name, *create arguments) -> path of an image with one written cluster, at guest 64k."""
    def call(name="a.qcow2", *args, size="64M", data=True):
        path = tmp_path / name
        run("create", "-q", "-f", "qcow2", *args, path, size)
        if data:
            run("io", "-f", "qcow2", "-c", "write -P 9 64k 64k", path)
        return path
    return call


def patch(path, offset, data):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(data)


def be64_at(path, offset):
    with open(path, "rb") as f:
        f.seek(offset)
        return struct.unpack(">Q", f.read(8))[0]


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What is tried on an image that must be refused: {} is the image, {out} a new file.
VERBS = {
    "info": ["info", "{}"],
    "convert": ["convert", "-O", "raw", "{}", "{out}"],
    "compare": ["compare", "{}", "{}"],
    "serve": ["serve", "-k", "{sock}", "{}"],
    "serve-snapshot": ["serve", "--snapshot", "-k", "{sock}", "{}"],
    "io": ["io", "-c", "write 0 64k", "{}"],
}


def refused(strict, path, verb, *parts, before=()):
    """The verb refuses the image in one line, within the limits, and leaves no trace."""
    folder, digest = sorted(os.listdir(path.parent)), sha(path)
    args = [a.format(path, out=path.parent / "out.raw", sock=path.parent / "sock")
            for a in VERBS[verb]]
    p = strict(args[0], *before, *args[1:], status=None)
    # compare says 2 for its own failures; everything else says 1.
    assert p.returncode == (2 if verb == "compare" else 1), (p.returncode, p.stderr)
    assert_one_line_error(p, *parts)
    assert sorted(os.listdir(path.parent)) == folder
    assert sha(path) == digest
    return p


# An image with features that are not known is described by info, and used by nobody.
USING = [v for v in VERBS if v != "info"]


# ---- headers that lie: the verbs that read and write data refuse as info does

@pytest.mark.parametrize("verb", [v for v in VERBS if v != "info"])
@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_by_every_verb(strict, make, verb, lie):
    path = make()
    patch(path, *LIES[lie])
    refused(strict, path, verb)


# name -> (offset, bytes, words of the refusal): the message names the value that was found
NAMED = {
    "cluster-bits-0": (20, struct.pack(">I", 0), "cluster_bits 0"),
    "cluster-bits-8": (20, struct.pack(">I", 8), "cluster_bits 8"),
    "cluster-bits-22": (20, struct.pack(">I", 22), "cluster_bits 22"),
    "cluster-bits-63": (20, struct.pack(">I", 63), "cluster_bits 63"),
    "version": (4, struct.pack(">I", 9), "version 9"),
    "size": (24, struct.pack(">Q", 1 << 63), str(1 << 63)),
    "l1-size-max": (36, struct.pack(">I", 0xffffffff), str(0xffffffff)),
    "l1-unaligned": (40, struct.pack(">Q", 0x30001), str(0x30001)),
    "l1-overflow": (40, struct.pack(">Q", 0xffffffffffff0000), str(0xffffffffffff0000)),
    "l1-out-of-file": (40, struct.pack(">Q", 1 << 40), str(1 << 40)),
    "reftable-unaligned": (48, struct.pack(">Q", 513), "513"),
    "reftable-clusters-max": (56, struct.pack(">I", 0xffffffff), str(0xffffffff)),
    "reftable-over-l1": (48, struct.pack(">Q", 3 * CLUSTER), str(3 * CLUSTER)),
    "refcount-order-7": (96, struct.pack(">I", 7), "refcount_order 7"),
    "header-length": (100, struct.pack(">I", 65544), "65544"),
    "snapshots-max": (60, struct.pack(">I", 70000), "70000"),
}


@pytest.mark.parametrize("what", NAMED)
def test_the_value_found_is_named(strict, make, what):
    offset, data, words = NAMED[what]
    path = make()
    patch(path, offset, data)
    refused(strict, path, "info", str(path), words)


# ---- tables that lie: opened for writing, the image is refused or the damage met is an error

def l2_entry_at(path):
    """Where the L2 entry of the written cluster (index 1) lies."""
    return (be64_at(path, be64_at(path, 40)) & 0x00fffffffffffe00) + 8


TABLES = {
    "reftable-entry-unaligned": lambda p: (be64_at(p, 48), 0x10200),
    "reftable-entry-reserved-bits": lambda p: (be64_at(p, 48), 1),
    "reftable-entry-beyond": lambda p: (be64_at(p, 48), 0xffffffffffff0000),
    "refcount-block-is-the-l1-table": lambda p: (be64_at(p, 48), be64_at(p, 40)),
    "l2-table-is-the-header": lambda p: (be64_at(p, 40), 1 << 63),
    "l2-table-is-the-l1-table": lambda p: (be64_at(p, 40), be64_at(p, 40) | 1 << 63),
    "l2-table-is-a-refcount-block": lambda p: (be64_at(p, 40), be64_at(p, be64_at(p, 48)) | 1 << 63),
    "l2-table-unaligned": lambda p: (be64_at(p, 40), be64_at(p, be64_at(p, 40)) + 512),
    "l2-table-beyond": lambda p: (be64_at(p, 40), 0x80fffffffffe0000),
    "data-over-the-header": lambda p: (l2_entry_at(p), 1 << 63 | 0x200),
    "data-over-the-l1-table": lambda p: (l2_entry_at(p), 1 << 63 | be64_at(p, 40)),
    "data-over-the-refcount-table": lambda p: (l2_entry_at(p), 1 << 63 | be64_at(p, 48)),
    "data-unaligned": lambda p: (l2_entry_at(p), 1 << 63 | 0x50200),
}


# An L1 entry without an offset names no table: there, a new one is the right thing.
@pytest.mark.parametrize("what", [w for w in TABLES if w != "l2-table-is-the-header"])
def test_damaged_tables_are_never_written_through(strict, make, what):
    """The header, the L1 table and the refcount table are as before, whatever the guest writes."""
    path = make()
    at, entry = TABLES[what](path)
    patch(path, at, struct.pack(">Q", entry))
    before = path.read_bytes()[:4 * CLUSTER]
    p = strict("io", "-f", "qcow2", "-c", "write -P 1 64k 64k", "-c", "write -P 1 130000 9k", path,
               status=None)
    assert p.returncode in (0, 1)
    after = path.read_bytes()
    if p.returncode:
        assert "strata: " in p.stderr or "failed" in p.stdout + p.stderr
    tables = {0, be64_at(path, 40) // CLUSTER, be64_at(path, 48) // CLUSTER}
    for cluster in tables:
        was, now = (x[cluster * CLUSTER:][:CLUSTER] for x in (before, after))
        if cluster == 0:  # the corrupt mark
            now = now[:79] + was[79:80] + now[80:]
        assert now == was, f"table in cluster {cluster} was overwritten"


@pytest.mark.parametrize("what", TABLES)
def test_check_calls_damaged_tables_corrupt(strict, make, what):
    path = make()
    at, entry = TABLES[what](path)
    patch(path, at, struct.pack(">Q", entry))
    digest = sha(path)
    assert strict("check", path, status=None).returncode == 2
    assert sha(path) == digest


@pytest.mark.parametrize("coding", ["zlib", "zstd"])
def test_compressed_data_that_does_not_decode_is_an_error(strict, run, make, coding):
    path = make("a.qcow2", "-o", f"compression_type={coding}", data=False)
    run("io", "-f", "qcow2", "-c", "write -c -P 5 64k 64k", path)
    host = be64_at(path, l2_entry_at(path)) & (1 << 54) - 1
    patch(path, host, b"\xff" * 64)
    p = strict("convert", "-O", "raw", path, path.parent / "out.raw", status=1)
    assert_one_line_error(p, "Input/output error")
    assert not (path.parent / "out.raw").exists()


# ---- features

def with_features(path, bits, names=b""):
    """Sets incompatible bits; `names` are 48-byte records that replace the feature name table."""
    patch(path, 72, struct.pack(">Q", bits))
    if names:
        length = struct.unpack(">I", path.read_bytes()[100:104])[0]
        patch(path, length, struct.pack(">II", 0x6803f857, len(names)) + names + bytes(16))


def feature(bit, name):
    return struct.pack(">BB46s", 0, bit, name)


@pytest.mark.parametrize("verb", USING)
def test_an_unknown_feature_is_refused_by_its_name(strict, make, verb):
    path = make()
    with_features(path, 1 << 40, feature(40, b"time travel"))
    refused(strict, path, verb, "bit 40", "time travel")


def test_an_unnamed_feature_is_refused_by_its_number(strict, make):
    path = make()
    with_features(path, 1 << 63)
    refused(strict, path, "io", "63")


@pytest.mark.parametrize("name", [b"\x1b]0;owned\x07", b"a\nstrata: info: all is well", b"\x9b31m",
                                  b"\xff" * 46, b"\r\x08\x7f"])
def test_a_feature_name_cannot_drive_the_terminal(strict, make, name):
    path = make()
    with_features(path, 1 << 41, feature(41, name))
    p = refused(strict, path, "io", "bit 41")
    assert all(c == "\n" or c.isprintable() for c in p.stderr), p.stderr
    told = strict("info", path).stdout
    assert "(bit 41)" in told and all(c == "\n" or c.isprintable() for c in told), told


@pytest.mark.parametrize("verb", USING)
@pytest.mark.parametrize("what, words", [
    ((32, struct.pack(">I", 1)), "AES"),
    ((32, struct.pack(">I", 2)), "LUKS"),
], ids=["aes", "luks"])
def test_what_is_not_supported_yet_is_said(strict, make, verb, what, words):
    path = make()
    patch(path, *what)
    refused(strict, path, verb, words)


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("info", "check")])
def test_a_data_file_that_is_not_named_is_asked_for(strict, make, verb):
    path = make()
    patch(path, 72, struct.pack(">Q", 1 << 2))
    refused(strict, path, verb, "'data-file' is required")


def test_an_external_data_file_is_not_opened(strict, peer, strata, tmp_path):
    """CVE-2024-4467: info on an image whose data file is a json: name."""
    path = tmp_path / "a.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", path, "1M")
    log = tmp_path / "log"
    subprocess.run(["strace", "-f", "-o", log, "-e", "trace=open,openat", strata, "info", path],
                   capture_output=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    assert "a.qcow2" in log.read_text() and "data.raw" not in log.read_text()


@pytest.mark.parametrize("verb", ["io", "serve"])
def test_a_corrupt_mark_refuses_writing(strict, make, verb):
    path = make()
    patch(path, 72, struct.pack(">Q", 2))
    refused(strict, path, verb, "corrupt")


# ---- backing names

def claiming(make, name, claim, fmt="raw"):
    """An image whose header names `claim`, which no tool would write down."""
    path = make(name, data=False)
    text = claim if isinstance(claim, bytes) else claim.encode()
    head = struct.unpack(">I", path.read_bytes()[100:104])[0]
    ext = b""
    if fmt:
        ext = struct.pack(">II", 0xe2792aca, len(fmt)) + fmt.encode() + bytes(-len(fmt) % 8)
    ext += struct.pack(">II", 0, 0)
    patch(path, head, ext + text)
    patch(path, 8, struct.pack(">QI", head + len(ext), len(text)))
    return path


OPENING = [v for v in VERBS if v != "info"]


@pytest.mark.parametrize("verb", OPENING)
@pytest.mark.parametrize("claim", ["/etc/shadow", "/etc/hostname", "../secret", "/proc/self/mem"])
def test_a_name_outside_the_folder_is_refused(strict, make, verb, claim, tmp_path):
    (tmp_path.parent / "secret").write_bytes(b"s" * 512)
    path = claiming(make, "a.qcow2", claim)
    p = refused(strict, path, verb, claim)
    assert "folder" in p.stderr or "No such file" in p.stderr or "regular" in p.stderr


@pytest.mark.parametrize("claim", ["json:{\"driver\":\"raw\",\"file\":\"/etc/shadow\"}",
                                   "nbd:127.0.0.1:1", "nbd+unix:///?socket=/x", "null-co:",
                                   "memory:1M", "fat:/etc", "http://127.0.0.1/x", "ssh://h/x"])
@pytest.mark.parametrize("before", [(), ("--trust=local",)], ids=["beside", "local"])
def test_a_protocol_name_is_refused(strict, make, claim, before):
    path = claiming(make, "a.qcow2", claim)
    refused(strict, path, "convert", before=before)


def test_a_link_beside_the_image_does_not_lead_out(strict, make, tmp_path):
    (tmp_path / "innocent").symlink_to("/etc/hostname")
    path = claiming(make, "a.qcow2", "innocent")
    refused(strict, path, "convert", "innocent", "folder")


@pytest.mark.parametrize("what", ["fifo", "directory", "socket"])
@pytest.mark.parametrize("before", [(), ("--trust=local",)], ids=["beside", "local"])
def test_a_backing_file_that_is_no_disk_is_refused_at_once(strict, make, tmp_path, what, before):
    NOT_DISKS[what][0](tmp_path / "odd")
    path = claiming(make, "a.qcow2", "odd")
    refused(strict, path, "convert", "odd", before=before)


def test_trust_none_follows_nothing(strict, make, tmp_path):
    make("base.qcow2")
    path = claiming(make, "a.qcow2", "base.qcow2", "qcow2")
    p = refused(strict, path, "convert", "base.qcow2", before=("--trust=none",))
    assert "none" in p.stderr
    strict("convert", "-O", "raw", path, tmp_path / "out.raw")


def test_trust_local_follows_a_path(strict, make, tmp_path):
    (tmp_path / "other").mkdir()
    make("other/base.qcow2")
    path = claiming(make, "a.qcow2", str(tmp_path / "other/base.qcow2"), "qcow2")
    strict("convert", "--trust=local", "-O", "raw", path, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes()[CLUSTER:2 * CLUSTER] == b"\x09" * CLUSTER


@pytest.mark.parametrize("claim", [b"a\nstrata: all is well", b"\x1b[2J\x1b]0;x\x07", b"\xff\xfe",
                                   b"x" * 1023, b"\x9b31m", b"%n%s%n"])
def test_an_odd_name_is_shown_safely_and_is_one_line(strict, make, claim):
    path = claiming(make, "a.qcow2", claim)
    p = refused(strict, path, "convert")
    assert all(c == "\n" or c.isprintable() for c in p.stderr), p.stderr
    p = strict("info", path)
    assert all(c == "\n" or c.isprintable() for c in p.stdout), p.stdout
    json.loads(strict("info", "--output=json", path).stdout)


def test_a_name_with_a_zero_byte_is_refused(strict, make):
    path = claiming(make, "a.qcow2", b"/etc/passwd\0.qcow2")
    refused(strict, path, "info", "zero byte")


@pytest.mark.parametrize("fmt, words", [("nope", "nope"), ("file", "file"), ("\x1b[31m", "\\x1b"),
                                        ("memory", "memory"), ("x" * 300, "300")])
def test_a_recorded_format_that_is_none_is_refused(strict, make, fmt, words):
    make("base.qcow2")
    path = claiming(make, "a.qcow2", "base.qcow2", fmt)
    p = refused(strict, path, "convert", words)
    assert all(c == "\n" or c.isprintable() for c in p.stderr), p.stderr


def test_a_raw_backing_file_recorded_as_qcow2_is_refused(strict, make, tmp_path):
    (tmp_path / "base.raw").write_bytes(b"z" * CLUSTER)
    path = claiming(make, "a.qcow2", "base.raw", "qcow2")
    refused(strict, path, "convert", "base.raw", "magic")


def test_a_qcow2_backing_file_recorded_as_raw_is_not_interpreted(strict, make, tmp_path):
    """A guest's raw disk that begins like a qcow2 header stays plain bytes."""
    base = claiming(make, "base", "/etc/shadow")
    path = claiming(make, "a.qcow2", "base", "raw")
    strict("convert", "-O", "raw", path, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes()[:CLUSTER] == base.read_bytes()[:CLUSTER]


def test_an_unrecorded_format_is_not_guessed_to_be_more_than_raw(strict, make):
    make("base.qcow2")
    path = claiming(make, "a.qcow2", "base.qcow2", None)
    refused(strict, path, "convert", "base.qcow2", "does not record the format")


@pytest.mark.parametrize("verb", OPENING)
def test_an_image_that_backs_itself_is_refused(strict, make, verb):
    path = claiming(make, "a.qcow2", "a.qcow2", "qcow2")
    refused(strict, path, verb, "comes back")


@pytest.mark.parametrize("verb", OPENING)
def test_a_loop_of_three_through_links_is_refused(strict, make, tmp_path, verb):
    claiming(make, "c.qcow2", "link", "qcow2")
    claiming(make, "b.qcow2", "c.qcow2", "qcow2")
    (tmp_path / "link").symlink_to("a.qcow2")
    path = claiming(make, "a.qcow2", "b.qcow2", "qcow2")
    refused(strict, path, verb, "comes back")


# ---- chains

@pytest.fixture(scope="module")
def deep(strata, tmp_path_factory):
    """100 images, each over the one before; image i holds byte i in the 64 KiB from i * 64 KiB on."""
    folder = tmp_path_factory.mktemp("deep")
    for i in range(100):
        below = ["-b", f"{i - 1}.qcow2", "-F", "qcow2"] if i else []
        subprocess.run([strata, "create", "-q", "-f", "qcow2", *below, f"{i}.qcow2", "8M"], check=True,
                       cwd=folder)
        subprocess.run([strata, "io", "-f", "qcow2", "-c", f"write -P {i + 1} {i * 64}k 64k",
                        f"{i}.qcow2"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return folder / "99.qcow2"


def test_info_of_a_chain_of_100(strict, deep):
    got = json.loads(strict("info", "--backing-chain", "--output=json", deep).stdout)
    assert len(got) == 100


def test_map_of_a_chain_of_100(strict, deep):
    got = json.loads(strict("map", "--output=json", deep).stdout)
    assert [x["depth"] for x in got if x["data"]] == list(range(99, -1, -1))


def test_convert_of_a_chain_of_100(strict, deep, tmp_path):
    strict("convert", "-O", "raw", deep, tmp_path / "out.raw")
    data = (tmp_path / "out.raw").read_bytes()
    assert data[:100 * CLUSTER] == b"".join(bytes([i + 1]) * CLUSTER for i in range(100))
    assert not any(data[100 * CLUSTER:])


def test_io_on_a_chain_of_100(strict, deep):
    strict("io", "-r", "-c", "read -P 1 0 64k", "-c", "read -P 51 3200k 64k",
           "-c", "read -P 100 6336k 64k", "-c", "read -P 0 7M 64k", deep)


# ---- size

def test_a_huge_claim_costs_nothing(strict, make, tmp_path):
    """The largest L1 table that is allowed, in a file that has none of it."""
    path = make(size="1T", data=False)
    patch(path, 36, struct.pack(">I", 4 << 20))
    strict("info", path, status=None)
    strict("map", path, status=None)
    strict("check", path, status=None)


@pytest.mark.plain_build
def test_convert_compresses_within_a_gibibyte_of_addresses(strict, run, tmp_path):
    """Threads of the pool must not each reserve 64 MiB of addresses for their own heap."""
    src = tmp_path / "src.raw"
    with open(src, "wb") as f:
        for i in range(256):
            f.write(hashlib.sha256(b"%d" % i).digest() * 4096)
    for coding in ("zlib", "zstd"):
        out = tmp_path / f"{coding}.qcow2"
        strict("convert", "-c", "-O", "qcow2", "-o", f"compression_type={coding}", src, out)
        run("compare", src, out)


@pytest.mark.parametrize("verb", ["map", *(v for v in VERBS if v != "info")])
def test_an_unreadable_image(strata, tmp_path, verb):
    path = tmp_path / "x"
    path.write_bytes(b"x" * 4096)
    path.chmod(0)
    args = [a.format(path, out=tmp_path / "out.raw", sock=tmp_path / "sock")
            for a in VERBS.get(verb, ["map", "{}"])]
    p = subprocess.run(without_root(strata, *args), capture_output=True, text=True, timeout=20)
    assert p.returncode == (2 if verb == "compare" else 1), p.stderr
    assert_one_line_error(p, "Permission denied")
    assert os.listdir(tmp_path) == ["x"]
