# SPDX-License-Identifier: MIT
"""Extended headers: 64-bit lengths, by a client of our own (no tool of Debian 12 asks for them)."""
import random
import struct
import subprocess

import pytest
from serving import *

MIB, GIB = 1 << 20, 1 << 30
SIZE = 20 * GIB


@pytest.fixture
def served(strata, tmp_path):
    """An empty qcow2 of 20 GiB with a bitmap, served."""
    image = tmp_path / "q"
    for cmd in (["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, str(SIZE)],
                ["bitmap", "--add", image, "b0"]):
        subprocess.run(["qemu-img", *map(str, cmd)], check=True)
    with Server(strata, image, "-t", "-A", "-B", "b0", socket_path=tmp_path / "s") as s:
        yield s


ALL = [b"base:allocation", b"qemu:allocation-depth", b"qemu:dirty-bitmap:b0"]


def test_data_and_every_reply_is_extended(served, seed):
    rnd = random.Random(seed)
    with Client(served.path) as c:
        c.go(extended=True, meta=True)
        for length in (1, 512, 16384, 16385, 70000, 5 * MIB):
            at = rnd.randrange(SIZE - length)
            data = rnd.randbytes(length)
            assert c.pwrite(at, data, FUA) == 0
            assert c.reply_offset == at
            assert c.pread(at, length) == data
            assert c.reply_offset == at
            assert c.pread(at, length, DF) == data
        for cmd in (FLUSH, CACHE):
            error, chunks = c.call(cmd, 0, 0)
            assert error == 0 and chunks == [(0, b"")]
        assert c.call(READ, 0, 0) == (0, [(0, b"")])


def test_holes_are_sent_as_such(served):
    with Client(served.path) as c:
        c.go(extended=True)
        c.pwrite(4 * MIB, b"x" * MIB)
        error, chunks = c.call(READ, 0, 8 * MIB)
        assert error == 0
        assert [k for k, _ in chunks] == [2, 1, 2]


def test_one_command_for_more_than_four_gib(served):
    with Client(served.path) as c:
        c.go(extended=True, meta=ALL)
        for at in (0, 6 * GIB, 19 * GIB):
            assert c.pwrite(at, b"x" * MIB) == 0
        base = c.contexts[b"base:allocation"]
        got = c.status(MIB * 2, 6 * GIB - 2 * MIB)[base]
        assert got == [(6 * GIB - 2 * MIB, 3)]
        whole = c.status(0, SIZE)
        assert sum(n for n, _ in whole[base]) == SIZE
        assert whole[c.contexts[b"qemu:allocation-depth"]][0][1] == 1
        assert whole[c.contexts[b"qemu:dirty-bitmap:b0"]][0] == (MIB, 1)
        assert c.call(ZEROES, 0, 10 * GIB)[0] == 0
        assert c.pread(0, 4096) == bytes(4096) == c.pread(6 * GIB, 4096)
        assert c.call(TRIM, 10 * GIB, 10 * GIB)[0] == 0
        assert c.pread(19 * GIB, 4096) == bytes(4096)
        assert c.call(CACHE, 0, SIZE)[0] == 0


def test_req_one_is_one_extent_of_any_length(served):
    with Client(served.path) as c:
        c.go(extended=True, meta=True)
        assert c.status(0, SIZE, REQ_ONE) == {c.contexts[b"base:allocation"]: [(SIZE, 3)]}


def test_status_of_chosen_contexts(served):
    """The payload form: u64 length, then ids."""
    with Client(served.path) as c:
        c.go(extended=True, meta=ALL)
        assert c.flags & 1 << 12
        for ids in ([1], [2], [3], [3, 1], [1, 2, 3]):
            got = c.status(0, 0, payload=struct.pack(f">Q{len(ids)}I", 5 * GIB, *ids))
            assert sorted(got) == sorted(ids)
            assert all(sum(n for n, _ in v) == 5 * GIB for v in got.values())
        for bad in (struct.pack(">Q", 4096), struct.pack(">QI", 4096, 9), struct.pack(">QII", 4096, 1, 1),
                    struct.pack(">QIH", 4096, 1, 1), b"x", struct.pack(">QI", 0, 1), b"x" * 70000,
                    struct.pack(">QI", 1 << 63, 1), struct.pack(">QI", 4096, 0)):
            sent = c.send(STATUS, 0, len(bad), PAYLOAD_LEN, bad)
            cookie, error, _ = c.reply()
            assert (cookie, error) == (sent, EINVAL)
        assert c.pread(0, 512) == bytes(512)


def test_block_status_payload_is_offered_only_where_it_works(served):
    for kw, offered in (({"extended": True}, False), ({"extended": True, "meta": True}, True), ({"meta": True}, False)):
        with Client(served.path) as c:
            c.go(**kw)
            assert bool(c.flags & 1 << 12) == offered


def test_structured_replies_do_not_come_back(served):
    with Client(served.path) as c:
        assert c.option(OPT_EXTENDED, b"x")[-1][0] == ERR_INVALID
        assert c.option(OPT_EXTENDED)[-1][0] == REP_ACK
        assert c.option(OPT_STRUCTURED)[-1][0] == ERR_EXT_HEADER_REQD
        c.send_option(OPT_EXPORT_NAME, b"")
        assert c.closed()


@pytest.mark.parametrize("length", [1 << 40, (1 << 64) - 1, SIZE + 1, 33 * MIB])
def test_reads_that_are_too_long_are_refused_and_the_session_goes_on(served, length):
    with Client(served.path) as c:
        c.go(extended=True)
        for cmd in (READ, TRIM, ZEROES, CACHE):
            error, _ = c.call(cmd, 0, length)
            assert error == (EINVAL if cmd == READ else 0 if length == 33 * MIB else
                             ENOSPC if cmd == ZEROES else EINVAL)
        assert c.call(READ, (1 << 64) - 512, 1024)[0] == EINVAL
        assert c.pread(0, 512) == bytes(512)


def test_payload_where_none_belongs_is_consumed(served):
    with Client(served.path) as c:
        c.go(extended=True)
        for cmd in (READ, FLUSH, TRIM, ZEROES, 77):
            sent = c.send(cmd, 0, 1000, PAYLOAD_LEN, b"z" * 1000)
            cookie, error, _ = c.reply()
            assert (cookie, error) == (sent, EINVAL)
        assert c.pread(0, 512) == bytes(512)


def test_a_write_without_the_payload_flag_ends_the_connection(served):
    with Client(served.path) as c:
        c.go(extended=True)
        c.s.sendall(struct.pack(">IHHQQQ", 0x21E41C71, 0, WRITE, 1, 0, 4) + b"abcd")
        assert c.closed()


def test_a_payload_above_the_maximum_ends_the_connection(served):
    for cmd in (READ, WRITE, STATUS):
        with Client(served.path) as c:
            c.go(extended=True, meta=True)
            c.s.sendall(struct.pack(">IHHQQQ", 0x21E41C71, PAYLOAD_LEN, cmd, 1, 0, 1 << 40))
            assert c.closed()


def test_compact_requests_end_an_extended_session(served):
    with Client(served.path) as c:
        c.go(extended=True)
        c.send(READ, 0, 512, magic=0x25609513)
        assert c.closed()
