# SPDX-License-Identifier: MIT
"""Ten thousand hostile sessions: none may take the server down, hold descriptors, or leave memory."""
import os
import random
import re
import socket
import struct

import pytest
from serving import *

SESSIONS = int(os.environ.get("STRATA_SESSIONS", 10000))
MIB = 1 << 20


def option(kind, data=b"", length=None):
    return b"IHAVEOPT" + struct.pack(">II", kind, len(data) if length is None else length) + data


def make(rnd):
    """The bytes of one client, well-formed up to somewhere."""
    name = struct.pack(">I", 1) + b"x"
    wide = rnd.random() < .4
    parts = [struct.pack(">I", rnd.choice([3, 3, 3, 1, 0, 0xFFFF]))]
    if rnd.random() < .5:
        parts.append(option(11 if wide else 8))
    if rnd.random() < .3:
        parts.append(option(10, name + struct.pack(">I", 1) + struct.pack(">I", 15) + b"base:allocation"))
    for _ in range(rnd.choice([0, 0, 1, 3])):
        parts.append(option(rnd.randrange(13), rnd.randbytes(rnd.randrange(20)),
                            rnd.choice([None, None, 0, 5, 1 << 31])))
    parts.append(rnd.choice([option(7, name + b"\0\0"), option(7, name + b"\0\0"), option(1, b"x"), option(2), b""]))
    for _ in range(rnd.randrange(6)):
        cmd, flags = rnd.randrange(9), rnd.choice([0, 0, 1, 4, 8, 32, 0xFFFF])
        at = rnd.choice([0, 512, MIB - 1, 1 << 63, rnd.randrange(MIB)])
        length = rnd.choice([0, 1, 512, 4096, 65536, MIB, 1 << 31])
        form, magic = (">IHHQQQ", 0x21E41C71) if wide else (">IHHQQI", 0x25609513)
        parts.append(struct.pack(form, magic, flags, cmd, 7, at, length))
        if cmd == 1 and length <= 4096:
            parts.append(bytes(length))
    data = bytearray(b"".join(parts))
    for _ in range(rnd.choice([0, 0, 1, 4])):
        data[rnd.randrange(len(data))] = rnd.randrange(256)
    return bytes(data[:rnd.randrange(1, len(data) + 1)] if rnd.random() < .3 else data)


def figures(pid):
    with open(f"/proc/{pid}/status") as f:
        rss = int(re.search(r"VmRSS:\s+(\d+)", f.read())[1])
    return rss, len(os.listdir(f"/proc/{pid}/fd"))


def settle(path, pid):
    """Figures once the server has let go of everybody else."""
    for _ in range(200):
        with Client(path) as c:
            c.go(name=b"x")
        rss, fds = figures(pid)
        if fds < 20:
            break
    return rss, fds


def test_hostile_sessions(strata, tmp_path, seed):
    rnd = random.Random(seed)
    (tmp_path / "disk.raw").write_bytes(b"d" * MIB)
    with Server(strata, [f"x={tmp_path}/disk.raw"], "-f", "raw", "-t", "-s", "--scratch", "memory:16M",
                "--max-connections", "64", "--access-log", tmp_path / "log", socket_path=tmp_path / "s") as s:
        bystander = Client(s.path).go(name=b"x")
        middle = None
        for i in range(SESSIONS):
            with socket.socket(socket.AF_UNIX) as c:
                c.connect(s.path)
                try:
                    c.sendall(make(rnd))
                    if i % 4:  # others leave without a look at the answers
                        c.shutdown(socket.SHUT_WR)
                        c.settimeout(20)
                        while c.recv(65536):
                            pass
                except (BrokenPipeError, ConnectionResetError):
                    pass
            if i % 500 == 0:
                assert s.proc.poll() is None, s.proc.stderr.read()
                bystander.pread(0, 4096)
            if i == SESSIONS // 2:
                middle = settle(s.path, s.proc.pid)
        end = settle(s.path, s.proc.pid)
        bystander.pread(0, 4096)
        bystander.close()
        assert end[1] < 20
        lines = (tmp_path / "log").read_text().splitlines()
        opened = sum(" open " in line for line in lines)
        assert len(lines) - opened >= SESSIONS  # each has a last line
        assert opened > SESSIONS // 10  # and many came as far as to ask for data
        assert end[0] < middle[0] + 8192 + (32 << 10 if "asan" in strata else 0)  # KiB
