# SPDX-License-Identifier: MIT
"""VHDX by hand: reads and patches images, and makes logs and differencing images that no peer here can make."""
import struct
import uuid

KIB, MIB = 1 << 10, 1 << 20
HEADERS, REGIONS = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
BAT, METADATA = (uuid.UUID(t).bytes_le for t in
                 ("2DC27766-F623-4200-9D64-115E9BFD4A08", "8B7CA206-4790-4B9A-B8FE-575F050F886E"))
SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le

_TABLE = []
for _i in range(256):
    _c = _i
    for _ in range(8):
        _c = _c >> 1 ^ 0x82f63b78 if _c & 1 else _c >> 1
    _TABLE.append(_c)


def crc32c(data):
    c = 0xffffffff
    for byte in data:
        c = c >> 8 ^ _TABLE[(c ^ byte) & 0xff]
    return c ^ 0xffffffff


def summed(data, at=4):
    data = bytearray(data)
    data[at:at + 4] = bytes(4)
    struct.pack_into("<I", data, at, crc32c(data))
    return bytes(data)


class Image:
    """The bytes of one image, to be changed and written back."""

    def __init__(self, path):
        self.path, self.data = path, bytearray(path.read_bytes())

    def save(self):
        self.path.write_bytes(self.data)

    def get(self, at, fmt):
        return struct.unpack_from("<" + fmt, self.data, at)[0]

    def put(self, at, fmt, value):
        struct.pack_into("<" + fmt, self.data, at, value)

    def sum(self, at, length):
        self.data[at:at + length] = summed(self.data[at:at + length])

    def header(self):
        return max(HEADERS, key=lambda at: self.get(at + 8, "Q"))

    def both_headers(self, change):
        for at in HEADERS:
            change(at)
            self.sum(at, 4096)

    def region(self, guid):
        at = REGIONS[0] + 16
        while self.data[at:at + 16] != guid:
            at += 32
        return self.get(at + 16, "Q")

    def both_regions(self, change):
        for at in REGIONS:
            change(at)
            self.sum(at, 64 * KIB)

    def bat(self, index):
        return self.region(BAT) + index * 8

    def item(self, guid):
        table = self.region(METADATA)
        at = table + 32
        while self.data[at:at + 16] != guid:
            at += 32
        return table + self.get(at + 16, "I")

    # ---- logs

    def log_place(self):
        at = self.header()
        return self.get(at + 72, "Q"), self.get(at + 68, "I")

    def log_on(self, guid):
        def change(at):
            self.data[at + 48:at + 64] = guid
        self.both_headers(change)

    def write_log(self, at, entry):
        """Into the ring, around its end."""
        start, length = self.log_place()
        for i in range(0, len(entry), 4096):
            to = start + (at + i) % length
            self.data[to:to + 4096] = entry[i:i + 4096]


def entry(guid, sequence, changes, tail, flushed, last):
    """One log entry: changes are (offset, 4096 bytes) or (offset, length) of zeros."""
    descriptors, data = b"", b""
    for offset, what in changes:
        if isinstance(what, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, what, offset, sequence)
        else:
            descriptors += b"desc" + what[4092:] + what[:8] + struct.pack("<QQ", offset, sequence)
            data += (b"data" + struct.pack("<I", sequence >> 32) + what[8:4092] +
                     struct.pack("<I", sequence & 0xffffffff))
    sectors = -(-(64 + len(descriptors)) // 4096)
    head = struct.pack("<4sIIIQII", b"loge", 0, sectors * 4096 + len(data), tail, sequence, len(changes), 0)
    head += guid + struct.pack("<QQ", flushed, last)
    return summed((head + descriptors).ljust(sectors * 4096, b"\0") + data)
