# SPDX-License-Identifier: MIT
"""Clients that break the protocol: only their own connection suffers.

Every test uses the same server and afterwards checks that another client, connected before, is
still served.
"""
import os
import struct
import time

import pytest
from serving import *

SIZE = 64 << 20


@pytest.fixture(scope="module")
def server(strata, tmp_path_factory):
    d = tmp_path_factory.mktemp("hostile")
    image = d / "disk.raw"
    with open(image, "wb") as f:
        f.truncate(SIZE)
        f.write(b"first sector")
    with Server(strata, image, "-t", "-f", "raw", socket_path=d / "s") as s:
        s.image = image
        yield s


@pytest.fixture(autouse=True)
def bystander(server):
    """Somebody else's connection, which must not notice anything."""
    with Client(server.path) as c:
        c.go()
        assert c.pread(0, 12) == b"first sector"
        yield c
        assert c.pread(0, 12) == b"first sector"


@pytest.fixture
def client(server):
    with Client(server.path) as c:
        yield c


# ---------------------------------------------------------------- handshake

def test_client_that_says_nothing_is_cut_off(server):
    with Client(server.path, greet=False) as c:
        c.read(18)
        start = time.monotonic()
        assert c.closed()
        assert 8 < time.monotonic() - start < 15


def test_client_that_leaves_at_once(server):
    for _ in range(20):
        Client(server.path, greet=False).close()


def test_unknown_client_flags_end_the_connection(server):
    with Client(server.path, flags=0x80) as c:
        assert c.closed()


def test_bad_option_magic_ends_the_connection(client):
    client.s.sendall(b"IHAVEOPX" + struct.pack(">II", OPT_LIST, 0))
    assert client.closed()


def test_half_an_option_then_gone(client):
    client.s.sendall(b"IHAVE")


def test_unknown_option_is_unsupported(client):
    assert client.option(0x12345678, b"data")[-1][0] == ERR_UNSUP
    client.go()


def test_starttls_is_refused_by_policy(client):
    assert client.option(OPT_STARTTLS)[-1][0] == ERR_POLICY


def test_long_option_data_is_too_big_and_the_handshake_goes_on(client):
    assert client.option(OPT_LIST, b"x" * 100_000)[-1][0] == ERR_TOO_BIG
    client.go()


def test_gross_option_length_ends_the_connection(client):
    client.send_option(OPT_LIST, b"", length=0xFFFFFFFF)
    assert client.closed()


def test_option_flood_ends_the_connection(client):
    with pytest.raises((EOFError, ConnectionError)):
        for _ in range(300):
            client.option(OPT_LIST)


def test_option_with_data_where_none_belongs_is_invalid(client):
    assert client.option(OPT_LIST, b"x")[-1][0] == ERR_INVALID
    assert client.option(OPT_STRUCTURED, b"x")[-1][0] == ERR_INVALID


@pytest.mark.parametrize("data", [
    b"", b"\0\0\0", b"\0\0\0\5abc", b"\xff\xff\xff\xff", b"\0\0\0\0\0\2\0\1", b"\0\0\0\0\0\0junk",
    b"\0\0\0\2\xff\xfe\0\0", b"\0\0\0\3a\0b\0\0", struct.pack(">I", 4097) + b"a" * 4097 + b"\0\0",
], ids=["empty", "cut-length", "cut-name", "huge-name", "cut-infos", "junk-behind", "not-utf8",
        "nul-in-name", "name-above-4096"])
def test_malformed_info_request_is_invalid(client, data):
    assert client.option(OPT_INFO, data)[-1][0] == ERR_INVALID
    client.go()


@pytest.mark.parametrize("data", [
    b"", b"\0\0\0\0", b"\0\0\0\0\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\1\0\0\0\x09base:",
    b"\0\0\0\0\0\0\0\0junk",
], ids=["empty", "no-count", "huge-count", "cut-query", "junk-behind"])
def test_malformed_meta_request_is_invalid(client, data):
    client.option(OPT_STRUCTURED)
    assert client.option(OPT_SET_META, data)[-1][0] == ERR_INVALID
    client.go()


def test_meta_context_without_structured_replies_is_invalid(client):
    assert client.option(OPT_SET_META, client.meta_data(b"", [b"base:allocation"]))[-1][0] == ERR_INVALID


def test_unknown_export_is_unknown(client):
    assert client.option(OPT_GO, client.info_data(b"other"))[-1][0] == ERR_UNKNOWN
    client.option(OPT_STRUCTURED)
    assert client.option(OPT_LIST_META, client.meta_data(b"other"))[-1][0] == ERR_UNKNOWN
    client.go()


def test_export_name_unknown_ends_the_connection(client):
    client.send_option(OPT_EXPORT_NAME, b"other")
    assert client.closed()


