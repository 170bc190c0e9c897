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
    image, size = tmp_path / "image", 21 * MIB + (1536 if shape.exact else 0)
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
def test_random_turns_over_a_shorter_backing_file_agree_with_the_model(run, peer, strata, tmp_path,
                                                                       shape, seed):
    image, base, size = tmp_path / "image", tmp_path / "base.raw", 9 * MIB
    content = random.Random(seed).randbytes(6 * MIB + 512)
    base.write_bytes(content)
    run("create", "-q", "-f", shape.fmt, "-b", base, "-F", "raw", *options(shape.options), image,
        size)
    play(run, peer, strata, tmp_path, image, Model(size, MIB, seed, content), shape.fmt,
         shape.checked, turns=2, ops=OPS)
