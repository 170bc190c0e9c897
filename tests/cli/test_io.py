# SPDX-License-Identifier: MIT
"""io: the commands, their words and their exit status, on a raw file; qemu-io is the model."""
import os
import re
import subprocess

import pytest


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "a.raw"
    with open(path, "wb") as f:
        f.truncate(10 << 20)
    return path


@pytest.fixture
def io(run, disk):
    """io("length", "read 0 4k", status=0) -> what it printed."""

    def call(*commands, status=0, opts=()):
        args = [x for c in commands for x in ("-c", c)]
        return run("io", *opts, *args, disk, status=status)

    return call


RATE = re.compile(r"\d\d\.\d\d sec \(\S+ \S+/sec and \S+ ops/sec\)")


def plain(text):
    """Without times and rates."""
    return RATE.sub("T", text)


SAME_AS_QEMU = [
    "read 0 64k",
    "read 1 3",
    "read 0 0",
    "read -v 512 40",
    "read -q 0 4k",
    "read -P 0 0 64k",
    "read -P 1 0 64k",
    "read -P 1 -s 512 -l 1k 0 64k",
    "readv 0 4k 8k 512",
    "readv -P 9 4k 4k 8k",
    "write 0 1",
    "write -P 0x21 4k 1M",
    "write -q 3 5",
    "write -z 1M 64k",
    "write -z -u 1M 64k",
    "write -f 2M 512",
    "writev -P 3 1M 4k 8k",
    "discard 1M 64k",
    "flush",
    "length",
    "truncate 20M",
    "map",
    "alloc 0",
    "alloc 4k 1M",
    "sleep 1",
    "help bogus",
    "read x 4",
    "read 0 1000M",
    "write 100M 4k",
    "write -P 300 0 1",
    "write -P x 0 1",
    "write -u 0 4k",
    "write -n 0 4k",
    "write -z -P 3 0 4k",
    "read 0 3G",
    "discard 0 3G",
    "write -z 0 3G",
    "sleep x",
    "bogus",
    "length 3",
    "truncate",
]


@pytest.mark.parametrize("command", SAME_AS_QEMU)
def test_answers_as_qemu_io(run, peer, disk, command):
    theirs = peer("qemu-io", "-f", "raw", "-c", command, disk, status=None)
    with open(disk, "r+b") as f:
        f.truncate(0)
        f.truncate(10 << 20)
    ours = run("io", "-c", command, disk, status=None)
    assert plain(ours.stdout) == plain(theirs.stdout)
    assert ours.returncode == theirs.returncode


SAME_ON_QCOW2 = [
    ["write -P 1 64k 64k", "map", "alloc 0 1M", "read -P 1 64k 64k"],
    ["write -c -P 5 3M 64k", "read -P 5 3M 64k", "alloc 3M 64k"],
    ["write -c -P 5 3M 100", "write -c 512 64k", "write -c 100 64k"],
    ["write -P 9 100 5M", "write -z -u 1M 2M", "read -P 0 1M 2M", "map"],
    ["write 0 1M", "discard 64k 128k", "read -P 0 64k 128k", "length"],
    ["truncate 20M", "length", "write -P 3 11M 300k", "map"],
    ["aio_write -P 3 1M 300k", "aio_flush", "read -P 3 1M 300k"],
]


@pytest.mark.parametrize("commands", SAME_ON_QCOW2, ids=lambda c: c[0])
def test_answers_as_qemu_io_on_qcow2(run, peer, tmp_path, commands):
    out = []
    for call in (lambda *a: peer("qemu-io", "-d", "unmap", *a, status=None),
                 lambda *a: run("io", *a, status=None)):
        image = tmp_path / f"{len(out)}.qcow2"
        peer("qemu-img", "create", "-f", "qcow2", image, "10M")
        out.append(call(*[x for c in commands for x in ("-c", c)], image))
        peer("qemu-img", "check", image)
    assert plain(out[1].stdout) == plain(out[0].stdout)
    assert out[1].returncode == out[0].returncode


def test_snapshot_is_thrown_away(run, disk):
    run("io", "-s", "-c", "write -P 1 0 1M", "-c", "read -P 1 0 1M", disk)
    assert not any(disk.read_bytes())


def test_what_is_written_is_in_the_file(io, disk):
    io("write -P 0x61 5 3", "writev -P 0x62 4k 1 2", "aio_write -P 0x63 8k 4", "aio_flush")
    data = disk.read_bytes()
    assert data[4:9] == b"\0aaa\0"
    assert data[4096:4100] == b"bbb\0"
    assert data[8192:8197] == b"cccc\0"
    assert len(data) == 10 << 20


def test_default_pattern_is_cd(io, disk):
    io("write 0 4")
    assert disk.read_bytes()[:5] == b"\xcd\xcd\xcd\xcd\0"


def test_write_from_a_file_repeats_it(io, disk, tmp_path):
    (tmp_path / "src").write_bytes(b"abc")
    io(f"write -s {tmp_path}/src 0 8")
    assert disk.read_bytes()[:9] == b"abcabcab\0"


def test_missing_source_file_is_named(io, tmp_path):
    p = io(f"write -s {tmp_path}/none 0 8", status=1)
    assert "none: No such file" in p.stderr


