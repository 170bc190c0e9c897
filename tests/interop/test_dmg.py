# SPDX-License-Identifier: MIT
"""Apple disk images, read; dmg2img, 7-Zip and qemu-img judge what the tests write."""
import base64
import json
import pathlib
import random
import resource
import struct
import subprocess
import zlib

import pytest

from dmg_image import SECTOR, Chunk, build, table, trailer

KIB, MIB = 1 << 10, 1 << 20
LZFSE = pathlib.Path(__file__).parent / "lzfse"


def words(n, seed):
    """Text that compresses: the content of the files in lzfse/."""
    rng = random.Random(seed)
    known = ["".join(rng.choice("etaoinshrdlu") for _ in range(rng.randrange(2, 9)))
             for _ in range(60)]
    out = ""
    while len(out) < n:
        out += rng.choice(known) + " "
    return out[:n].encode()


def content(chunks):
    return b"".join(c.data or bytes(c.sectors * SECTOR) for c in chunks)


def some_chunks(kind, seed=1):
    rng = random.Random(seed)
    return [Chunk(kind, words(64 * KIB, seed)), Chunk("zero", sectors=200),
            Chunk(kind, rng.randbytes(8 * KIB)), Chunk("comment"), Chunk("ignore", sectors=3),
            Chunk("raw", rng.randbytes(5 * SECTOR)),
            Chunk(kind, bytes(20 * KIB) + b"x" * 300 + bytes(212))]


def read(run, path, tmp_path):
    run("convert", "-q", "-f", "dmg", "-O", "raw", path, tmp_path / "out.raw")
    return (tmp_path / "out.raw").read_bytes()


@pytest.mark.parametrize("kind,judges", [("zlib", ["7zz", "dmg2img", "qemu-img"]),
                                         ("raw", ["7zz", "dmg2img", "qemu-img"]),
                                         ("bzip2", ["7zz", "dmg2img"]), ("adc", ["7zz", "dmg2img"]),
                                         ("lzfse", []), ("xz", ["7zz"])])
def test_chunks_of_every_coding_are_read_as_others_read_them(run, peer, tmp_path, kind, judges):
    chunks = some_chunks(kind)
    path, want = build(tmp_path / "a.dmg", chunks), content(chunks)
    assert read(run, path, tmp_path) == want
    if "7zz" in judges:
        peer("7zz", "x", "-tDmg", "-y", f"-o{tmp_path}/7z", path)
        assert [p.read_bytes() for p in (tmp_path / "7z").iterdir()] == [want]
    if "dmg2img" in judges:
        peer("dmg2img", "-s", path, tmp_path / "d.img")
        assert (tmp_path / "d.img").read_bytes() == want
    if "qemu-img" in judges:
        peer("qemu-img", "compare", "-f", "raw", "-F", "dmg", tmp_path / "out.raw", path)


@pytest.mark.parametrize("name,size,seed", [("fse", 32 * KIB, 1), ("lzvn", 2 * KIB, 2)])
def test_lzfse_of_its_own_encoder_is_read(run, peer, tmp_path, name, size, seed):
    want = words(size, seed)
    code = (LZFSE / name).read_bytes()
    path = build(tmp_path / "a.dmg", [Chunk("lzfse", want, code=code)])
    assert read(run, path, tmp_path) == want
    peer("7zz", "x", "-tDmg", "-y", f"-o{tmp_path}/7z", path)
    assert [p.read_bytes() for p in (tmp_path / "7z").iterdir()] == [want]


def test_several_partitions_in_any_order_make_one_disk(run, peer, tmp_path):
    parts = [some_chunks("zlib", i) for i in range(3)]
    path = build(tmp_path / "a.dmg", *parts, order=[2, 0, 1])
    assert read(run, path, tmp_path) == b"".join(map(content, parts))
    peer("dmg2img", "-s", path, tmp_path / "d.img")


def test_a_data_offset_in_the_table_counts(run, tmp_path):
    chunks = some_chunks("zlib")
    path = build(tmp_path / "a.dmg", chunks, data_at=1000)
    assert read(run, path, tmp_path) == content(chunks)


