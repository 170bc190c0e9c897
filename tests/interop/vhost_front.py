# SPDX-License-Identifier: MIT
"""A vhost-user-blk front end for tests: the messages, and split and packed rings in a memfd.

Facts: vhost-user.rst of QEMU's documentation, virtio 1.2 (2.7, 2.8, 5.2).
"""
import array
import fcntl
import mmap
import os
import select
import socket
import struct

MIB = 1 << 20
GUEST = 0x100000          # guest address of the memory's first byte
USER = 0x7f0000000000     # and the front end's own address of it
F_EVENT_IDX, F_INDIRECT, F_VERSION_1, F_PACKED, F_PROTOCOL = 29, 28, 32, 34, 30
F_FLUSH, F_WCE, F_MQ, F_DISCARD, F_ZEROES, F_RO = 9, 11, 12, 13, 14, 5
P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT, P_SLOTS = 0, 3, 9, 12, 15
IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13


def bits(*n):
    return sum(1 << i for i in n)


class Front:
    """One connection with `queues` queues; memory is `size` bytes at guest address GUEST."""

    def __init__(self, path, features=(F_VERSION_1, F_INDIRECT, F_EVENT_IDX, F_FLUSH, F_WCE, F_MQ, F_DISCARD, F_ZEROES),
                 queues=1, num=64, size=16 * MIB, inflight=None, memory=None, start=True, bases=None):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.num, self.packed = num, F_PACKED in features
        self.memfd = memory.memfd if memory else os.memfd_create("guest", os.MFD_ALLOW_SEALING)
        if not memory:
            os.ftruncate(self.memfd, size)
        self.size = size
        self.mem = memory.mem if memory else mmap.mmap(self.memfd, size)
        self.features = bits(*features, F_PROTOCOL)
        self.inflight = inflight
        self.rings = []
        if start:
            self.negotiate(queues)
            self.table()
            for i in range(queues):
                self.ring(i, bases[i] if bases else 0)

    # ---- messages

    def send(self, request, payload=b"", fds=(), flags=1):
        head = struct.pack("<III", request, flags, len(payload))
        extra = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([head + payload], extra)

    def receive(self, fds=False):
        data, extra, _, _ = self.sock.recvmsg(12, 64)
        if len(data) < 12:
            raise ConnectionError("the server has gone")
        request, flags, size = struct.unpack("<III", data)
        body = b""
        while len(body) < size:
            more = self.sock.recv(size - len(body))
            if not more:
                raise ConnectionError("the server has gone")
            body += more
        assert flags & 7 == 5
        if fds:
            got = array.array("i")
            for _, _, raw in extra:
                got.frombytes(raw)
            return body, list(got)
        return body

    def ask(self, request, payload=b"", **kw):
        self.send(request, payload, **kw)
        return self.receive()

    def tell(self, request, payload=b"", fds=()):
        """Sends with NEED_REPLY; the server's verdict: 0 is well."""
        return struct.unpack("<Q", self.ask(request, payload, fds=fds, flags=9))[0]

    def negotiate(self, queues):
        self.offered = struct.unpack("<Q", self.ask(1))[0]
        self.send(3)
        protocol = struct.unpack("<Q", self.ask(15))[0]
        self.send(16, struct.pack("<Q", protocol))
        assert struct.unpack("<Q", self.ask(17))[0] >= queues
        self.features &= self.offered
        self.send(2, struct.pack("<Q", self.features))

    def table(self):
        region = struct.pack("<QQQQ", GUEST, self.size, USER, 0)
        assert self.tell(5, struct.pack("<II", 1, 0) + region, [self.memfd]) == 0

    def config(self):
        body = self.ask(24, struct.pack("<III", 0, 60, 0) + bytes(60))
        return body[12:]

    # ---- rings: each has 64 KiB at the beginning of memory, then buffers

    def ring(self, index, base=0, enable=True):
        at = index * 65536
        r = Ring(self, index, at, base)
        self.rings.append(r)
        self.send(8, struct.pack("<II", index, self.num))
        self.send(10, struct.pack("<II", index, r.wire_base(base)))
        self.send(9, struct.pack("<IIQQQQ", index, 0, USER + at, USER + at + 32768, USER + at + 16384, 0))
        self.send(13, struct.pack("<Q", index), [r.call])
        self.send(12, struct.pack("<Q", index), [r.kick])
        if enable:
            assert self.tell(18, struct.pack("<II", index, 1)) == 0
        return r

    def close(self):
        self.sock.close()