def test_pattern_mismatch_tells_where_and_fails(io):
    p = io("write -P 7 4k 4k", "read -P 7 4k 4k", "read -P 7 4k 8k", "length", status=1)
    assert p.stdout.count("Pattern verification failed at offset 4096, 8192 bytes\n") == 1
    assert p.stdout.endswith("10 MiB\n"), "later commands run all the same"


def test_machine_readable_statistics(io):
    p = io("read -C 0 64k")
    assert re.fullmatch(r"65536,1,0:00:00\.\d\d,\d+\.\d{3},\d+\.\d{3}\n", p.stdout)


def test_zero_with_unmap_gives_space_back(io, disk):
    io("write 0 4M")
    before = os.stat(disk).st_blocks
    io("write -z -u 0 4M", "read -q -P 0 0 4M")
    assert os.stat(disk).st_blocks < before / 2


def test_discard_gives_space_back_unless_ignored(io, disk):
    io("write 0 4M", "flush")
    before = os.stat(disk).st_blocks
    io("discard 0 4M", opts=["-d", "ignore"])
    assert os.stat(disk).st_blocks == before
    io("discard 0 4M")
    assert os.stat(disk).st_blocks < before / 2


def test_aio_runs_while_later_commands_do(strata, tmp_path):
    # Three reads of 300 ms each on a slow disk, at once: well below 900 ms together.
    slow = "driver=raw,file.driver=null-co,file.size=1M,file.latency-ns=300000000"
    p = subprocess.run(
        [strata, "io", "--image-opts", "-r", *(["-c", "aio_read 0 4k"] * 3), "-c", "length",
         "-c", "aio_flush", slow],
        capture_output=True, text=True, timeout=20)
    assert p.returncode == 0, p.stderr
    assert p.stdout.startswith("1 MiB\n"), "length does not wait for the reads"
    times = [float(t) for t in re.findall(r"(\d\d\.\d\d) sec", p.stdout)]
    assert len(times) == 3 and all(0.29 <= t < 0.6 for t in times), p.stdout


def test_aio_failure_fails_the_run(io):
    p = io("aio_write 100M 4k", "aio_read -P 3 0 4k", status=1)
    assert "aio_write failed: Input/output error" in p.stdout
    assert "Pattern verification failed at offset 0, 4096 bytes" in p.stdout


def test_commands_from_standard_input_until_quit(strata, disk):
    p = subprocess.run([strata, "io", disk], input="length\n\n  read -q 0 4k  \nquit\nlength\n",
                       capture_output=True, text=True, timeout=20)
    assert (p.returncode, p.stdout) == (0, "10 MiB\n")


def test_last_line_needs_no_newline(strata, disk):
    p = subprocess.run([strata, "io", disk], input="length", capture_output=True, text=True,
                       timeout=20)
    assert (p.returncode, p.stdout) == (0, "10 MiB\n")


def test_answers_before_the_next_command_comes(strata, disk):
    with subprocess.Popen([strata, "io", disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as p:
        p.stdin.write("length\n")
        p.stdin.flush()
        assert p.stdout.readline() == "10 MiB\n"
        p.stdin.close()
        assert p.wait(20) == 0


def test_endless_line_is_refused(strata, disk):
    p = subprocess.run([strata, "io", disk], input="x" * 100000, capture_output=True, text=True,
                       timeout=20)
    assert p.returncode == 1
    assert "longer than 65536 bytes" in p.stderr


def test_read_only_refuses_writes(io, disk):
    p = io("write 0 4k", "write -z 0 4k", "discard 0 4k", status=1, opts=["-r"])
    assert p.stderr.count("the image is open read-only") == 3
    assert not any(disk.read_bytes())


def test_reopen_changes_to_writing_and_back(io, disk):
    io("reopen -w", "write 0 1", "reopen -r", opts=["-r"])
    assert disk.read_bytes()[0] == 0xCD
    io("reopen -r", "write 0 1", status=1)


def test_nocache_moves_odd_pieces(io, disk):
    io("write -P 1 0 1M", "write -P 2 513 1000", "read -P 1 -l 513 0 4k",
       "read -P 2 513 1000", "read -P 1 1513 4k", opts=["-n"])
    assert disk.stat().st_size == 10 << 20


def test_reading_beyond_the_end_says_where_it_is(io):
    p = io("read 10M 1", status=1)
    assert p.stdout == "read failed: Input/output error\n"
    assert "(10485760 bytes)" in p.stderr


def test_help_needs_no_image(run):
    p = run("io", "-c", "help")
    names = [line.split()[0] for line in p.stdout.splitlines() if " -- " in line]
    for name in ("read", "write", "aio_read", "aio_write", "aio_flush", "discard", "flush",
                 "truncate", "length", "info", "map", "alloc", "sleep", "quit", "help"):
        assert name in names
        assert run("io", "-c", f"help {name}").stdout.startswith(name)


def test_commands_without_an_image_say_so(run):
    p = run("io", "-c", "length", status=1)
    assert "no file open" in p.stderr


def test_compressing_raw_is_refused(io):
    assert "write failed: Operation not supported" in io("write -c 0 64k", status=1).stdout


def test_unknown_option_shows_the_command(io):
    p = io("read -Z 0 4k", status=1)
    assert "invalid option -- 'Z'" in p.stderr
    assert p.stdout.startswith("read [")
