# SPDX-License-Identifier: MIT
"""Every writable format at random by strata and qemu-io in turns, against a plain array."""
import random

import pytest

from formats import MIB, SHAPES
from model import Model, play, turn, verdict

OPS = 600
PEER_SHAPES = [s for s in SHAPES if s.peer_options is not None]


def options(text):
    return ["-o", text] if text else []


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.peer_writes], ids=str)
def test_random_turns_of_strata_and_qemu_io_agree_with_the_model(run, peer, strata, tmp_path,
                                                                 shape, seed):
    image, size = tmp_path / "image", shape.size + (1536 if shape.exact else 0)
    run("create", "-q", "-f", shape.fmt, *options(shape.options), image, size)
    play(run, peer, strata, tmp_path, image, Model(size, MIB, seed), shape.fmt, shape.checked,
         turns=2, ops=OPS)


@pytest.mark.parametrize("shape", PEER_SHAPES, ids=str)
def test_random_writes_to_an_image_of_qemu_img_agree_with_the_model(run, peer, strata, tmp_path,
                                                                    shape, seed):
    image, size = tmp_path / "image", 9 * MIB
    peer("qemu-img", "create", "-f", shape.fmt, *options(shape.peer_options), image, size)
    model = Model(size, MIB, seed)
    turn([strata, "io"], image, model, OPS, shape.fmt)
    verdict(run, peer, image, model, tmp_path, shape.fmt, shape.checked)


@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.peer_writes], ids=str)
def test_random_writes_to_what_only_strata_makes_agree_with_the_model(run, strata, tmp_path, shape,
                                                                      seed):
    image, size = tmp_path / "image", 9 * MIB
    run("create", "-q", "-f", shape.fmt, *options(shape.options), image, size)
    model, raw = Model(size, MIB, seed), tmp_path / "model.raw"
    for _ in range(2):
        turn([strata, "io"], image, model, OPS, shape.fmt)
        raw.write_bytes(model.bytes)
        run("compare", "-f", "raw", "-F", shape.fmt, raw, image)
        run("check", "-f", shape.fmt, image)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.backing], ids=str)
def test_random_writes_over_a_shorter_backing_file_agree_with_the_model(run, peer, strata, tmp_path,
                                                                        shape, seed):
    """qemu-io only reads here: on qed it copies old backing content into zero clusters."""
    image, base, size = tmp_path / "image", tmp_path / "base.raw", 9 * MIB
    content = random.Random(seed).randbytes(6 * MIB + 512)
    base.write_bytes(content)
    run("create", "-q", "-f", shape.fmt, "-b", base, "-F", "raw", *options(shape.options), image,
        size)
    model = Model(size, MIB, seed, content)
    for _ in range(2):
        turn([strata, "io"], image, model, OPS, shape.fmt)
        verdict(run, peer, image, model, tmp_path, shape.fmt, shape.checked)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.backing and s.sets_backing], ids=str)
def test_growth_over_a_longer_backing_file_shows_zeros(run, peer, tmp_path, shape):
    image, base = tmp_path / "image", tmp_path / "base.raw"
    base.write_bytes(b"\x55" * 6 * MIB)
    run("create", "-q", "-f", shape.fmt, "-b", base, "-F", "raw", *options(shape.options), image,
        3 * MIB - 512)
    run("resize", "-q", image, "8M")
    reads = ["read -q -P 85 0 3145216", "read -q -P 0 3145216 5243392"]
    run("io", "-c", reads[0], "-c", reads[1], image)
    peer("qemu-io", "-f", shape.fmt, "-c", reads[0], "-c", reads[1], image)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.backing and s.sets_backing], ids=str)
def test_another_backing_file_is_recorded(run, peer, tmp_path, shape):
    image, base, other = tmp_path / "image", tmp_path / "base.raw", tmp_path / ("o" * 200)
    base.write_bytes(b"\x55" * MIB)
    other.write_bytes(b"\x66" * MIB)
    run("create", "-q", "-f", shape.fmt, "-b", base, "-F", "raw", *options(shape.options), image)
    for name, byte in [(other, 0x66), (base, 0x55), (other, 0x66)]:
        run("rebase", "-q", "-u", "-b", name, "-F", "raw", image)
        peer("qemu-io", "-r", "-c", f"read -q -P {byte} 0 1M", image)
    run("rebase", "-q", "-b", "", image)
    run("io", "-r", "-c", "read -q -P 102 0 1M", image)
    assert "backing file" not in peer("qemu-img", "info", image).stdout


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.backing], ids=str)
def test_an_overlay_is_committed_into_its_base_of_the_same_format(run, peer, tmp_path, shape):
    base, image = tmp_path / "base", tmp_path / "image"
    run("create", "-q", "-f", shape.fmt, *options(shape.options), base, "4M")
    run("create", "-q", "-f", shape.fmt, "-b", base, "-F", shape.fmt, *options(shape.options), image)
    run("io", "--trust", "local", "-c", "write -q -P 3 1M 100k", image)
    run("commit", "-q", "--trust", "local", image)
    peer("qemu-io", "-r", "-f", shape.fmt, "-c", "read -q -P 3 1M 100k", base)
    status = run("map", "--output=json", "--trust", "local", image).stdout
    assert '"depth": 0' not in status
    run("io", "--trust", "local", "-c", "write -q -P 4 2M 64k", "-c", "read -q -P 3 1M 100k", image)
    if shape.checked:
        peer("qemu-img", "check", "-f", shape.fmt, image)
