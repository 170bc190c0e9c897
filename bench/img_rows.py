# SPDX-License-Identifier: MIT
"""Rows about the commands of qemu-img, and conversions where no disk is in the way.

add(b, d, raw, qcow2): `b` is the bench (run.py): row, rows, medians, wanted, note, STRATA, GIB, ROUNDS.
"""
import os
import shutil
import subprocess
import tempfile

MAP_TIB = os.environ.get("BENCH_MAP_TIB")  # size of the mapped image; 4, or 1 with one round


def add(b, d, raw, qcow2):
    compare_zlib(b, d, raw)
    big_image(b, d)
    commit_rebase(b, d, qcow2)
    in_memory(b, raw, qcow2)
    shared_blocks(b, d)


def compare_zlib(b, d, raw):
    title = "compare zlib qcow2 with its raw"
    if not b.wanted(title):
        return
    zlib = os.path.join(d, "zlib.qcow2")
    subprocess.run(["qemu-img", "convert", "-c", "-W", "-m", "16", "-O", "qcow2", raw, zlib], check=True)
    b.row(title, [("strata", [b.STRATA, "compare", raw, zlib]), ("qemu-img", ["qemu-img", "compare", raw, zlib])],
          "3 x")
    os.unlink(zlib)


def big_image(b, d):
    size = MAP_TIB or ("1" if b.ROUNDS == 1 else "4")
    titles = ["%s of %s TiB, all allocated" % (v, size) for v in ("map --output=json", "measure", "info")]
    if not b.wanted(*titles):
        return
    big = os.path.join(d, "mapped.qcow2")
    b.note("  making a mapped image of %s TiB" % size)
    subprocess.run([b.STRATA, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", big, size + "T"],
                   check=True)
    for title, args, reach in zip(titles, (["map", "--output=json"], ["measure", "-O", "qcow2"], ["info"]),
                                  ("3 x", "1 x", "1 x")):
        b.row(title, [("strata", [b.STRATA, *args, big]), ("qemu-img", ["qemu-img", *args, big])], reach,
              rounds=max(b.ROUNDS, 10) if "info" in title else b.ROUNDS)
    os.unlink(big)


def commit_rebase(b, d, qcow2):
    """An overlay that holds every fourth 256 KiB of a disk, against writing just these bytes and syncing them."""
    names = ("commit of every fourth 256 KiB", "rebase -b of such an overlay")
    if not b.wanted(*names):
        return
    piece, step = 256 << 10, 1 << 20
    disk_size = int(b.GIB * (1 << 30))
    kept_base, kept_over = os.path.join(d, "kept-base.qcow2"), os.path.join(d, "kept-over.qcow2")
    base, over, other = (os.path.join(d, n) for n in ("base.qcow2", "over.qcow2", "other.qcow2"))
    plain = os.path.join(d, "plain")
    changed = 0
    for name, every in ((kept_base, piece), (kept_over, step)):
        backing = ["-b", base, "-F", "qcow2"] if name == kept_over else []
        if backing:
            shutil.copyfile(kept_base, base)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, name, str(disk_size)], check=True)
        offsets = range(0, disk_size - piece + 1, every)
        script = "".join("write -q -P %d %d %d\n" % (i % 250 + 1 + bool(backing), at, piece)
                         for i, at in enumerate(offsets))
        subprocess.run(["qemu-io", "-f", "qcow2", name], input=script.encode(), stdout=subprocess.DEVNULL, check=True)
        changed = len(offsets) * piece
    subprocess.run(["cp", kept_base, other], check=True)  # the same content under another name

    def prepare(label):
        shutil.copyfile(kept_base, base)
        shutil.copyfile(kept_over, over)
        shutil.copyfile(kept_base, plain)
        for f in (base, over):
            with open(f, "rb") as handle:
                while handle.read(1 << 20):
                    pass

    writer = ("import os, sys; f = os.open(sys.argv[1], os.O_WRONLY); data = os.urandom(1 << 18)\n"
              "for at in range(0, %d, %d): os.pwrite(f, data, at)\n"
              "os.fdatasync(f)" % (disk_size - piece + 1, step))
    floor = ("dd of those bytes", ["/usr/bin/python3", "-c", writer, plain])
    verbs = ((names[0], ["commit", "-q", over]), (names[1], ["rebase", "-q", "-b", other, "-F", "qcow2", over]))
    for title, args in verbs:
        b.row(title, [("strata", [b.STRATA, *args]), ("qemu-img", ["qemu-img", *args]), floor], prepare=prepare)
        m = b.medians.get(title, {})
        if "strata" in m and floor[0] in m:
            b.rows.append((title + ": time / writing %d MiB" % (changed >> 20), "", "", "%.2f x" %
                           (m["strata"] / m[floor[0]]), "<= 1.15 x" if title == names[0] else "<= 1.15 x of what differs"))
    for f in (kept_base, kept_over, base, over, other, plain):
        os.unlink(f)


