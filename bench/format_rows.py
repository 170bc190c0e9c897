# SPDX-License-Identifier: MIT
"""Rows about the formats but qcow2: conversion from and to each, reading compressed ones, info, memory.

add(b, d, raw): `b` is the bench (run.py): row, rows, medians, wanted, note, STRATA, GIB, ROUNDS.
"""
import os
import subprocess

WRITABLE = ["vdi", "qed", "qcow", "parallels", "vpc", "vhdx", "vmdk"]
BASELINE = "convert raw to qcow2 (for the formats)"
INFO_ROUNDS = 10


def known(b, fmt):
    """Whether this build has the format, to write it."""
    p = subprocess.run([b.STRATA, "create", "-f", fmt, "-o", "help"], capture_output=True, text=True)
    return p.returncode == 0


def add(b, d, raw):
    formats = [f for f in WRITABLE if known(b, f)]
    conversions(b, d, raw, formats)
    compressed(b, d, raw)
    tables(b, d)


def unlink(*names):
    for name in names:
        if os.path.exists(name):
            os.unlink(name)


def conversions(b, d, raw, formats):
    """Against qemu-img, and against our own raw to qcow2 in the same run: at most 1.2 times as long."""
    titles = [BASELINE] + ["convert raw to " + f for f in formats] + ["convert %s to raw" % f for f in formats]
    if not b.wanted(*titles):
        return
    out, kept = os.path.join(d, "out"), os.path.join(d, "kept")

    def convert(title, source, source_format, target):
        args = ["convert", "-f", source_format, "-O", target, source, out]
        b.row(title, [("strata", [b.STRATA, *args]),
                      ("qemu-img -W -m 16", ["qemu-img", *args[:1], "-W", "-m", "16", *args[1:]])],
              "1 x", prepare=lambda label: unlink(out))
        unlink(out)
        ours, base = (b.medians.get(t, {}).get("strata") for t in (title, BASELINE))
        if ours and base and title != BASELINE:
            b.rows.append((title + ": time / raw to qcow2", "", "", "%.2f x" % (ours / base), "<= 1.2 x"))

    convert(BASELINE, raw, "raw", "qcow2")
    for fmt in formats:
        convert("convert raw to " + fmt, raw, "raw", fmt)
    for fmt in formats:
        title = "convert %s to raw" % fmt
        if not b.wanted(title):
            continue
        subprocess.run([b.STRATA, "convert", "-q", "-f", "raw", "-O", fmt, raw, kept], check=True)
        convert(title, kept, fmt, "raw")
        b.row("info of a %s image" % fmt, [("strata", [b.STRATA, "info", "-f", fmt, kept]),
                                           ("qemu-img", ["qemu-img", "info", "-f", fmt, kept])],
              "1 x, 3 ms", rounds=INFO_ROUNDS)
        unlink(kept)


def compressed(b, d, raw):
    title = "convert cloop to raw"
    if not b.wanted(title):
        return
    image, part, out = (os.path.join(d, n) for n in ("cloop", "part", "out"))
    size = min(os.stat(raw).st_size, 512 << 20)
    try:
        with open(raw, "rb") as src, open(part, "wb") as dst:
            while dst.tell() < size:
                dst.write(src.read(1 << 20))
        subprocess.run(["create_compressed_fs", "-B", "262144", part, image], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        b.row(title, [("strata", [b.STRATA, "convert", "-f", "cloop", "-O", "raw", image, out]),
                      ("qemu-img", ["qemu-img", "convert", "-W", "-m", "16", "-f", "cloop", "-O", "raw", image, out]),
                      ("extract_compressed_fs", ["extract_compressed_fs", image, out])],
              "2 x", prepare=lambda label: unlink(out))
    except (OSError, subprocess.CalledProcessError) as e:
        b.note("  no cloop image here: %s" % e)
    unlink(image, part, out)


def tables(b, d):
    """Peak memory of a look at everything in images whose tables are as large as they get."""
    shapes = [("vdi", ["-o", "block_size=4k"], "256G"), ("qed", ["-o", "cluster_size=64k,table_size=16"], "64T"),
              ("parallels", ["-o", "cluster_size=64k"], "4T"), ("qcow", [], "256G")]
    for fmt, options, size in shapes:
        title = "memory: map and check of a %s disk of %s" % (fmt, size)
        if not b.wanted(title):
            continue
        image = os.path.join(d, "large")
        subprocess.run([b.STRATA, "create", "-q", "-f", fmt, *options, image, size], check=True)
        peak = 0
        for args in (["map", "--output=json"], ["check"]):
            if fmt == "qcow" and args == ["check"]:
                continue
            peak = max(peak, b.measure([b.STRATA, *args, "-f", fmt, image])[1])
        b.rows.append((title, "%.1f MiB" % (peak / 2**20) if peak else "ended within 20 ms", "", "-", "< 64 MiB"))
        b.note("  %s: %.1f MiB" % (title, peak / 2**20))
        unlink(image)