def test_export_name_too_long_ends_the_connection(client):
    client.send_option(OPT_EXPORT_NAME, b"a" * 5000)
    assert client.closed()


def test_abort_is_acknowledged(client):
    assert client.option(OPT_ABORT) == [(REP_ACK, b"")]
    assert client.closed()


@pytest.mark.parametrize("flags,zeroes", [(3, 0), (1, 124), (0, 124)])
def test_export_name_answers_as_negotiated(server, flags, zeroes):
    with Client(server.path, flags=flags) as c:
        c.send_option(OPT_EXPORT_NAME)
        size, _ = struct.unpack(">QH", c.read(10))
        assert size == SIZE
        assert c.read(zeroes) == bytes(zeroes)
        assert c.pread(0, 12) == b"first sector"


def test_options_in_one_packet_are_answered_in_order(client):
    one = b"IHAVEOPT" + struct.pack(">II", OPT_STRUCTURED, 0)
    client.s.sendall(one + b"IHAVEOPT" + struct.pack(">II", OPT_LIST, 0))
    assert client.option_reply()[:2] == (OPT_STRUCTURED, REP_ACK)
    assert client.option_reply()[:2] == (OPT_LIST, REP_SERVER)
    assert client.option_reply()[:2] == (OPT_LIST, REP_ACK)


# ---------------------------------------------------------------- metadata contexts

def test_list_meta_answers_wildcards_and_set_does_not(client):
    client.option(OPT_STRUCTURED)
    assert client.option(OPT_LIST_META, client.meta_data())[0] == (REP_META, b"\0\0\0\0base:allocation")
    assert client.option(OPT_LIST_META, client.meta_data(b"", [b"base:"]))[0][0] == REP_META
    assert client.option(OPT_LIST_META, client.meta_data(b"", [b"qemu:"])) == [(REP_ACK, b"")]
    assert client.option(OPT_SET_META, client.meta_data(b"", [b"base:"])) == [(REP_ACK, b"")]
    assert client.option(OPT_SET_META, client.meta_data()) == [(REP_ACK, b"")]
    assert client.option(OPT_SET_META, client.meta_data(b"", [b"base:allocation"]))[0][0] == REP_META


def test_block_status_without_a_context_is_invalid(client):
    client.go()
    assert client.call(STATUS, 0, 4096)[0] == EINVAL


def test_a_later_selection_of_nothing_replaces_the_first(client):
    client.option(OPT_STRUCTURED)
    client.option(OPT_SET_META, client.meta_data(b"", [b"base:allocation"]))
    client.option(OPT_SET_META, client.meta_data(b"", [b"x-other:thing"]))
    client.go()
    assert client.call(STATUS, 0, 4096)[0] == EINVAL


# ---------------------------------------------------------------- transmission

def test_bad_request_magic_ends_the_connection(client):
    client.go().send(READ, 0, 512, magic=0xDEADBEEF)
    assert client.closed()


def test_garbage_ends_the_connection(client):
    client.go().s.sendall(os.urandom(100_000))
    assert client.closed()


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("cmd,offset,length,flags,error", [
    (READ, SIZE, 1, 0, EINVAL), (READ, SIZE - 1, 2, 0, EINVAL), (READ, 2**64 - 1, 2, 0, EINVAL),
    (READ, 2**63, 512, 0, EINVAL), (READ, 0, MAX + 1, 0, EINVAL), (READ, 0, 0xFFFFFFFF, 0, EINVAL),
    (ZEROES, SIZE - 1, 2, 0, ENOSPC), (TRIM, SIZE, 1, 0, EINVAL), (CACHE, SIZE, 1, 0, EINVAL),
    (99, 0, 0, 0, EINVAL), (0xFFFF, 0, 512, 0, EINVAL), (READ, 0, 512, 0x8000, EINVAL),
    (READ, 0, 512, NO_HOLE, EINVAL), (FLUSH, 0, 0, REQ_ONE, EINVAL),
])
def test_wrong_request_is_an_error_and_the_connection_lives(server, cmd, offset, length, flags, error,
                                                            structured):
    with Client(server.path) as c:
        c.go(structured=structured)
        assert c.call(cmd, offset, length, flags)[0] == error
        assert c.pread(0, 12) == b"first sector"


def test_write_past_the_end_is_no_space_and_its_payload_is_consumed(client):
    client.go()
    assert client.pwrite(SIZE - 1, b"ab") == ENOSPC
    assert client.pwrite(2**64 - 512, b"x" * 1024) == ENOSPC
    assert client.pread(0, 12) == b"first sector"
    assert client.pread(SIZE - 1, 1) == b"\0"


def test_write_above_the_maximum_is_invalid_and_its_payload_is_consumed(client):
    client.go()
    assert client.pwrite(0, bytes(MAX + 1)) == EINVAL
    assert client.pread(0, 12) == b"first sector"


