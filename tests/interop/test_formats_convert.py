# SPDX-License-Identifier: MIT
"""From every format to every other, and back, by content."""
import random

import pytest

from formats import MIB, SHAPES

RAW = [("raw", ""), ("qcow2", "")]
ALL = RAW + [(s.fmt, s.options) for s in SHAPES]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A sparse random disk, zeros and data in runs of all lengths."""
    path, rng = tmp_path_factory.mktemp("disk") / "disk.raw", random.Random(7)
    with open(path, "wb") as f:
        f.truncate(12 * MIB)
        for _ in range(24):
            f.seek(rng.randrange(0, 12 * MIB // 512 - 400) * 512)
            f.write(rng.randbytes(rng.choice([512, 4096, 65536, 200 * 1024])))
    return path


def options(text):
    return ["-o", text] if text else []


@pytest.mark.parametrize("target,target_options", ALL)
@pytest.mark.parametrize("source,source_options", ALL)
def test_every_format_converts_to_every_other(run, tmp_path, disk, source, source_options, target,
                                              target_options):
    a, b = tmp_path / "a", tmp_path / "b"
    run("convert", "-q", "-f", "raw", "-O", source, *options(source_options), disk, a)
    run("convert", "-q", "-f", source, "-O", target, *options(target_options), a, b)
    run("compare", "-q", "-f", "raw", "-F", target, disk, b)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.peer_options is not None], ids=str)
def test_what_strata_converts_qemu_img_reads_and_the_reverse(run, peer, tmp_path, disk, shape):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run("convert", "-q", "-f", "raw", "-O", shape.fmt, *options(shape.options), disk, ours)
    peer("qemu-img", "compare", "-f", "raw", "-F", shape.fmt, disk, ours)
    peer("qemu-img", "convert", "-f", "raw", "-O", shape.fmt, *options(shape.peer_options), disk,
         theirs)
    run("compare", "-f", "raw", "-F", shape.fmt, disk, theirs)
    if shape.checked:
        peer("qemu-img", "check", "-f", shape.fmt, ours)
        run("check", "-f", shape.fmt, theirs)


@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.files], ids=str)
def test_measure_tells_the_length_of_a_converted_image(run, tmp_path, disk, shape):
    out = tmp_path / "out"
    said = run("measure", "-f", "raw", "-O", shape.fmt, *options(shape.options), disk).stdout
    run("convert", "-q", "-f", "raw", "-O", shape.fmt, *options(shape.options), disk, out)
    assert out.stat().st_size == int(said.split("required size: ")[1].split()[0])