def memory_free(where):
    with open("/proc/meminfo") as f:
        available = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    s = os.statvfs(where)
    return min(available - (1 << 30), s.f_bavail * s.f_frsize)


def in_memory(b, raw, qcow2):
    """Source and target on tmpfs: what the program itself costs.  Nothing is synced there."""
    where = "/dev/shm"
    titles = ("convert raw to qcow2, in memory (%s)" % where, "convert qcow2 to raw, in memory (%s)" % where)
    if not b.wanted(*titles):
        return
    need = 2 * os.stat(raw).st_blocks * 512 + (256 << 20)
    if not os.path.isdir(where) or memory_free(where) < need:
        b.note("  no %d MiB free in %s: rows in memory left out" % (need >> 20, where))
        b.rows.append((titles[0].split(",")[0] + ", in memory", "left out: %d MiB are needed" % (need >> 20), "", "-", "2.5 x"))
        return
    shm = tempfile.mkdtemp(prefix="strata-bench.", dir=where)
    out = os.path.join(shm, "out")

    def fresh(label):
        if os.path.exists(out):
            os.unlink(out)

    def check(label):
        subprocess.run(["qemu-img", "compare", "-q", raw, out], check=True)

    try:
        for title, source, fmt in ((titles[0], raw, "qcow2"), (titles[1], qcow2, "raw")):
            inside = os.path.join(shm, "in")
            subprocess.run(["cp", "--sparse=always", source, inside], check=True)
            b.row(title, [("strata", [b.STRATA, "convert", "-O", fmt, inside, out]),
                          ("qemu-img -W -m 16", ["qemu-img", "convert", "-W", "-m", "16", "-O", fmt, inside, out]),
                          ("dd conv=sparse", ["dd", "if=" + inside, "of=" + out, "bs=1M", "conv=sparse",
                                              "status=none"])],
                  "2.5 x", prepare=fresh, after=lambda label: check(label) if label == "strata" else None)
            fresh(None)
            os.unlink(inside)
    finally:
        shutil.rmtree(shm, ignore_errors=True)


def shared_blocks(b, d):
    """On XFS with reflinks, by a loop device: a copy that moves nothing."""
    title = "convert raw to raw on XFS (blocks shared)"
    if not b.wanted(title):
        return
    image, mnt = os.path.join(d, "xfs"), os.path.join(d, "mnt")
    size = max(512 << 20, int(b.GIB * (1 << 30)))
    try:
        with open(image, "wb") as f:
            f.truncate(2 * size + (512 << 20))
        os.mkdir(mnt)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, mnt], check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        b.note("  no XFS here: %s" % e)
        return
    src, out = os.path.join(mnt, "in"), os.path.join(mnt, "out")
    try:
        with open(src, "wb") as f:
            block = os.urandom(1 << 20)
            for _ in range(size // 2 >> 20):
                f.write(block)

        def fresh(label):
            if os.path.exists(out):
                os.unlink(out)

        def check(label):
            p = subprocess.run(["filefrag", "-v", out], capture_output=True, text=True, check=True)
            b.note("  %-28s %-28s %s" % (title, label, "shared" if "shared" in p.stdout else "not shared"))

        b.row(title, [("strata", [b.STRATA, "convert", "-O", "raw", src, out]),
                      ("qemu-img -C", ["qemu-img", "convert", "-C", "-O", "raw", src, out]),
                      ("cp --reflink", ["cp", "--reflink=always", src, out])], prepare=fresh, after=check)
    finally:
        subprocess.run(["umount", mnt])
        os.unlink(image)
