# SPDX-License-Identifier: MIT
"""convert - and convert to -: streams in and out, pipes and files, checked by qemu-img."""
import os
import random
import signal
import subprocess
import time

import pytest

KIB, MIB = 1 << 10, 1 << 20
STRATA = os.environ.get("STRATA", "build/src/strata")


def disk(tmp_path, name="a.raw", size=9 * MIB + 1000, seed=1):
    """Data and holes by turns, of an odd length."""
    rng, path = random.Random(seed), tmp_path / name
    content = bytearray(size)
    for at in range(0, size, 300 * KIB):
        piece = rng.randbytes(70 * KIB)[: size - at]
        content[at:at + len(piece)] = piece
    path.write_bytes(content)
    subprocess.run(["fallocate", "--dig-holes", path], check=True)
    return path


def stream(*args, source=None, env=None):
    """strata convert with pipes on both sides."""
    p = subprocess.run([STRATA, "convert", *map(str, args)], input=source, capture_output=True, timeout=60,
                       env={**os.environ, **(env or {})})
    return p


def judge(peer, content, image, fmt, tmp_path):
    """qemu-img finds no fault with the image and reads `content` from it, zeros behind."""
    if fmt == "qcow2":
        peer("qemu-img", "check", "-q", "-f", fmt, image)
    out = tmp_path / "judged.raw"
    peer("qemu-img", "convert", "-f", fmt, "-O", "raw", image, out)
    got = out.read_bytes()
    assert got[:len(content)] == content and not any(got[len(content):])


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=512", "cluster_size=2M,refcount_bits=64",
                                     "compat=0.10", "cluster_size=4k,preallocation=metadata"])
def test_a_qcow2_stream_is_a_whole_image(peer, tmp_path, options):
    src, image = disk(tmp_path), tmp_path / "out.qcow2"
    p = stream("-f", "raw", "-O", "qcow2", "-o", options, src, "-")
    assert p.returncode == 0, p.stderr
    image.write_bytes(p.stdout)
    judge(peer, src.read_bytes(), image, "qcow2", tmp_path)


def test_holes_of_the_source_are_not_in_the_stream(tmp_path):
    src = tmp_path / "a.raw"
    with open(src, "wb") as f:
        f.truncate(200 * MIB)
        f.write(b"x")
    p = stream("-f", "raw", "-O", "qcow2", src, "-")
    assert p.returncode == 0 and len(p.stdout) < MIB


def test_nothing_is_stored_on_the_way_out(tmp_path):
    """A scratch file receives metadata only."""
    src = disk(tmp_path, size=40 * MIB)
    env = {"TMPDIR": str(tmp_path), "ASAN_OPTIONS": "detect_leaks=0"}  # which cannot work under strace
    p = subprocess.run(["strace", "-f", "-e", "trace=pwritev,pwritev2,pwrite64", "-o", tmp_path / "log", STRATA, "convert",
                        "-f", "raw", "-O", "qcow2", src, "-"], stdout=subprocess.PIPE, env={**os.environ, "STRATA_AIO": "threads", **env},
                       timeout=60)
    assert p.returncode == 0
    stored = 0
    for line in (tmp_path / "log").read_text().splitlines():
        if "pwrite" in line and " = " in line and "-1, RWF_NOWAIT" not in line and line.rsplit("= ", 1)[1].split()[0].isdigit():
            stored += int(line.rsplit("= ", 1)[1].split()[0])
    assert 0 < stored < 2 * MIB, stored


def test_a_vdi_stream(peer, tmp_path):
    src, image = disk(tmp_path), tmp_path / "out.vdi"
    p = stream("-f", "raw", "-O", "vdi", src, "-")
    assert p.returncode == 0, p.stderr
    image.write_bytes(p.stdout)
    judge(peer, src.read_bytes(), image, "vdi", tmp_path)


def test_a_compressed_stream(peer, tmp_path):
    src, image = disk(tmp_path), tmp_path / "out.qcow2"
    p = stream("-f", "raw", "-c", "-O", "qcow2", src, "-")
    assert p.returncode == 0, p.stderr
    image.write_bytes(p.stdout)
    judge(peer, src.read_bytes(), image, "qcow2", tmp_path)


def test_a_raw_stream_is_the_disk(run, tmp_path):
    src, image = disk(tmp_path), tmp_path / "a.qcow2"
    run("convert", "-f", "raw", "-O", "qcow2", src, image)
    assert stream(src, "-").stdout == src.read_bytes()
    assert stream(image, src, "-").stdout[:len(src.read_bytes())] == src.read_bytes()
    assert stream(src, src, "-").stdout == src.read_bytes() * 2


