# SPDX-License-Identifier: MIT
"""Writes Apple disk images (UDIF) for tests: there is no other writer here.

    build(path, [Chunk("zlib", data), Chunk("zero", sectors=8) ...]) or several tables.
"""
import base64
import bz2
import lzma
import struct
import zlib
from dataclasses import dataclass

SECTOR = 512
TYPES = {"zero": 0, "raw": 1, "ignore": 2, "adc": 0x80000004, "zlib": 0x80000005,
         "bzip2": 0x80000006, "lzfse": 0x80000007, "xz": 0x80000008, "comment": 0x7ffffffe}


def adc(data):
    """Literals, and runs of one byte as matches of the three forms."""
    out, i = bytearray(), 0
    while i < len(data):
        run = 1
        while i + run < len(data) and data[i + run] == data[i] and run < 300:
            run += 1
        if run > 8:
            out += bytes([0x80, data[i]])
            left = run - 1
            while left >= 4:
                n = min(left, 67)
                if n <= 18 and left != run - 1:
                    out += bytes([(n - 3) << 2, 0])
                else:
                    out += bytes([0x40 | (n - 4), 0, 0])
                left -= n
            i += run - left
        else:
            n = min(len(data) - i, 128, max(run, 1))
            out += bytes([0x80 | (n - 1)]) + data[i:i + n]
            i += n
    return bytes(out)


def lzfse_raw(data):
    return b"bvx-" + struct.pack("<I", len(data)) + data + b"bvx$"


CODES = {"raw": bytes, "zlib": zlib.compress, "bzip2": bz2.compress, "adc": adc,
         "lzfse": lzfse_raw, "xz": lambda d: lzma.compress(d, lzma.FORMAT_XZ)}


@dataclass
class Chunk:
    kind: str
    data: bytes = b""    # decoded
    sectors: int = 0     # of zeros
    code: bytes = None   # instead of what CODES gives
    fields: dict = None  # instead of what belongs there: type, sector, count, offset, length


def table(chunks, out, first=0, count=None, data_at=0):
    """Appends codes to `out` and returns (mish, sectors)."""
    entries, sector = [], 0
    for c in chunks:
        sectors, code = c.sectors or len(c.data) // SECTOR, b""
        if c.kind in CODES:
            code = CODES[c.kind](c.data) if c.code is None else c.code
        f = {"type": TYPES[c.kind], "sector": sector, "count": sectors,
             "offset": len(out) - data_at, "length": len(code), **(c.fields or {})}
        entries.append(struct.pack(">IIQQQQ", f["type"], 0, f["sector"], f["count"], f["offset"],
                                   f["length"]))
        out += code
        sector += sectors
    entries.append(struct.pack(">IIQQQQ", 0xffffffff, 0, sector, 0, len(out), 0))
    head = struct.pack(">4sIQQQII", b"mish", 1, first, sector, data_at, 2056, 0) + bytes(24)
    head += struct.pack(">II128s", 0, 0, b"")  # no checksum
    return head + struct.pack(">I", len(entries) if count is None else count) + \
        b"".join(entries), sector


def plist(tables):
    items = ""
    for i, t in enumerate(tables):
        text = base64.b64encode(t).decode()
        lines = "\n\t\t\t\t".join(text[k:k + 52] for k in range(0, len(text), 52))
        items += (f"<dict><key>Attributes</key><string>0x0050</string><key>Data</key><data>\n"
                  f"\t\t\t\t{lines}\n\t\t\t\t</data><key>ID</key><string>{i}</string>"
                  f"<key>Name</key><string>part &lt;{i}&gt; (Apple_HFS : {i})</string></dict>\n")
    return ('<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0'
            '//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n<plist version="1.0"><dict>'
            f'<key>resource-fork</key><dict><key>blkx</key><array>{items}</array>'
            '<key>plst</key><array><dict><key>Data</key><data>\nAAAAAQAB\n</data></dict></array>'
            '</dict></dict></plist>\n').encode()


def resource_fork(tables):
    data = b"".join(struct.pack(">I", len(t)) + t for t in tables + [b"other bytes"])
    return struct.pack(">4I", 256, 256 + len(data), len(data), 30) + bytes(240) + data + bytes(30)


def trailer(fork_length, total, xml=(0, 0), rsrc=(0, 0), **fields):
    t = bytearray(SECTOR)
    f = {"version": 4, "header": 512, "flags": 1, "fork": 0, "segments": 1, **fields}
    struct.pack_into(">4sIII", t, 0, b"koly", f["version"], f["header"], f["flags"])
    struct.pack_into(">QQQQQII", t, 16, 0, f["fork"], fork_length, *rsrc, 1, f["segments"])
    struct.pack_into(">QQ", t, 216, *xml)
    struct.pack_into(">IQ", t, 488, f.get("variant", 1), f.get("sectors", total))
    return bytes(t)


def build(path, *parts, old=False, order=None, pad=b"", mangle=None, data_at=0, **fields):
    """parts: lists of chunks, one table each, one behind the other on the disk."""
    out, tables, first = bytearray(data_at), [], 0
    for chunks in parts:
        t, sectors = table(chunks, out, first, data_at=data_at)
        tables.append(t)
        first += sectors
    if order:
        tables = [tables[i] for i in order]
    if mangle:
        tables = mangle(tables)
    meta = resource_fork(tables) if old else plist(tables)
    where = {"rsrc" if old else "xml": (len(out), len(meta))}
    where.update({k: fields.pop(k) for k in ("xml", "rsrc") if k in fields})
    path.write_bytes(bytes(out) + meta + trailer(len(out), first, **where, **fields) + pad)
    return path
