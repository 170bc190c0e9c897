# SPDX-License-Identifier: MIT
"""kill -9 at random moments while a client writes through `strata serve` to a qcow2 image.

After each kill an independent program looks at what is left: `qemu-img check` may find leaks but
nothing worse, and every block reads as the last write that a completed flush covered, or as any later write
to it.  The killed server's page cache survives it, so this tests what the process may leave half done, not
what a power cut may reorder.

The image lives on through several kills (each server opens what the one before it left); the model
is then taken from what is really there.  Seeds are printed; STRATA_KILLS sets the number of kills
in all, STRATA_KILL_SEED replays one image.
"""
import gc
import os
import random
import signal
import subprocess
import threading
import time

import nbd
import pytest

BLOCK = 4096
DISK = 16 << 20
BLOCKS = DISK // BLOCK
DEPTH = 16
KILLS_PER_IMAGE = 50
IMAGES = max(1, int(os.environ.get("STRATA_KILLS", "500")) // KILLS_PER_IMAGE)
SEEDS = ([int(os.environ["STRATA_KILL_SEED"])] if "STRATA_KILL_SEED" in os.environ
         else [random.SystemRandom().randrange(1 << 30) for _ in range(IMAGES)])
SHAPES = [(65536, ""), (4096, ""), (512, ""), (2 << 20, ""), (65536, ",refcount_bits=1"),
          (16384, ",refcount_bits=64"), (4096, ",compat=0.10")]


class Model:
    """What each block may read as.

    history[b] is every version ever sent to block b, in order (requests on one block are never in
    flight together); durable[b] is the index of the newest one that a completed flush covered.  Everything from
    there on is allowed.  A version is a number; 0 is zeros.
    """

    def __init__(self):
        self.history = [[0] for _ in range(BLOCKS)]
        self.durable = [0] * BLOCKS
        self.version = 0

    def block(self, version):
        return version.to_bytes(8, "little") * (BLOCK // 8) if version else bytes(BLOCK)

    def send(self, blocks, zero):
        if not zero:
            self.version += 1
        v = 0 if zero else self.version
        for b in blocks:
            self.history[b].append(v)
        return v

    def verify(self, raw, atom):
        """`atom`: what one write may be torn into when nothing was flushed: a cluster, at most a block."""
        for b in range(BLOCKS):
            block = raw[b * BLOCK:(b + 1) * BLOCK]
            allowed = self.history[b][self.durable[b]:]
            seen = []
            for at in range(0, BLOCK, atom):
                part = block[at:at + atom]
                v = int.from_bytes(part[:8], "little")
                assert part == self.block(v)[:atom], f"block {b} is torn at {at}, version {v}"
                assert v in allowed, f"block {b} + {at} reads as {v}, allowed {allowed}"
                if v not in seen:
                    seen.append(v)
            self.history[b] = seen
            self.durable[b] = 0


def start_server(strata, image, sock):
    p = subprocess.Popen([strata, "serve", "-f", "qcow2", "--socket", sock, "--discard=unmap",
                          "--persistent", image],
                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE)
    for _ in range(2000):
        if os.path.exists(sock):
            try:
                h = nbd.NBD()
                h.connect_unix(sock)
                return p, h
            except nbd.Error:
                pass
        assert p.poll() is None, p.stderr.read().decode()
        time.sleep(0.002)
    p.kill()
    raise AssertionError("the server did not come up")


def check_when_unlocked(peer, image):
    """The kernel ends a killed process's last requests, and with them its locks, a moment later."""
    for _ in range(400):
        p = peer("qemu-img", "check", "-f", "qcow2", image, status=None)
        if "lock" not in p.stderr:
            break
        time.sleep(0.005)
    return p


class Client:
    """Random requests, DEPTH of them in flight, none overlapping another in flight."""

    def __init__(self, handle, model, rnd):
        self.h, self.model, self.rnd = handle, model, rnd
        self.flushes = 0
        self.busy = set()
        self.in_flight = {}  # cookie -> what to do when it completes
        self.acked = {}      # block -> index in its history of the last acknowledged write

    def send_flush(self):
        covered = dict(self.acked)  # what was acknowledged before it was sent

        def done():
            self.flushes += 1
            for b, i in covered.items():
                self.model.durable[b] = max(self.model.durable[b], i)

        self.in_flight[self.h.aio_flush()] = done

    def send_write(self, r):
        count = self.rnd.choice([1, 1, 1, 2, 3, 8, 16, 40])
        first = self.rnd.randrange(BLOCKS - count)
        blocks = range(first, first + count)
        if self.busy.intersection(blocks):
            return
        self.busy.update(blocks)
        zero, fua = r < 0.12, r > 0.98
        v = self.model.send(blocks, zero)
        index = {b: len(self.model.history[b]) - 1 for b in blocks}

        def done():
            self.acked.update(index)
            if fua:
                for b, i in index.items():
                    self.model.durable[b] = max(self.model.durable[b], i)
            self.busy.difference_update(blocks)

        if zero:
            flags = self.rnd.choice([0, nbd.CMD_FLAG_NO_HOLE])
            cookie = self.h.aio_zero(count * BLOCK, first * BLOCK, flags=flags)
        else:
            data = nbd.Buffer.from_bytearray(bytearray(self.model.block(v) * count))
            cookie = self.h.aio_pwrite(data, first * BLOCK, flags=nbd.CMD_FLAG_FUA if fua else 0)
        self.in_flight[cookie] = done

    def turn(self):
        for _ in range(DEPTH - len(self.in_flight)):
            r = self.rnd.random()
            if r < 0.06:
                self.send_flush()
            else:
                self.send_write(r)
        self.h.poll(10)
        cookie = self.h.aio_peek_command_completed()
        while cookie > 0:
            self.h.aio_command_completed(cookie)
            self.in_flight.pop(cookie)()
            cookie = self.h.aio_peek_command_completed()

    def run(self):
        try:
            while True:
                self.turn()
        except nbd.Error:
            pass  # the server is gone


@pytest.mark.parametrize("seed", SEEDS, ids=lambda s: "image")
def test_kill9_leaves_leaks_at_most_and_keeps_what_was_flushed(strata, run, peer, tmp_path, seed):
    rnd = random.Random(seed)
    cluster, more = SHAPES[seed % len(SHAPES)]
    shape = f"cluster_size={cluster}{more}"
    print(f"seed {seed}: {shape}")
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    run("create", "-f", "qcow2", "-o", shape, image, str(DISK))
    model = Model()
    flushes = 0
    for kill in range(KILLS_PER_IMAGE):
        sock = f"{tmp_path}/s{kill}"
        server, handle = start_server(strata, image, sock)
        client = Client(handle, model, rnd)
        timer = threading.Timer(rnd.uniform(0.001, 0.06), os.kill, (server.pid, signal.SIGKILL))
        timer.start()
        client.run()
        timer.join()
        assert server.wait() == -signal.SIGKILL, server.stderr.read().decode()
        server.stderr.close()
        flushes += client.flushes
        # The buffers of a broken connection are held by C code and in a ring of references here.
        client.in_flight.clear()
        del client, handle
        gc.collect()
        where = f"seed {seed}, kill {kill}"
        checked = check_when_unlocked(peer, image)
        assert checked.returncode in (0, 3), f"{where}:\n{checked.stdout}{checked.stderr}"
        peer("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
        try:
            model.verify(raw.read_bytes(), min(cluster, BLOCK))
        except AssertionError as e:
            raise AssertionError(f"{where}: {e}") from None
    assert flushes > 0, "no flush ever completed: the test showed nothing"
