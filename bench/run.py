# SPDX-License-Identifier: MIT
"""strata beside its peers, in one table.

Every row runs its contenders in turn, round after round, on the same input with the page cache
warm, and compares medians.  The ratio of times is the best peer's over strata's, dd apart, which
shows the limit; that of server CPU is strata's over the best peer's, since that is what `reach`
bounds.  Nothing here passes or fails: figures are for reading.

Input, made on the spot: an ext4 file system populated from this machine's /usr and from generated
text and random bytes, as raw and as qcow2.

    BENCH_GIB=4         data in the file system
    BENCH_ROUNDS=3      rounds a row
    BENCH_SECONDS=2     of load for each NBD figure
    BENCH_DIR=/var/tmp  where the images go (about five times BENCH_GIB)
    BENCH_ONLY=TEXT     rows whose name contains TEXT
    BENCH_SKIP_SLOW=1   leave out qemu-img's slow default modes
    BENCH_MAP_TIB=4     the fully mapped image of the map, measure and info rows (1 with one round)
"""
import json
import os
import random
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import format_rows
import export_rows
import img_rows

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(ROOT, os.environ.get("BUILD", "build"))
STRATA = os.environ.get("STRATA") or os.path.join(BUILD, "src/strata")
LOAD = os.path.join(BUILD, "bench/nbd_load")
FLOOR = os.path.join(BUILD, "bench/nbd_floor")
GIB = float(os.environ.get("BENCH_GIB", "4"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
SECONDS = float(os.environ.get("BENCH_SECONDS", "2"))
ONLY = os.environ.get("BENCH_ONLY", "")
SKIP_SLOW = os.environ.get("BENCH_SKIP_SLOW", "") not in ("", "0")
os.environ["PATH"] += ":/sbin:/usr/sbin"
os.environ.pop("STRATA_AIO", None)

rows = []     # (work, strata, peers, ratio, reach)
medians = {}  # work: {label: seconds}


def note(text):
    print(text, file=sys.stderr, flush=True)


def wanted(*titles):
    return not ONLY or any(ONLY in t for t in titles)


# ---------------------------------------------------------------- measuring one command

def measure(cmd):
    """Runs cmd; (seconds, peak resident bytes).  A failing contender ends the row."""
    null = os.open(os.devnull, os.O_RDWR)
    errors = tempfile.TemporaryFile()
    start = time.perf_counter()
    pid = os.posix_spawnp(cmd[0], cmd, os.environ, file_actions=[
        (os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1),
        (os.POSIX_SPAWN_DUP2, errors.fileno(), 2)])
    os.close(null)
    pidfd = os.pidfd_open(pid)
    peak = 0
    while True:
        ended = select.select([pidfd], [], [], 0.02)[0]
        took = time.perf_counter() - start
        if ended:
            break
        peak = max(peak, high_water(pid))
    os.close(pidfd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        errors.seek(0)
        raise RuntimeError("%s: status %d: %s" % (" ".join(cmd), status,
                                                  errors.read(400).decode(errors="replace")))
    return took, peak


def high_water(pid):
    """Peak resident size of the program itself (VmHWM: not that of whoever started it)."""
    try:
        with open("/proc/%d/status" % pid) as f:
            for line in f:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def show(seconds):
    return "%.2f s" % seconds if seconds >= 1 else "%.2f ms" % (seconds * 1e3)


def row(work, contenders, reach="", prepare=None, after=None, rounds=ROUNDS):
    """contenders: [(label, command)], strata first; prepare(label) runs untimed before each."""
    if ONLY and ONLY not in work:
        return {}
    times = {label: [] for label, _ in contenders}
    peaks = {label: 0 for label, _ in contenders}
    failed = {}
    for r in range(rounds):
        for label, cmd in contenders:
            if label in failed:
                continue
            if prepare:
                prepare(label)
            os.sync()
            try:
                took, peak = measure(cmd)
                if after and r == 0:
                    after(label)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as e:
                note("  " + str(e))
                failed[label] = str(e)
                continue
            times[label].append(took)
            peaks[label] = max(peaks[label], peak)
            if r < 5:
                note("  %-28s %-28s %s" % (work, label, show(took)))
    medians[work] = {k: statistics.median(v) for k, v in times.items() if v}
    report(work, medians[work], failed, reach)
    return peaks


def report(work, medians, failed, reach):
    peers = {k: v for k, v in medians.items() if k != "strata"}
    ours = medians.get("strata")
    rivals = [v for k, v in peers.items() if not k.startswith("dd ")]  # dd shows the limit
    best = min(rivals) if rivals else None
    rows.append((work, show(ours) if ours else "failed",
                 "; ".join(["%s %s" % (k, show(v)) for k, v in peers.items()] +
                           ["%s failed" % k for k in failed if k != "strata"]),
                 "%.2f x" % (best / ours) if ours and best else "-", reach))


# ---------------------------------------------------------------- the input

def populate(tree, total):
    """Half from /usr (programs, libraries, documents), the rest text and random bytes."""
    left = total // 2
    for base in ("/usr/lib", "/usr/share", "/usr/bin", "/usr/include"):
        for folder, _, files in os.walk(base):
            into = os.path.join(tree, os.path.relpath(folder, "/"))
            for name in files:
                src = os.path.join(folder, name)
                try:
                    if os.path.islink(src) or not os.path.isfile(src):
                        continue
                    size = os.path.getsize(src)
                    if size > left:
                        continue
                    os.makedirs(into, exist_ok=True)
                    shutil.copyfile(src, os.path.join(into, name))
                except OSError:
                    continue
                left -= size
            if left < 1 << 20:
                break
    rng = random.Random(20240229)
    words = [rng.randbytes(rng.randint(1, 5)).hex() for _ in range(4000)]
    left += total - total // 2
    n = 0
    os.makedirs(os.path.join(tree, "generated"))
    while left > 0:
        chunk = min(left, 64 << 20)
        with open(os.path.join(tree, "generated", "%03d" % n), "wb") as f:
            if n % 4 == 3:
                f.write(rng.randbytes(chunk))
            else:
                line = " ".join(rng.choices(words, k=200000)).encode() + b"\n"
                while f.tell() < chunk:
                    f.write(b"%d " % rng.getrandbits(64) + line[rng.randrange(1 << 18):])
                f.truncate(chunk)
        left -= chunk
        n += 1


def make_input(d):
    raw = os.path.join(d, "input.raw")
    tree = os.path.join(d, "tree")
    os.mkdir(tree)
    note("making the input: %.1f GiB of files" % GIB)
    populate(tree, int(GIB * (1 << 30)))
    size = int(GIB * 1.5 * 1024)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, raw, "%dM" % size], check=True,
                   stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    qcow2 = os.path.join(d, "input.qcow2")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-W", "-m", "16", raw, qcow2], check=True)
    for f in (raw, qcow2):
        subprocess.run(["cat", f], stdout=subprocess.DEVNULL, check=True)
    note("  %d MiB of data in %d MiB" % (os.stat(raw).st_blocks >> 11, size))
    return raw, qcow2


# ---------------------------------------------------------------- conversions

def conversions(d, raw, qcow2):
    out = os.path.join(d, "out")
    sizes = {}

    def fresh(label):
        if os.path.exists(out):
            os.unlink(out)

    def check(label):
        if label == "strata":
            subprocess.run(["qemu-img", "compare", "-q", raw, out], check=True)

    def convert(work, src, fmt, extra=(), reach="", others=(), slow=True, sized=False, cache=()):
        # qemu-img's own default is not to sync what it wrote (-t unsafe), strata's is to sync it,
        # and to choose direct or cached writes for that; so synced strata runs without -t.
        qemu = ["qemu-img", "convert", *cache, *extra]
        mine = cache if "unsafe" in cache else ()
        peers = [("qemu-img -W -m 16", [*qemu, "-W", "-m", "16", "-O", fmt, src, out])]
        if slow and not SKIP_SLOW:
            peers.append(("qemu-img", [*qemu, "-O", fmt, src, out]))
        key = [None]

        def after(label):
            check(label)
            sizes[(work, label)] = os.stat(out).st_blocks * 512

        peaks = row(work, [("strata", [STRATA, "convert", *mine, *extra, "-O", fmt, src, out])] + peers +
                    list(others), reach, prepare=fresh, after=after)
        fresh(key)
        if peaks and peaks.get("strata"):
            rows.append((work + ": peak memory", "%.1f MiB" % (peaks["strata"] / 2**20),
                         "; ".join("%s %.1f MiB" % (k, v / 2**20) for k, v in peaks.items()
                                   if k.startswith("qemu") and v), "-", "< 64 MiB"))
        if sized and (work, "strata") in sizes:
            peer = next((v for (w, k), v in sizes.items() if w == work and k.startswith("qemu")), 0)
            ours = sizes[(work, "strata")]
            rows.append((work + ": output size", "%d MiB" % (ours >> 20),
                         "qemu-img %d MiB" % (peer >> 20),
                         "%+.1f %%" % (100 * (ours / peer - 1)) if peer else "-", "<= +12 %" if
                         "zlib" in work else ""))

    dd = ["dd", "if=" + raw, "of=" + out, "bs=1M", "status=none"]
    for name, cache, conv in (("not synced", ["-t", "unsafe"], "conv=sparse"),
                              ("synced", ["-t", "writeback"], "conv=sparse,fsync")):
        limits = [("dd " + conv, dd + [conv])]
        convert("convert raw to qcow2, " + name, raw, "qcow2", reach="2.5 x", others=limits,
                cache=cache, slow=False)
        convert("convert qcow2 to raw, " + name, qcow2, "raw", reach="2.5 x", others=limits,
                cache=cache, slow=False)
    convert("convert -c (zlib)", raw, "qcow2", ["-c"], reach="6 x qemu-img's default", sized=True)
    convert("convert -c (zstd)", raw, "qcow2", ["-c", "-o", "compression_type=zstd"],
            reach="1.3 x -m 16", sized=True, slow=False)
    if wanted("convert zlib qcow2 to raw"):
        zlib = os.path.join(d, "zlib.qcow2")
        subprocess.run(["qemu-img", "convert", "-c", "-W", "-m", "16", "-O", "qcow2", raw, zlib],
                       check=True)
        convert("convert zlib qcow2 to raw", zlib, "raw", reach="1.8 x")
        os.unlink(zlib)
    row("compare raw with qcow2", [("strata", [STRATA, "compare", raw, qcow2]),
                                   ("qemu-img", ["qemu-img", "compare", raw, qcow2])])


def metadata(d):
    big = os.path.join(d, "big.qcow2")
    if not ONLY or any(ONLY in w for w in ("check of 1 TiB", "map of 1 TiB")):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata",
                        big, "1T"], check=True)
        subprocess.run(["qemu-img", "check", "-q", big])
        row("check of 1 TiB, all allocated", [("strata", [STRATA, "check", big]),
                                              ("qemu-img", ["qemu-img", "check", big])])
        row("map of 1 TiB, all allocated",
            [("strata", [STRATA, "map", "--output=json", big]),
             ("qemu-img", ["qemu-img", "map", "--output=json", big])])
        os.unlink(big)
    small = os.path.join(d, "small.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", small, "1G"], check=True)
    row("info", [("strata", [STRATA, "info", small]), ("qemu-img", ["qemu-img", "info", small])],
        "<= 2.5 ms", rounds=max(ROUNDS, 40))


