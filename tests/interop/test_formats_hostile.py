# SPDX-License-Identifier: MIT
"""Damaged images of every format: an answer, no crash, no hang, and no change by reading."""
import random

import pytest

from formats import MIB, SHAPES

VERBS = [["info"], ["check"], ["map"], ["io", "-r", "-c", "read 0 1M"], ["convert", "-O", "raw"]]


def options(text):
    return ["-o", text] if text else []


@pytest.fixture(scope="module")
def make(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")

    def image(shape):
        path = folder / str(shape)
        if not path.exists():
            run("create", "-q", "-f", shape.fmt, *options(shape.options), path, 4 * MIB)
            run("io", "-f", shape.fmt, "-c", "write -q -P 1 0 70k", "-c", "write -q -P 2 3M 64k",
                path)
        return path.read_bytes()

    return image


def answers(run, shape, path, tmp_path):
    for verb, *args in VERBS:
        more = [tmp_path / "out"] if verb == "convert" else []
        p = run(verb, "-f", shape.fmt, *args, path, *more, status=None, timeout=20)
        assert 0 <= p.returncode <= 3 or p.returncode == 63, (verb, p.returncode, p.stderr)
        assert p.returncode or not p.stderr or "Warning" in p.stderr or "warning" in p.stderr


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_with_changed_bytes_are_answered(run, make, tmp_path, shape, seed):
    sound, rng, path = make(shape), random.Random(seed), tmp_path / "damaged"
    for _ in range(12):
        damaged = bytearray(sound)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(0, min(len(damaged), rng.choice([128, 1024, 70000])))
            damaged[at] = rng.choice([0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)])
        path.write_bytes(damaged)
        answers(run, shape, path, tmp_path)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_cut_short_are_answered(run, make, tmp_path, shape, seed):
    sound, rng, path = make(shape), random.Random(seed), tmp_path / "cut"
    for length in [0, 1, 63, 64, 511, 512, 513, rng.randrange(len(sound))]:
        path.write_bytes(sound[:length])
        answers(run, shape, path, tmp_path)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_other_bytes_are_taken_for_an_image(run, make, tmp_path, shape, seed):
    rng, path = random.Random(seed), tmp_path / "noise"
    for _ in range(4):
        path.write_bytes(rng.randbytes(rng.choice([512, 4096, 100000])))
        assert "file format: raw" in run("info", path).stdout
