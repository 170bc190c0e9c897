# SPDX-License-Identifier: MIT
"""`strata serve` as a context manager, and a small NBD client of our own that can misbehave."""
import json
import os
import signal
import socket
import struct
import subprocess

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META, OPT_EXTENDED = 8, 9, 10, 11
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD, ERR_UNKNOWN, ERR_TOO_BIG, ERR_EXT_HEADER_REQD = (
    0x80000000 + n for n in (1, 2, 3, 5, 6, 9, 10))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95
MAX = 32 << 20


class Server:
    """with Server(strata, "disk.raw", "-f", "raw") as s: ... s.uri, s.path

    `image` may be a list, of NAME=FILE; then s.uris has a line for each.
    """

    def __init__(self, strata, image, *args, socket_path=None, env=None, **kw):
        images = [str(i) for i in image] if isinstance(image, list) else [str(image)]
        self.path = str(socket_path) if socket_path else None
        where = ["-k", self.path] if self.path else []
        self.proc = subprocess.Popen([strata, "serve", *where, *map(str, args), *images],
                                     stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True,
                                     env={**os.environ, **(env or {})}, **kw)
        self.uri = self.proc.stdout.readline().strip()
        if not self.uri:
            raise AssertionError("no ready line: " + self.proc.stderr.read())
        self.uris = [self.uri] + [self.proc.stdout.readline().strip() for _ in images[1:]]

    def stop(self, signo=signal.SIGTERM, timeout=30):
        """Exit status after a signal."""
        if self.proc.poll() is None:
            self.proc.send_signal(signo)
        return self.wait(timeout)

    def wait(self, timeout=30):
        self.err = self.proc.communicate(timeout=timeout)[1]
        return self.proc.returncode

    def __enter__(self):
        return self

    def __exit__(self, kind, value, tb):
        try:
            status = self.stop()
        except subprocess.TimeoutExpired:
            self.proc.kill()
            self.proc.communicate()
            raise
        if kind is None:
            assert status == 0, f"serve ended with {status}: {self.err}"


class Control:
    """The control socket: c.call("commit", disk="root") -> what it returned."""

    def __init__(self, path):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.connect(str(path))  # with a timeout a full queue of others would be an error at once
        self.s.settimeout(60)
        self.f = self.s.makefile("rwb")
        assert "QMP" in json.loads(self.f.readline())

    def line(self, data):
        """The answer to one line of any bytes."""
        self.f.write(data + b"\n")
        self.f.flush()
        return json.loads(self.f.readline())

    def call(self, command, **arguments):
        r = self.line(json.dumps({"execute": command, "arguments": arguments}).encode())
        assert "return" in r, r
        return r["return"]

    def error(self, command, **arguments):
        r = self.line(json.dumps({"execute": command, "arguments": arguments}).encode())
        return r["error"]["desc"]

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.f.close()
        self.s.close()