def snapshots(d):
    """Internal snapshots of 4 TiB, all allocated: 640 MiB of tables to rewrite; one round."""
    create, delete = "snapshot create, 4 TiB all allocated", "snapshot delete, 4 TiB all allocated"
    if ONLY and not any(ONLY in w for w in (create, delete)):
        return
    big = os.path.join(d, "snapshots.qcow2")
    subprocess.run([STRATA, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", big, "4T"],
                   check=True)

    def without(label):
        subprocess.run([STRATA, "snapshot", "-d", "x", big], stderr=subprocess.DEVNULL)

    def having(label):
        without(label)
        subprocess.run([STRATA, "snapshot", "-c", "x", big], check=True)

    for work, action, prepare in (create, "-c", without), (delete, "-d", having):
        peaks = row(work, [("strata", [STRATA, "snapshot", action, "x", big]),
                           ("qemu-img", ["qemu-img", "snapshot", action, "x", big])],
                    ">= 20 x", prepare=prepare, rounds=1)
        if peaks:
            rows.append((work + ": peak memory", "%.1f MiB" % (peaks["strata"] / 2**20),
                         "qemu-img %.1f MiB" % (peaks["qemu-img"] / 2**20), "-", "< 64 MiB"))
    os.unlink(big)


def checks(d):
    """check of 4 TiB, all allocated, without and with a snapshot; and what the checks of every write
    cost: scattered writes (a step that no cluster size divides) with them and without."""
    works = ["check of 4 TiB, all allocated", "check of 4 TiB, all allocated, with a snapshot"]
    overlap = "scattered allocating writes, overlap checks on (peer: off)"
    if ONLY and not any(ONLY in w for w in works + [overlap]):
        return
    big = os.path.join(d, "checks.qcow2")
    subprocess.run([STRATA, "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", big, "4T"],
                   check=True)
    for work in works:
        if work != works[0]:
            subprocess.run([STRATA, "snapshot", "-c", "x", big], check=True)
        peaks = row(work, [("strata", [STRATA, "check", big]),
                           ("qemu-img", ["qemu-img", "check", big])], ">= 5 x", rounds=min(ROUNDS, 3))
        if peaks:
            rows.append((work + ": peak memory", "%.1f MiB" % (peaks["strata"] / 2**20),
                         "qemu-img %.1f MiB" % (peaks["qemu-img"] / 2**20), "-", "< 72 MiB"))
    os.unlink(big)

    def fresh(label):
        subprocess.run([STRATA, "create", "-q", "-f", "qcow2", big, "16G"], check=True)

    def write(mode):
        image = {"driver": "qcow2", "overlap-check": mode,
                 "file": {"driver": "file", "filename": big}}
        return [STRATA, "bench", "-q", "-w", "-t", "unsafe", "-c", "60000", "-s", "4k", "-S", "260k",
                "json:" + json.dumps(image)]

    row(overlap, [("strata", write("cached")), ("strata, overlap-check=none", write("none"))],
        ">= 0.95 x", prepare=fresh)
    os.unlink(big)


# ---------------------------------------------------------------- NBD

class Server:
    """A server on a unix socket, ready when the greeting has arrived; .ready is how long that took.

    Without `greets` it is ready when it accepts connections."""

    def __init__(self, d, label, command, greets=True):
        self.path = os.path.join(d, "sock")
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.errors = tempfile.TemporaryFile()
        start = time.perf_counter()
        self.process = subprocess.Popen([a.replace("SOCK", self.path) for a in command],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=self.errors)
        while True:
            with socket.socket(socket.AF_UNIX) as s:
                try:
                    s.connect(self.path)
                    if greets:
                        s.recv(18)
                    self.ready = time.perf_counter() - start
                    return
                except OSError:
                    pass
            if self.process.poll() is not None or time.perf_counter() - start > 20:
                self.errors.seek(0)
                self.stop()
                raise RuntimeError("%s: no server: %s" % (label, self.errors.read(400).decode()))
            time.sleep(0.0002)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def strata_serve(fmt, image, *extra):
    return [STRATA, "serve", "--socket", "SOCK", "--persistent", "-f", fmt, *extra, image]


def qemu_nbd(aio, fmt, image, *extra):
    return ["qemu-nbd", "-k", "SOCK", "-t", "-e", "100", "--aio=" + aio, "--cache=writeback",
            "-f", fmt, *extra, image]


def nbd_rows(d, raw, qcow2):
    """One file system image, five loads; per figure the median of alternating rounds."""
    work = os.path.join(d, "nbd.qcow2")
    work_raw = os.path.join(d, "nbd.raw")
    loads = [("4 KiB random read, depth 1", ["-r", "-d", "1", "-b", "4096"]),
             ("4 KiB random read, depth 32", ["-r", "-d", "32", "-b", "4096"]),
             ("4 KiB random write, depth 1", ["-w", "-d", "1", "-b", "4096"]),
             ("4 KiB random write, depth 32", ["-w", "-d", "32", "-b", "4096"]),
             ("256 KiB sequential read, depth 32", ["-r", "-s", "-d", "32", "-b", "262144"]),
             ("256 KiB sequential write, depth 32", ["-w", "-s", "-d", "32", "-b", "262144"])]
    groups = [
        # The floor serves the raw image whatever the group is: what sockets and file system cost.
        ("qcow2", qcow2, work, [("strata", strata_serve("qcow2", work)), ("floor", [FLOOR, "SOCK", work_raw]),
                                ("qemu-nbd threads", qemu_nbd("threads", "qcow2", work)),
                                ("qemu-nbd io_uring", qemu_nbd("io_uring", "qcow2", work))]),
        ("raw", raw, work_raw, [("strata", strata_serve("raw", work_raw)), ("floor", [FLOOR, "SOCK", work_raw]),
                                ("qemu-nbd threads", qemu_nbd("threads", "raw", work_raw)),
                                ("qemu-nbd io_uring", qemu_nbd("io_uring", "raw", work_raw)),
                                ("nbdkit file", ["nbdkit", "-f", "-U", "SOCK", "file", work_raw])]),
        ("overlay", raw, work_raw, [("strata", strata_serve("raw", work_raw, "--snapshot")),
                                    ("floor", [FLOOR, "SOCK", work_raw]),
                                    ("qemu-nbd -s", qemu_nbd("io_uring", "raw", work_raw, "-s")),
                                    ("nbdkit cow", ["nbdkit", "-f", "-U", "SOCK", "--filter=cow",
                                                    "file", work_raw])])]
    for group, source, copy, servers in groups[::-1]:
        if ONLY and not any(ONLY in "NBD %s, %s" % (group, name) for name, _ in loads):
            continue
        shutil.copyfile(source, copy)
        for name, args in loads:
            title = "NBD %s, %s" % (group, name)
            if ONLY and ONLY not in title:
                continue
            nbd_row(d, title, servers, args)
        os.unlink(copy)


def nbd_row(d, title, servers, args, load=LOAD, greets=True, reach=None):
    """`reach`: what is aimed at for requests/s and for server CPU."""
    figures = {label: [] for label, _ in servers}
    failed = set()
    for _ in range(ROUNDS):
        for label, command in servers:
            if label in failed:
                continue
            os.sync()
            try:
                server = Server(d, label, command, greets)
            except RuntimeError as e:
                note("  " + str(e))
                failed.add(label)
                continue
            try:
                p = subprocess.run([load, "--socket", server.path, "--json", "-t", str(SECONDS),
                                    "--pid", str(server.process.pid), *args],
                                   capture_output=True, text=True, timeout=60 + SECONDS)
            finally:
                server.stop()
            if p.returncode:
                note("  %s: %s" % (label, p.stderr.strip()))
                failed.add(label)
                continue
            figures[label].append(json.loads(p.stdout))
            note("  %-46s %-18s %s" % (title, label, p.stdout.strip()))
    iops = {k: statistics.median(f["iops"] for f in v) for k, v in figures.items() if v}
    cpu = {k: statistics.median(f["server_us"] for f in v) for k, v in figures.items() if v}

    def line(what, values, best, ratio, unit, reach):
        peers = {k: v for k, v in values.items() if k != "strata"}
        ours = values.get("strata")
        rows.append((title + ": " + what, unit % ours if ours else "failed",
                     "; ".join(["%s %s" % (k, unit % v) for k, v in peers.items()] +
                               ["%s failed" % k for k in failed if k != "strata"]),
                     "%.2f x" % ratio(ours, best(peers.values())) if ours and peers else "-", reach))

    if reach is None:
        reach = ("", "<= 0.6 x" if "qcow2, 4 KiB random read, depth 32" in title else "")
    line("requests/s", iops, max, lambda o, p: o / p, "%.0f", reach[0])
    line("server CPU", cpu, min, lambda o, p: o / p, "%.2f us", reach[1])


def serve_ready(d, qcow2):
    title = "serve: ready for a client"
    if ONLY and ONLY not in title:
        return
    times = {"strata": [], "qemu-nbd": [], "nbdkit": []}
    commands = {"strata": strata_serve("qcow2", qcow2), "qemu-nbd": qemu_nbd("threads", "qcow2", qcow2),
                "nbdkit": ["nbdkit", "-f", "-U", "SOCK", "file", qcow2]}
    failed = {}
    for _ in range(max(ROUNDS, 10)):
        for label, command in commands.items():
            if label in failed:
                continue
            try:
                server = Server(d, label, command)
            except RuntimeError as e:
                note("  " + str(e))
                failed[label] = str(e)
                continue
            times[label].append(server.ready)
            server.stop()
    report(title, {k: statistics.median(v) for k, v in times.items() if v}, failed, "<= 10 ms")


def serve_memory(d):
    title = "serve 1 TiB: peak memory"
    if ONLY and ONLY not in title:
        return
    big = os.path.join(d, "big.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", big,
                    "1T"], check=True)
    peaks = {}
    for label, command in (("strata", strata_serve("qcow2", big)),
                           ("qemu-nbd", qemu_nbd("threads", "qcow2", big))):
        try:
            server = Server(d, label, command)
        except RuntimeError as e:
            note("  " + str(e))
            continue
        subprocess.run([LOAD, "--socket", server.path, "-r", "-d", "32", "-b", "4096", "-t",
                        str(SECONDS)], stdout=subprocess.DEVNULL)
        peaks[label] = high_water(server.process.pid)
        server.stop()
    os.unlink(big)
    rows.append((title, "%.1f MiB" % (peaks["strata"] / 2**20) if "strata" in peaks else "failed",
                 "; ".join("%s %.1f MiB" % (k, v / 2**20) for k, v in peaks.items() if k != "strata"),
                 "-", "< 64 MiB"))