class Ring:
    def __init__(self, front, index, at, base):
        self.f, self.index, self.at, self.num = front, index, at, front.num
        self.kick, self.call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        self.room = front.size // 8
        self.base = front.size // 2 + index * self.room  # of buffers
        self.next_buf = self.base
        self.avail = base & 0x7fff if front.packed else base
        self.used = self.avail
        self.wrap = self.used_wrap = 1
        self.free = list(range(self.num))
        self.waiting = {}

    def wire_base(self, base):
        return base | 0x8000 if self.f.packed else base

    def put(self, at, data):
        self.f.mem[at:at + len(data)] = data

    def get(self, at, n):
        return self.f.mem[at:at + n]

    def alloc(self, n):
        n = (n + 63) & ~63
        if self.next_buf + n > self.base + self.room:
            self.next_buf = self.base
        at = self.next_buf
        self.next_buf += n
        return at

    def submit(self, pieces, indirect=False, kick=True):
        """pieces: (guest address, length, device writes).  Returns the request's token."""
        descs = [(a, n, 2 if w else 0) for a, n, w in pieces]
        if indirect:
            table = self.alloc(16 * len(descs))
            for i, (a, n, fl) in enumerate(descs):
                more = i + 1 < len(descs)
                entry = (struct.pack("<QIHH", a, n, 0, fl) if self.f.packed
                         else struct.pack("<QIHH", a, n, fl | more, i + 1 if more else 0))
                self.put(table + 16 * i, entry)
            descs = [(GUEST + table, 16 * len(descs), 4)]
        token = (self.packed_put if self.f.packed else self.split_put)(descs)
        if kick:
            self.ring_bell()
        return token

    def split_put(self, descs):
        ids = [self.free.pop() for _ in descs]
        for i, (a, n, fl) in enumerate(descs):
            more = i + 1 < len(descs)
            self.put(self.at + 16 * ids[i], struct.pack("<QIHH", a, n, fl | more, ids[i + 1] if more else 0))
        self.waiting[ids[0]] = ids
        self.put(self.at + 16384 + 4 + 2 * (self.avail % self.num), struct.pack("<H", ids[0]))
        self.avail = (self.avail + 1) & 0xffff
        self.put(self.at + 16384 + 2, struct.pack("<H", self.avail))
        self.put(self.at + 16384 + 4 + 2 * self.num, struct.pack("<H", self.used))  # used_event
        return ids[0]

    def packed_put(self, descs):
        ident, first, heads = self.free.pop(), self.avail, []
        for i, (a, n, fl) in enumerate(descs):
            flags = fl | (i + 1 < len(descs)) | (0x80 if self.wrap else 0x8000)
            heads.append((self.avail, a, n, ident, flags))
            self.avail += 1
            if self.avail == self.num:
                self.avail, self.wrap = 0, self.wrap ^ 1
        for place, a, n, i, flags in reversed(heads):  # the first one last: it is what makes them there
            self.put(self.at + 16 * place, struct.pack("<QIH", a, n, i))
            self.put(self.at + 16 * place + 14, struct.pack("<H", flags))
        self.put(self.at + 16384, struct.pack("<HH", 0, 0))  # interrupts: always
        self.waiting[ident] = len(descs)
        return ident

    def ring_bell(self):
        os.eventfd_write(self.kick, 1)

    def finished(self):
        """(token, bytes written) of what the device gave back since the last call."""
        out = []
        while True:
            if self.f.packed:
                i, n, ident, flags = struct.unpack("<QIHH", self.get(self.at + 16 * self.used, 16))
                if bool(flags & 0x80) != bool(flags & 0x8000) or bool(flags & 0x80) != bool(self.used_wrap):
                    return out
                if ident not in self.waiting:
                    return out
                self.used += self.waiting.pop(ident)
                if self.used >= self.num:
                    self.used, self.used_wrap = self.used - self.num, self.used_wrap ^ 1
                self.free.insert(0, ident)
                out.append((ident, n))
                continue
            idx = struct.unpack("<H", self.get(self.at + 32768 + 2, 2))[0]
            if idx == self.used:
                return out
            ident, n = struct.unpack("<II", self.get(self.at + 32768 + 4 + 8 * (self.used % self.num), 8))
            self.used = (self.used + 1) & 0xffff
            self.put(self.at + 16384 + 4 + 2 * self.num, struct.pack("<H", self.used))
            for i in self.waiting.pop(ident):
                self.free.insert(0, i)
            out.append((ident, n))

    def wait(self, count=1, seconds=20):
        out = []
        while len(out) < count:
            out += self.finished()
            if len(out) < count:
                ready, _, _ = select.select([self.call], [], [], seconds)
                assert ready, f"{len(out)} of {count} requests came back"
                os.eventfd_read(self.call)
        return out

    # ---- block requests

    def start(self, kind, sector=0, data=b"", length=0, indirect=False, split=None, kick=True):
        """Returns (token, where data comes, where the status comes)."""
        head, status = self.alloc(16), self.alloc(1)
        self.put(head, struct.pack("<IIQ", kind, 0, sector))
        self.put(status, b"\xff")
        n = len(data) or length
        buf = self.alloc(n) if n else 0
        if data:
            self.put(buf, data)
        pieces = [(GUEST + head, 16, False)]
        step = split or n
        pieces += [(GUEST + buf + i, min(step, n - i), not data) for i in range(0, n, step or 1)]
        pieces.append((GUEST + status, 1, True))
        return self.submit(pieces, indirect or len(pieces) > self.num // 2, kick), buf, status

    def do(self, kind, sector=0, data=b"", length=0, **kw):
        """One request from beginning to end: (status, what was read)."""
        token, buf, status = self.start(kind, sector, data, length, **kw)
        done = self.wait()
        assert [t for t, _ in done] == [token]
        return self.get(status, 1)[0], self.get(buf, length) if length else b""

    def read(self, sector, n, **kw):
        status, data = self.do(IN, sector, length=n, **kw)
        assert status == 0
        return data

    def write(self, sector, data, **kw):
        assert self.do(OUT, sector, data, **kw)[0] == 0


def seal(fd):
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