class Client:
    """One raw connection to a unix socket."""

    def __init__(self, path, greet=True, flags=3):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(30)
        self.s.connect("\0" + path[1:] if path.startswith("@") else path)
        self.structured = self.extended = False
        self.cookie = 0
        if greet:
            assert self.read(16) == b"NBDMAGICIHAVEOPT"
            self.server_flags, = struct.unpack(">H", self.read(2))
            self.s.sendall(struct.pack(">I", flags))

    def read(self, n):
        out = b""
        while len(out) < n:
            part = self.s.recv(n - len(out))
            if not part:
                raise EOFError(f"{len(out)} of {n} bytes")
            out += part
        return out

    def closed(self):
        """True once the server has closed the connection; replies before that are thrown away."""
        try:
            while self.s.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self):
        self.s.close()

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.close()

    # ---- options
    def send_option(self, opt, data=b"", length=None):
        self.s.sendall(b"IHAVEOPT" + struct.pack(">II", opt, len(data) if length is None else length) + data)

    def option_reply(self):
        magic, opt, kind, n = struct.unpack(">QIII", self.read(20))
        assert magic == 0x3E889045565A9
        return opt, kind, self.read(n)

    def option(self, opt, data=b"", **kw):
        """All replies as [(type, data)], the last one being ACK or an error."""
        self.send_option(opt, data, **kw)
        out = []
        while True:
            got, kind, body = self.option_reply()
            assert got == opt
            out.append((kind, body))
            if kind == REP_ACK or kind & 0x80000000:
                return out

    @staticmethod
    def info_data(name=b"", infos=()):
        return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos)

    @staticmethod
    def meta_data(name=b"", queries=()):
        return (struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries)) +
                b"".join(struct.pack(">I", len(q)) + q for q in queries))

    def go(self, structured=True, meta=False, name=b"", extended=False):
        """`meta`: True for base:allocation, or a list of contexts."""
        if extended:
            assert self.option(OPT_EXTENDED)[-1][0] == REP_ACK
            self.structured = self.extended = True
        elif structured:
            assert self.option(OPT_STRUCTURED)[-1][0] == REP_ACK
            self.structured = True
        if meta:
            wanted = [b"base:allocation"] if meta is True else meta
            replies = self.option(OPT_SET_META, self.meta_data(name, wanted))
            assert replies[0][0] == REP_META
            self.contexts = {body[4:]: struct.unpack(">I", body[:4])[0] for kind, body in replies if body}
        replies = self.option(OPT_GO, self.info_data(name))
        assert replies[-1][0] == REP_ACK, replies
        for kind, body in replies:
            if kind == REP_INFO and body[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", body[2:])
        return self

    # ---- transmission
    def send(self, cmd, offset=0, length=0, flags=0, payload=b"", magic=None, cookie=None):
        if cookie is None:
            self.cookie += 1
            cookie = self.cookie
        if magic is None:
            magic = 0x21E41C71 if self.extended else 0x25609513
        if self.extended and cmd == WRITE:
            flags |= PAYLOAD_LEN
        form = ">IHHQQQ" if self.extended else ">IHHQQI"
        self.s.sendall(struct.pack(form, magic, flags, cmd, cookie, offset, length) + payload)
        return cookie

    def reply(self, read_length=0):
        """(cookie, error, [(chunk type, payload)]) of the next complete reply."""
        chunks = []
        while True:
            magic, = struct.unpack(">I", self.read(4))
            if magic == 0x67446698:
                assert not self.extended
                error, cookie = struct.unpack(">IQ", self.read(12))
                return cookie, error, [(1, self.read(read_length))] if read_length and not error else []
            assert magic == (0x6E8A278C if self.extended else 0x668E33EF), hex(magic)
            if self.extended:
                flags, kind, cookie, self.reply_offset, n = struct.unpack(">HHQQQ", self.read(28))
            else:
                flags, kind, cookie, n = struct.unpack(">HHQI", self.read(16))
            body = self.read(n)
            chunks.append((kind, body))
            if flags & 1:
                error = struct.unpack(">I", body[:4])[0] if kind & 0x8000 else 0
                return cookie, error, chunks

    def call(self, cmd, offset=0, length=0, flags=0, payload=b""):
        """(error, chunks) of one request."""
        sent = self.send(cmd, offset, length, flags, payload)
        cookie, error, chunks = self.reply(length if cmd == READ and not self.structured else 0)
        assert cookie == sent
        return error, chunks

    def pread(self, offset, length, flags=0):
        error, chunks = self.call(READ, offset, length, flags)
        assert error == 0
        if not self.structured:
            return chunks[0][1]
        out = bytearray(length)
        for kind, body in chunks:
            at = struct.unpack(">Q", body[:8])[0] - offset if body else 0
            if kind == 1:
                out[at:at + len(body) - 8] = body[8:]
        return bytes(out)

    def status(self, offset, length, flags=0, payload=b""):
        """{context id: [(length, value)]} of a block status request."""
        if payload:
            flags |= PAYLOAD_LEN
        sent = self.send(STATUS, offset, len(payload) if payload else length, flags, payload)
        cookie, error, chunks = self.reply()
        assert cookie == sent and error == 0
        out = {}
        for kind, body in chunks:
            assert kind == (6 if self.extended else 5)
            skip, form, step = (8, ">QQ", 16) if self.extended else (4, ">II", 8)
            out[struct.unpack(">I", body[:4])[0]] = [
                struct.unpack(form, body[i:i + step]) for i in range(skip, len(body), step)]
            if self.extended:
                assert struct.unpack(">I", body[4:8])[0] == (len(body) - 8) // 16
        return out

    def pwrite(self, offset, data, flags=0):
        return self.call(WRITE, offset, len(data), flags, data)[0]
