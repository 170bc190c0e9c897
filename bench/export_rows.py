# SPDX-License-Identifier: MIT
"""Rows about the other ways to a disk: vhost-user-blk and FUSE, beside qemu-storage-daemon's.

add(b, d, raw, qcow2): `b` is the bench (run.py).
"""
import json
import os
import shutil
import statistics
import subprocess
import time


def add(b, d, raw, qcow2):
    vhost(b, d, qcow2)
    fuse(b, d, qcow2)


def daemon(image, export):
    return ["qemu-storage-daemon", "--blockdev", "file,node-name=f,filename=%s,aio=io_uring" % image,
            "--blockdev", "qcow2,node-name=q,file=f", "--export", export]


def vhost(b, d, qcow2):
    loads = [("4 KiB random read, depth 1", ["-r", "-d", "1", "-b", "4096"]),
             ("4 KiB random read, depth 32", ["-r", "-d", "32", "-b", "4096"]),
             ("4 KiB random write, depth 32", ["-w", "-d", "32", "-b", "4096"]),
             ("256 KiB sequential read, depth 32", ["-r", "-s", "-d", "32", "-b", "262144"])]
    titles = ["vhost-user-blk qcow2, " + name for name, _ in loads]
    if not b.wanted(*titles):
        return
    work = os.path.join(d, "vhost.qcow2")
    shutil.copyfile(qcow2, work)
    servers = [("strata", [b.STRATA, "serve", "--vhost-user", "SOCK", "-t", "-f", "qcow2", work]),
               ("qemu-storage-daemon",
                daemon(work, "vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path=SOCK,writable=on"))]
    load = os.path.join(b.BUILD, "bench/vhost_load")
    for title, (_, args) in zip(titles, loads):
        if b.wanted(title):
            b.nbd_row(d, title, servers, args, load=load, greets=False, reach=(">= 2 x", "<= 0.5 x"))
    os.unlink(work)


def fio(path, seconds, args):
    p = subprocess.run(["fio", "--name=x", "--filename=" + path, "--ioengine=psync", "--time_based", "--allow_file_create=0",
                        "--runtime=%s" % seconds, "--output-format=json", "--group_reporting", *args],
                       capture_output=True, text=True, check=True)
    job = json.loads(p.stdout)["jobs"][0]
    return job["read"]["iops"] + job["write"]["iops"]


def fuse(b, d, qcow2):
    loads = [("1 MiB sequential read", ["--rw=read", "--bs=1m", "--direct=1"]),
             ("4 KiB random read, 8 at once", ["--rw=randread", "--bs=4k", "--direct=1", "--numjobs=8"]),
             ("4 KiB random write, 8 at once", ["--rw=randwrite", "--bs=4k", "--direct=1", "--numjobs=8"])]
    titles = ["FUSE qcow2, " + name for name, _ in loads]
    if not b.wanted(*titles):
        return
    work, point = os.path.join(d, "fuse.qcow2"), os.path.join(d, "fuse.disk")
    shutil.copyfile(qcow2, work)
    open(point, "w").close()
    commands = {"strata": [b.STRATA, "mount", "--foreground", "--write", "-f", "qcow2", work, point],
                "qemu-storage-daemon": daemon(work, "fuse,id=e,node-name=q,writable=on,mountpoint=" + point)}
    for title, (_, args) in zip(titles, loads):
        if not b.wanted(title):
            continue
        figures = {label: [] for label in commands}
        for _ in range(b.ROUNDS):
            for label, command in commands.items():
                os.sync()
                server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
                try:
                    end = time.monotonic() + 20
                    while not os.path.getsize(point):
                        assert time.monotonic() < end and server.poll() is None, label
                        time.sleep(0.01)
                    figures[label].append(fio(point, b.SECONDS, args))
                finally:
                    server.terminate()
                    server.wait()
        medians = {label: statistics.median(v) for label, v in figures.items()}
        peer = medians["qemu-storage-daemon"]
        b.rows.append((title + ": requests/s", "%.0f" % medians["strata"], "qemu-storage-daemon %.0f" % peer,
                       "%.2f x" % (medians["strata"] / peer), ""))
    os.unlink(work)
    os.unlink(point)
