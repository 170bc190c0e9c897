# SPDX-License-Identifier: MIT
"""OpenStack's image parser (Debian: python3-oslo.utils) reads our info, in both forms and under both
names, as it reads qemu-img's."""
import os
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from oslo_utils import imageutils

FIELDS = ["backing_file", "backing_file_format", "cluster_size", "disk_size", "encrypted",
          "file_format", "format_specific", "image", "snapshots", "virtual_size"]


def parsed(text, form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        i = imageutils.QemuImgInfo(text, format="json" if form == "json" else "human")
    return {f: getattr(i, f, None) for f in FIELDS}


@pytest.fixture(scope="module")
def images(peer, create_luks, tmp_path_factory):
    d = tmp_path_factory.mktemp("oslo")
    peer("qemu-img", "create", "-q", "-f", "raw", d / "raw", "3M")
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", d / "overlay")
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", d / "old", "5G")
    create_luks(d / "luks")
    return d


@pytest.mark.parametrize("name", ["strata", "qemu-img"])
@pytest.mark.parametrize("form", ["human", "json"])
@pytest.mark.parametrize("image", ["raw", "overlay", "old", "luks"])
def test_oslo_utils_reads_info(strata, peer, images, tmp_path, image, form, name):
    program = tmp_path / name
    program.symlink_to(os.path.abspath(strata))
    theirs = peer("qemu-img", "info", f"--output={form}", images / image).stdout
    ours = peer(str(program), "info", f"--output={form}", images / image).stdout
    assert parsed(ours, form) == parsed(theirs, form)