@pytest.mark.parametrize("old", [False, True], ids=["plist", "fork"])
@pytest.mark.parametrize("pad", [b"", b"\0" * 511], ids=["exact", "padded"])
def test_tables_are_found_in_plist_and_resource_fork(run, peer, tmp_path, old, pad):
    chunks = some_chunks("zlib")
    path = build(tmp_path / "a.dmg", chunks, old=old, pad=pad)
    assert "file format: dmg" in run("info", path).stdout
    assert read(run, path, tmp_path) == content(chunks)
    if not pad:  # qemu-img rounds odd lengths up and looks in the wrong place
        peer("qemu-img", "compare", "-f", "raw", "-F", "dmg", tmp_path / "out.raw", path)


def test_info_tells_the_codings(run, tmp_path):
    path = build(tmp_path / "a.dmg", some_chunks("zlib"), some_chunks("xz"))
    data = json.loads(run("info", "--output=json", path).stdout)["format-specific"]["data"]
    assert data == {"variant": "device", "tables": 2,
                    "chunks": {"zlib": 3, "xz": 3, "raw": 2, "zero": 4}}


def test_zeros_and_gaps_are_holes_for_map(run, tmp_path):
    path = build(tmp_path / "a.dmg", [Chunk("raw", b"a" * SECTOR), Chunk("zero", sectors=7),
                                      Chunk("raw", b"b" * SECTOR,
                                            fields={"sector": 100})], sectors=200)
    runs = json.loads(run("map", "--output=json", path).stdout)
    assert [(r["start"], r["length"], r["zero"]) for r in runs] == [
        (0, 512, False), (512, 99 * 512, True), (100 * 512, 512, False), (101 * 512, 99 * 512, True)]


def test_writing_is_refused(run, tmp_path):
    path = build(tmp_path / "a.dmg", some_chunks("zlib"))
    assert "only be read" in run("io", "-c", "write 0 512", path, status=1).stderr


@pytest.mark.parametrize("head,tail,word", [(b"encrcdsa", b"", "encrypted"),
                                            (b"", b"cdsaencr", "encrypted")])
def test_encrypted_images_are_refused_by_name(run, tmp_path, head, tail, word):
    path = tmp_path / "a.dmg"
    path.write_bytes(head + bytes(4096) + tail)
    assert word in run("info", path, status=1).stderr


def test_a_part_of_a_set_is_refused_by_name(run, tmp_path):
    path = build(tmp_path / "a.dmg", some_chunks("zlib"), segments=3)
    assert "image in 3 files" in run("info", path, status=1).stderr