def test_write_of_four_gigabytes_ends_the_connection(client):
    client.go().send(WRITE, 0, 0xFFFFFFFF)
    assert client.closed()


def test_write_with_a_wrong_flag_is_invalid_and_changes_nothing(client):
    client.go()
    assert client.pwrite(0, b"XXXX", flags=DF) == EINVAL
    assert client.pread(0, 12) == b"first sector"


def test_df_without_structured_replies_is_invalid(client):
    client.go(structured=False)
    assert client.flags & 1 << 7 == 0
    assert client.call(READ, 0, 512, DF)[0] == EINVAL


def test_zero_length_requests(client):
    client.go(meta=True)
    assert client.call(READ, 0, 0) == (0, [(0, b"")])
    assert client.pwrite(4096, b"") == 0
    assert client.call(TRIM, 4096, 0)[0] == 0
    assert client.call(ZEROES, 4096, 0)[0] == 0
    assert client.call(STATUS, 4096, 0)[0] == EINVAL


def test_block_status_with_req_one_gives_one_extent(client):
    client.go(meta=True)
    error, chunks = client.call(STATUS, 0, SIZE, REQ_ONE)
    assert error == 0 and chunks[0][0] == 5 and len(chunks[0][1]) == 12


def test_client_vanishes_in_the_middle_of_a_write(server, bystander):
    for sent in (0, 1, 5000, 100_000):
        c = Client(server.path).go()
        c.send(WRITE, 1 << 20, 200_000, payload=b"y" * sent)
        c.close()
    assert bystander.pread(1 << 20, 200_000) == bytes(200_000)


def test_client_vanishes_with_requests_in_flight(server):
    for _ in range(5):
        c = Client(server.path).go()
        for i in range(64):
            c.send(READ, i * 65536, 65536)
        c.close()


def test_half_closed_client_still_gets_its_replies(client):
    import socket
    client.go()
    cookies = [client.send(READ, 0, 12) for _ in range(10)]
    client.s.shutdown(socket.SHUT_WR)
    got = [client.reply() for _ in cookies]
    assert sorted(c for c, _, _ in got) == cookies
    assert client.closed()


def test_client_that_never_reads_replies_blocks_nobody(server, bystander):
    """It can hold only its own bounded share of memory."""
    c = Client(server.path).go()
    c.s.settimeout(1)
    try:
        for i in range(4000):
            c.send(READ, 0, 4 << 20)
    except TimeoutError:
        pass
    with open(f"/proc/{server.proc.pid}/status") as f:
        rss = next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))
    assert rss < 160 * 1024
    for _ in range(100):
        assert bystander.pread(0, 12) == b"first sector"
    c.close()


def test_flood_of_requests_starves_nobody(server, bystander):
    """Clients that always have more to say, another that wants one answer at a time."""
    import threading
    flood = [Client(server.path).go() for _ in range(3)]
    block = struct.pack(">IHHQQI", 0x25609513, 0, 99, 7, 0, 0) * 2000

    def send_on(c):
        try:
            while True:
                c.s.sendall(block)
        except OSError:
            pass

    threads = [threading.Thread(target=f, args=(c,)) for c in flood for f in (send_on, Client.closed)]
    for t in threads:
        t.start()
    start = time.monotonic()
    for _ in range(50):
        bystander.pread(0, 12)
    took = time.monotonic() - start
    for c in flood:
        c.s.shutdown(2)
    for t in threads:
        t.join(10)
    for c in flood:
        c.close()
    assert took < 5


def test_disconnect_waits_for_what_was_asked(client):
    client.go()
    cookies = [client.send(READ, i * 4096, 4096) for i in range(32)]
    client.send(DISC)
    assert sorted(client.reply()[0] for _ in cookies) == cookies
    assert client.closed()


def test_stop_with_a_client_that_does_not_read(strata, tmp_path):
    image = tmp_path / "d.raw"
    image.write_bytes(bytes(4 << 20))
    with Server(strata, image, "-t", "-f", "raw", socket_path=tmp_path / "s") as s:
        c = Client(s.path).go()
        c.s.settimeout(0.5)
        try:
            for _ in range(200):
                c.send(READ, 0, 1 << 20)
        except TimeoutError:
            pass
        start = time.monotonic()
        assert s.stop() == 0
        assert time.monotonic() - start < 8
        c.close()


def test_stop_with_half_handshakes(strata, tmp_path):
    image = tmp_path / "d.raw"
    image.write_bytes(bytes(1 << 20))
    with Server(strata, image, "-t", "-f", "raw", socket_path=tmp_path / "s") as s:
        half = [Client(s.path, greet=False) for _ in range(5)]
        half[0].read(18)
        start = time.monotonic()
        assert s.stop() == 0
        assert time.monotonic() - start < 3
