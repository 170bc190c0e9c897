# SPDX-License-Identifier: MIT
"""qcow2, written to at random by strata and by qemu-io in turns, against a plain array.

After each turn the image is checked by both programs and compared with the array by both.  The
seed is printed; STRATA_SEED chooses it, STRATA_OPS the operations a turn (four turns a shape).
"""
import random

import pytest

from model import KIB, MIB, OPS, TURNS, Model, play, turn

SHAPES = {
    "512": (2 * MIB + 512, "cluster_size=512"),
    "4k": (8 * MIB, "cluster_size=4k"),
    "64k": (24 * MIB + 1536, "cluster_size=64k"),
    "2M": (48 * MIB, "cluster_size=2M"),
    "512-bits1": (2 * MIB, "cluster_size=512,refcount_bits=1"),
    "4k-bits8": (8 * MIB, "cluster_size=4k,refcount_bits=8"),
    "512-bits64": (6 * MIB, "cluster_size=512,refcount_bits=64"),
    "64k-zstd": (24 * MIB, "cluster_size=64k,compression_type=zstd"),
    "16k-extended": (8 * MIB + 512, "cluster_size=16k,extended_l2=on"),
    "64k-extended": (24 * MIB, "cluster_size=64k,extended_l2=on"),
    "4k-data-file": (8 * MIB + 512, "cluster_size=4k,data_file={tmp}/data"),
    "64k-data-file-raw": (24 * MIB + 512, "data_file={tmp}/data,data_file_raw=on,cluster_size=64k"),
    "64k-data-file-extended": (24 * MIB, "data_file={tmp}/data,extended_l2=on,cluster_size=64k"),
    "64k-v2": (24 * MIB, "cluster_size=64k,compat=0.10"),
}


def cluster_of(options):
    text = options.split("cluster_size=")[1].split(",")[0]
    return int(text.rstrip("kM")) * {"k": KIB, "M": MIB}.get(text[-1], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_turns_of_strata_and_qemu_io_agree_with_the_model(run, peer, strata, tmp_path,
                                                                 shape, seed):
    size, options = SHAPES[shape]
    image = tmp_path / "a.qcow2"
    run("create", "-q", "-f", "qcow2", "-o", options.format(tmp=tmp_path), image, size)
    model = Model(size, cluster_of(options), seed)
    model.codes = "data_file" not in options
    rare = "data_file" in options or "extended" in options  # crash and unit tests have them, too
    play(run, peer, strata, tmp_path, image, model, turns=2 if rare else TURNS)
    if "data_file_raw" in options:
        data = (tmp_path / "data").read_bytes()  # qemu-io may have written its last cluster whole
        assert data[:size] == model.bytes and not any(data[size:])


@pytest.mark.parametrize("shape", ["4k", "64k", "16k-extended", "64k-v2"])
def test_random_turns_over_a_shorter_backing_file_agree_with_the_model(run, peer, strata, tmp_path,
                                                                       shape, seed):
    size, options = SHAPES[shape]
    base, image = tmp_path / "base.raw", tmp_path / "a.qcow2"
    content = random.Random(seed).randbytes(size * 3 // 4 // 512 * 512 + 512)
    base.write_bytes(content)
    run("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "-o", options, image, size)
    play(run, peer, strata, tmp_path, image, Model(size, cluster_of(options), seed, content))


def test_random_turns_with_an_internal_snapshot_leave_the_snapshot_alone(run, peer, strata,
                                                                         tmp_path, seed):
    size, options = SHAPES["4k"]
    image, snapshot = tmp_path / "a.qcow2", tmp_path / "snapshot.raw"
    run("create", "-q", "-f", "qcow2", "-o", options, image, size)
    model = Model(size, 4 * KIB, seed)
    turn([strata, "io"], image, model, OPS)
    peer("qemu-img", "snapshot", "-c", "then", image)
    then = bytes(model.bytes)
    play(run, peer, strata, tmp_path, image, model)
    peer("qemu-img", "convert", "-l", "then", "-O", "raw", image, snapshot)
    assert snapshot.read_bytes() == then