def hostile(tmp_path):
    """Name, image, and a word of the refusal (None: it opens, and reading gives an error)."""
    def one(name, word, *chunks, **kw):
        return name, build(tmp_path / name, list(chunks), **kw), word
    data = words(4 * KIB, 3)
    top = (1 << 64) - 1
    yield from (one(f"count-{i}", "behind any disk", Chunk("zlib", data, fields={"count": n}))
                for i, n in enumerate([1 << 62, top]))
    # CVE-2014-0144, CVE-2014-0145: sizes of chunks that were believed
    yield one("chunk-of-many-sectors", "beyond the limit",
              Chunk("zlib", data, fields={"count": (64 * MIB >> 9) + 1}))
    yield one("chunk-of-long-code", "reach behind the end",
              Chunk("zlib", data, fields={"length": 1 << 31}))
    yield one("chunk-of-no-code", "beyond the limit", Chunk("zlib", data, fields={"length": 0}))
    yield one("length-wraps", "reach behind the end", Chunk("zlib", data, fields={"length": top}))
    yield one("offset-wraps", "reach behind the end", Chunk("zlib", data, fields={"offset": top}))
    yield one("offset-behind", "reach behind the end",
              Chunk("raw", data, fields={"offset": 1 << 40}))
    yield one("raw-too-short", "plain bytes", Chunk("raw", data, fields={"length": 512}))
    yield one("sector-wraps", "behind any disk", Chunk("zlib", data, fields={"sector": top}))
    yield one("sector-beyond", "behind any disk",
              Chunk("zero", sectors=8, fields={"sector": 1 << 54}))
    yield one("overlap", "two chunks hold", Chunk("zlib", data),
              Chunk("zlib", data, fields={"sector": 7}))
    yield one("type", "0x80000001 are unknown", Chunk("zlib", data, fields={"type": 0x80000001}))
    yield one("not-zlib", None, Chunk("zlib", data, code=b"no zlib at all"))
    yield one("zlib-too-short", None, Chunk("zlib", data, code=zlib.compress(data[:-1])))
    yield one("zlib-too-long", None, Chunk("zlib", data, code=zlib.compress(data + b"x")))
    for kind, code in [("adc", b"\x00\x10"), ("adc", b"\x40\x00"), ("adc", b"\xff\x00"),
                       ("bzip2", b"BZh9"), ("xz", b"\xfd7zXZ\0" + bytes(40)),
                       ("lzfse", b"bvx-\xff\xff\xff\xff"), ("lzfse", b"bvx$"),
                       ("lzfse", b"bvx2" + b"\xff" * 60), ("lzfse", b"bvxn" + b"\xff" * 60)]:
        yield one(f"{kind}-{code.hex()[:12]}", None, Chunk(kind, data, code=code))
    yield one("version", "version 2", Chunk("zlib", data),
              mangle=lambda t: [t[0][:4] + struct.pack(">I", 2) + t[0][8:]])
    yield one("more-entries-than-there", "ends before its last", Chunk("zlib", data),
              mangle=lambda t: [t[0][:200] + b"\xff\xff\xff\xff" + t[0][204:]])
    yield one("cut-entry", "ends before its last", Chunk("zlib", data),
              mangle=lambda t: [t[0][:-13]])
    yield one("no-table", "no table", Chunk("zlib", data), mangle=lambda t: [b"nish" + t[0][4:]])
    yield one("plist-nowhere", "neither", Chunk("zlib", data), xml=(0, 0))
    for i, where in enumerate([(top, 10), (1 << 40, 10), (0, 1 << 40), (10, top)]):
        yield one(f"plist-{i}", "reaches behind", Chunk("zlib", data), xml=where)
        yield one(f"fork-{i}", "reaches behind", Chunk("zlib", data), rsrc=where)
    yield one("fork-short", "too short", Chunk("zlib", data), rsrc=(0, 15))
    yield one("size", "beyond the largest", Chunk("zlib", data), sectors=1 << 60)
    yield one("data-fork", "reach behind the end", Chunk("zlib", data), fork=top)


def test_hostile_images_get_an_answer(run, tmp_path):
    for name, path, word in hostile(tmp_path):
        p = run("convert", "-f", "dmg", "-O", "raw", path, tmp_path / "out", status=1, timeout=20)
        assert (word or "Input/output error") in p.stderr, (name, p.stderr)


def test_an_image_cut_anywhere_is_raw_or_an_error(run, tmp_path, seed):
    whole = build(tmp_path / "a.dmg", some_chunks("zlib")).read_bytes()
    rng, path = random.Random(seed), tmp_path / "cut"
    for n in [0, 1, 511, 512, 1023, len(whole) - 1] + [rng.randrange(len(whole)) for _ in range(4)]:
        path.write_bytes(whole[:n])
        assert run("info", "-f", "dmg", path, status=1).stderr
        assert "file format: raw" in run("info", path).stdout


@pytest.mark.plain_build
def test_a_million_chunks_take_little_memory(strata, tmp_path):
    count, block = 1 << 20, zlib.compress(b"x" * SECTOR)
    entries = b"".join(struct.pack(">IIQQQQ", 0x80000005, 0, i, 1, 0, len(block))
                       for i in range(count))
    head = table([], bytearray(), count=count)[0][:204]
    xml = b"<plist><data>" + base64.b64encode(head + entries) + b"</data></plist>"
    path = tmp_path / "a.dmg"
    path.write_bytes(block + xml + trailer(len(block), count, xml=(len(block), len(xml))))
    p = subprocess.run([strata, "io", "-r", "-f", "dmg", "-c", f"read -P 0x78 {count // 2 * 512} 8k",
                        path], capture_output=True, text=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (80 * MIB,) * 2))
    assert "read 8192/8192" in p.stdout, p.stdout + p.stderr