# ---------------------------------------------------------------- the table

def table():
    head = ("work", "strata", "peers", "ratio", "reach")
    lines = ["# strata beside its peers", "",
             "%.1f GiB of data, %d rounds, medians, %d processors, page cache warm, %s" %
             (GIB, ROUNDS, len(os.sched_getaffinity(0)), os.uname().release), "",
             "Times: best peer / strata (more is better).  Requests: strata / best peer (more is "
             "better).  CPU: strata / best peer (less is better).", "",
             "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(r) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def main():
    d = tempfile.mkdtemp(prefix="strata-bench.", dir=os.environ.get("BENCH_DIR", "/var/tmp"))
    try:
        raw, qcow2 = make_input(d)
        serve_ready(d, qcow2)
        serve_memory(d)
        conversions(d, raw, qcow2)
        metadata(d)
        snapshots(d)
        checks(d)
        img_rows.add(sys.modules[__name__], d, raw, qcow2)
        format_rows.add(sys.modules[__name__], d, raw)
        nbd_rows(d, raw, qcow2)
        export_rows.add(sys.modules[__name__], d, raw, qcow2)
    finally:
        shutil.rmtree(d, ignore_errors=True)
        text = table()
        with open(os.path.join(BUILD, "bench.md"), "w") as f:
            f.write(text)
        print(text)


main()
