# SPDX-License-Identifier: MIT
"""strata called as qemu-nbd: messages and statuses beside Debian's, and serving QEMU's clients."""
import os
import re
import signal
import subprocess
import time

import pytest


@pytest.fixture(scope="module")
def dropin(strata, tmp_path_factory):
    link = tmp_path_factory.mktemp("bin") / "qemu-nbd"
    link.symlink_to(os.path.abspath(strata))
    return str(link)


@pytest.fixture
def disk(tmp_path):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "q", "1M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -q -P 7 64k 64k", "-f", "qcow2", tmp_path / "q"], check=True)
    return tmp_path / "q"


REFUSED = [
    [], ["a", "b"], ["absent"], ["-f", "nope", "q"], ["-f", "raw", "absent"], ["--image-opts", "-f", "raw", "q"],
    ["--cache=bad", "q"], ["-n", "--cache=none", "q"], ["--aio=bad", "q"], ["--discard=bad", "q"],
    ["--detect-zeroes=bad", "q"], ["--detect-zeroes=unmap", "q"], ["-o", "x", "q"], ["-k", "relative", "q"],
    ["-e", "x", "q"], ["-e", "-1", "q"], ["-x", "n" * 4097, "q"], ["-D", "n" * 4097, "q"],
    ["--tls-authz=x", "q"], ["--tls-hostname=x", "q"], ["-L", "q"], ["-L", "-f", "raw"], ["-L", "--fork"],
    ["-L", "-x", "a"], ["-L", "-k", "/nowhere/s"],
]


@pytest.mark.parametrize("line", REFUSED, ids=lambda v: " ".join(v)[:40])
def test_same_refusal(dropin, disk, line):
    def run(program):
        p = subprocess.run([program, *line], cwd=disk.parent, capture_output=True, text=True, timeout=20,
                           stdin=subprocess.DEVNULL)
        # That program puts its whole name, and its path, in front.
        return p.returncode, p.stdout, re.sub(r"(?m)^\S*qemu-nbd: ", "qemu-nbd: ", p.stderr).replace(program, "qemu-nbd")
    assert run(dropin) == run("qemu-nbd")


@pytest.mark.parametrize("line, word", [
    (["--tls-creds=x", "q"], "TLS"), (["-c", "/dev/nbd0", "q"], "/dev/nbdN"), (["-d", "/dev/nbd0"], "/dev/nbdN")])
def test_what_is_missing_is_refused_by_name(dropin, disk, line, word):
    p = subprocess.run([dropin, *line], cwd=disk.parent, capture_output=True, text=True, timeout=20)
    assert p.returncode == 1 and word in p.stderr


def wait_for(path):
    for _ in range(200):
        if os.path.exists(path):
            return
        time.sleep(0.05)
    raise AssertionError("no socket")


def test_serves_one_client_and_ends(dropin, disk, tmp_path):
    sock = tmp_path / "s"
    server = subprocess.Popen([dropin, "-k", str(sock), "-f", "qcow2", str(disk)],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(sock)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "read -P 7 64k 64k", "-c", "write -P 8 0 4k",
                    f"nbd+unix:///?socket={sock}"], check=True, stdout=subprocess.DEVNULL)
    out, _ = server.communicate(timeout=20)
    assert server.returncode == 0 and out == b"" and not sock.exists()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "read -P 8 0 4k", str(disk)], check=True,
                   stdout=subprocess.DEVNULL)


def test_fork_pid_file_and_list(dropin, disk, tmp_path):
    sock, pid = tmp_path / "s", tmp_path / "pid"
    subprocess.run([dropin, "--fork", "-t", "--pid-file", str(pid), "-k", str(sock), "-x", "ex", "-D", "words",
                    "-r", "-f", "qcow2", str(disk)], check=True, timeout=20)
    try:
        ours = subprocess.run([dropin, "-L", "-k", str(sock)], capture_output=True, text=True, check=True).stdout
        theirs = subprocess.run(["qemu-nbd", "-L", "-k", str(sock)], capture_output=True, text=True, check=True).stdout
        # 10 names the size of transactions, 7.2 does not.
        assert re.sub(r"  transaction size: .*\n", "", ours) == theirs
        assert " export: 'ex'" in ours and "description: words" in ours and "readonly" in ours
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)


def test_offset(dropin, disk, tmp_path):
    sock = tmp_path / "s"
    server = subprocess.Popen([dropin, "-k", str(sock), "-f", "qcow2", "-o", "65536", str(disk)])
    wait_for(sock)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "read -P 7 0 64k", "-c", "read -P 0 64k 64k",
                    f"nbd+unix:///?socket={sock}"], check=True, stdout=subprocess.DEVNULL)
    assert server.wait(20) == 0


def test_snapshot_leaves_the_image_alone(dropin, disk, tmp_path):
    before = disk.read_bytes()
    sock = tmp_path / "s"
    server = subprocess.Popen([dropin, "-s", "-k", str(sock), "-f", "qcow2", str(disk)])
    wait_for(sock)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", "-c", "read -P 1 0 64k",
                    f"nbd+unix:///?socket={sock}"], check=True, stdout=subprocess.DEVNULL)
    assert server.wait(20) == 0 and disk.read_bytes() == before


def test_an_internal_snapshot_is_served_read_only(dropin, disk, tmp_path):
    subprocess.run(["qemu-img", "snapshot", "-c", "then", disk], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 9 64k 64k", disk], check=True)
    sock = tmp_path / "s"
    server = subprocess.Popen([dropin, "-l", "then", "-k", str(sock), "-f", "qcow2", str(disk)])
    wait_for(sock)
    p = subprocess.run(["qemu-io", "-r", "-f", "raw", "-c", "read -P 7 64k 64k", f"nbd+unix:///?socket={sock}"],
                       capture_output=True, text=True)
    assert p.returncode == 0 and "verification failed" not in p.stdout
    assert server.wait(20) == 0