def test_an_overlay_as_a_stream_keeps_its_backing(peer, tmp_path):
    base, over, out = tmp_path / "base.qcow2", tmp_path / "over.qcow2", tmp_path / "out.qcow2"
    peer("qemu-img", "create", "-q", "-f", "qcow2", base, "8M")
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 8M", base)
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", over)
    peer("qemu-io", "-f", "qcow2", "-c", "write -P 9 100k 10k", "-c", "write -z 1M 1M", "-c", "write -z 3000k 3k",
         "-c", "write -P 3 5M 1M", over)
    p = stream("-O", "qcow2", "-B", base, "-F", "qcow2", over, "-")
    assert p.returncode == 0, p.stderr
    out.write_bytes(p.stdout)
    assert len(p.stdout) < 3 * MIB
    peer("qemu-img", "check", "-q", out)
    peer("qemu-img", "compare", "-q", over, out)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_pipe_in_becomes_an_image(peer, tmp_path, fmt):
    src, image = disk(tmp_path), tmp_path / "out"
    p = stream("-O", fmt, "-", image, source=src.read_bytes())
    assert p.returncode == 0, p.stderr
    judge(peer, src.read_bytes(), image, fmt, tmp_path)
    if fmt == "raw":
        assert image.stat().st_size == src.stat().st_size
        assert image.stat().st_blocks <= src.stat().st_blocks + 64


def test_pipe_to_pipe_and_another_format_in(run, peer, tmp_path):
    src, image, out = disk(tmp_path), tmp_path / "a.qcow2", tmp_path / "out.qcow2"
    run("convert", "-c", "-f", "raw", "-O", "qcow2", src, image)
    p = stream("-f", "qcow2", "-O", "qcow2", "-", "-", source=image.read_bytes())
    assert p.returncode == 0, p.stderr
    out.write_bytes(p.stdout)
    judge(peer, src.read_bytes(), out, "qcow2", tmp_path)


def test_a_file_on_standard_input_is_used_in_place(run, tmp_path):
    src, image = disk(tmp_path), tmp_path / "a.qcow2"
    with open(src, "rb") as f:
        subprocess.run([STRATA, "convert", "-O", "qcow2", "-", image], stdin=f, check=True, env={**os.environ, "TMPDIR": "/nowhere"})
    run("compare", "-q", "-f", "raw", "-F", "qcow2", src, image, status=None)
    assert stream(image, "-").stdout[:src.stat().st_size] == src.read_bytes()


def test_an_interrupted_stream_leaves_nothing(tmp_path):
    image = tmp_path / "out.raw"
    p = subprocess.Popen([STRATA, "convert", "-", image], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdin.write(b"x" * MIB)
    p.stdin.flush()
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    assert p.wait(5) != 0 and b"cancelled" in p.stderr.read()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_sigusr1_during_a_stream_is_answered(tmp_path, fmt):
    image = tmp_path / "out"
    p = subprocess.Popen([STRATA, "convert", "-O", fmt, "-", image], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdin.write(b"x" * MIB)
    p.stdin.flush()
    time.sleep(0.3)
    p.send_signal(signal.SIGUSR1)
    p.stdin.write(b"x" * 3 * MIB)
    p.stdin.close()
    assert p.wait(20) == 0 and b"/100%)" in p.stderr.read() and image.exists()


def test_a_reader_that_goes_away_ends_it(tmp_path):
    src = disk(tmp_path)
    p = subprocess.Popen([STRATA, "convert", src, "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.read(100)
    p.stdout.close()
    assert p.wait(10) == 1 and b"Broken pipe" in p.stderr.read()


def test_a_full_pipe_can_be_interrupted(tmp_path):
    src = disk(tmp_path)
    p = subprocess.Popen([STRATA, "convert", src, "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    assert p.wait(5) == 1


@pytest.mark.parametrize("args,words", [
    (("-n", "SRC", "-"), "-n does not go with standard output"),
    (("--salvage", "SRC", "-"), "--salvage does not go with standard output"),
    (("-o", "size=1G", "SRC", "-"), "a raw stream takes no -o"),
    (("-", "-", "OUT"), "standard input can be one source only"),
])
def test_what_does_not_go_with_a_stream_is_said(tmp_path, args, words):
    src = disk(tmp_path)
    names = {"SRC": src, "OUT": tmp_path / "out"}
    p = stream(*[names.get(a, a) for a in args], source=b"")
    assert p.returncode == 1 and words in p.stderr.decode()
    assert not (tmp_path / "out").exists()


def test_an_empty_stream_is_an_empty_disk(peer, tmp_path):
    p = stream("-", tmp_path / "out.raw", source=b"")
    assert p.returncode == 0 and (tmp_path / "out.raw").stat().st_size == 0
    p = stream("-O", "qcow2", "-", "-", source=b"")
    (tmp_path / "e.qcow2").write_bytes(p.stdout)
    peer("qemu-img", "check", "-q", tmp_path / "e.qcow2")
