# SPDX-License-Identifier: MIT
"""strata run, the rest: a mode for each disk, networks, monitors, ssh, firmware, --print, --stateless.

As in test_run.py most guests are a stand-in for QEMU, which takes its disks, its monitor's socket
and its power button from the same command line; three real ones show that QEMU understands it.
"""
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess

import pytest

from test_run import FAKE, alive, boot_sector, wait_until

# Finds what else it was given; `power()` waits until its power button is pressed.
MORE = r'''
import json, socket
ARGS = sys.argv[1:]
def fd_of(start):
    for a in ARGS:
        m = re.match(start + r".*\bfd=(\d+)", a)
        if m:
            return int(m.group(1))
def port():
    return int(re.search(r"hostfwd=tcp:127.0.0.1:(\d+)-:22\b", " ".join(ARGS)).group(1))
def sshd():
    s = socket.create_server(("127.0.0.1", port()))
    c, _ = s.accept()
    c.sendall(b"SSH-2.0-fake\r\n")
    return c
def power():
    s = socket.socket(fileno=fd_of("socket,id=strata-control"))
    text = b""
    while b"system_powerdown" not in text:
        got = s.recv(4096)
        assert got
        text += got
    assert [json.loads(l)["execute"] for l in text.splitlines()] == ["qmp_capabilities", "system_powerdown"]
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    path = tmp_path / "fake-qemu"
    path.write_text(FAKE.replace("exec(os", MORE + "exec(os"))
    path.chmod(0o755)

    def args(code):
        monkeypatch.setenv("FAKE", code)
        return ["--qemu", path, "--transport", "nbd"]

    return args


@pytest.fixture
def raw(tmp_path):
    """raw("a") makes a file of 64 KiB of that letter."""

    def make(name):
        (tmp_path / name).write_bytes(name[0].encode() * 65536)
        return tmp_path / name

    return make


@pytest.fixture
def spawn(strata):
    procs = []

    def start(*args, **kw):
        kw.setdefault("stdout", subprocess.PIPE)
        p = subprocess.Popen([strata, "run", *map(str, args)], stdin=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, **kw)
        procs.append(p)
        return p

    yield start
    for p in procs:
        p.kill()
        p.communicate()


def connected(path):
    """A socket, as soon as somebody listens there."""
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(60)
    wait_until(lambda: s.connect_ex(str(path)) == 0, 60, "socket")
    return s


def child_called(pid, name):
    def look():
        for c in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if pathlib.Path(f"/proc/{c}/comm").read_text().strip() == name:
                found.append(int(c))
        return found

    found = []
    wait_until(look, 60, name)
    return found[0]


def guest_of(pid):
    return child_called(pid, "fake-qemu")


def janitor_of(pid):
    return child_called(pid, "strata-janitor")


# ---------------------------------------------------------------- a mode for each disk

def test_each_disk_has_the_mode_behind_its_name(run, raw, fake, tmp_path):
    a, b, c = raw("a"), raw("b"), raw("c")
    run("run", "-f", "raw", *fake(
        "assert [h.is_read_only() for h in disks] == [False, False, True]\n"
        "assert disks[2].pread(3, 0) == b'ccc'\n"
        "disks[0].pwrite(b'x' * 512, 0); disks[1].pwrite(b'y' * 512, 0)"),
        f"{a}:snapshot", f"{b}:write", f"{c}:ro")
    assert a.read_bytes() == b"a" * 65536
    assert b.read_bytes() == b"y" * 512 + b"b" * 65024
    assert c.read_bytes() == b"c" * 65536


@pytest.mark.parametrize("default, first, second", [("--snapshot", b"a", b"x"), ("--write", b"x", b"b")])
def test_global_mode_is_for_disks_without_one(run, raw, fake, default, first, second):
    a, b = raw("a"), raw("b")
    other = "write" if default == "--snapshot" else "snapshot"
    run("run", default, "-f", "raw", *fake("[h.pwrite(b'x' * 512, 0) for h in disks]"), a, f"{b}:{other}")
    assert a.read_bytes()[:1] == first and b.read_bytes()[:1] == second


def test_file_whose_name_ends_like_a_mode_is_that_file(run, raw, fake, tmp_path):
    whole, part = raw("disk:write"), raw("disk")
    whole.write_bytes(b"w" * 65536)
    run("run", "--snapshot", "-f", "raw", *fake(
        "assert disks[0].pread(1, 0) == b'w'; disks[0].pwrite(b'x' * 512, 0)"), whole)
    assert whole.read_bytes() == b"w" * 65536 and part.read_bytes() == b"d" * 65536
    run("run", "-f", "raw", *fake("assert disks[0].pread(1, 0) == b'w'"), f"{whole}:ro")


def test_read_only_disk_is_open_read_only_here_too(run, raw, fake):
    a = raw("a")
    run("run", "-f", "raw", *fake(
        "d = f'/proc/{os.getppid()}/fd'\n"
        "for f in os.listdir(d):\n"
        "    if os.readlink(f'{d}/{f}') == %r:\n"
        "        flags = open(f'/proc/{os.getppid()}/fdinfo/{f}').read()\n"
        "        assert int(re.search(r'flags:\\s+(\\d+)', flags).group(1), 8) & 3 == 0" % str(a)), f"{a}:ro")


def test_one_disk_without_a_mode_is_refused_naming_both(run, raw, fake):
    p = run("run", *fake(""), f"{raw('a')}:ro", raw("b"), status=1)
    assert "--snapshot" in p.stderr and "--write" in p.stderr


def test_keep_is_for_each_disk_with_a_snapshot(run, peer, raw, fake, tmp_path):
    a, b, c = raw("a"), raw("b"), raw("c")
    run("run", "--keep", tmp_path / "ka", "--keep", tmp_path / "kc", "-f", "raw",
        *fake("[h.pwrite(bytes([49 + i]) * 512, 0) for i, h in enumerate(disks)]"),
        f"{a}:snapshot", f"{b}:write", f"{c}:snapshot")
    for name, byte in (("ka", "0x31"), ("kc", "0x33")):
        peer("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {byte} 0 512", tmp_path / name)
    assert b.read_bytes()[:512] == b"2" * 512


@pytest.mark.parametrize("transport", ["nbd", "vhost-user"])
def test_firmware_boots_from_a_read_only_disk(run, tmp_path, transport):
    disk = tmp_path / "disk"
    disk.write_bytes(boot_sector("hello from the disk").ljust(1 << 20, b"\0"))
    p = run("run", "-f", "raw", "-m", "64", "--accel", "tcg", "--nographic", "--net", "none",
            "--transport", transport, f"{disk}:ro", timeout=100)
    assert "hello from the disk" in p.stdout


# ---------------------------------------------------------------- what QEMU is told

def printed(run, *args):
    p = run("run", "--print", *args)
    assert p.stdout.count("\n") == 1
    return shlex.split(p.stdout)


def test_print_is_the_command_line_of_the_guest(run, raw, fake, tmp_path):
    a = raw("a")
    args = ["-f", "raw", "--accel", "tcg", "--uefi", "--kernel", "it's", "--append", "a  b$c*",
            *fake("json.dump(sys.argv, open('argv', 'w'))"), f"{a}:snapshot", f"{raw('b')}:ro", "--", "-name", ""]
    shown = printed(run, *args)
    assert not (tmp_path / "argv").exists()
    run("run", *args, cwd=tmp_path)
    said = json.loads((tmp_path / "argv").read_text())

    def numbers(words):
        return [re.sub(r"(fd=|server\.str=)\d+", r"\1N", w) for w in words]

    assert numbers(shown) == numbers(said)
    assert "a  b$c*" in shown and "it's" in shown and shown[-1] == ""


def test_print_starts_nothing_and_leaves_nothing(run, raw, fake, tmp_path):
    a, args = raw("a"), fake("open('started', 'w')")
    before = sorted(os.listdir(tmp_path))
    run("run", "--print", *args, "--stateless", tmp_path / "over", "--monitor", f"unix:{tmp_path}/mon",
        "-f", "raw", a, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("args, said", [
    (["--net", "user"], "user,model=virtio-net-pci"), ([], "user,model=virtio-net-pci"),
    (["--net", "none"], "none"), (["--no-net"], "none"), (["--no-net", "--net", "none"], "none"),
    (["--net", "tap=tap0"], "tap,ifname=tap0,script=no,downscript=no,model=virtio-net-pci"),
    (["--net", "bridge=br-lan.1"], "bridge,br=br-lan.1,model=virtio-net-pci")])
def test_network_is_what_was_asked_for(run, raw, args, said):
    argv = printed(run, *args, f"{raw('a')}:ro")
    assert argv[argv.index("-nic") + 1] == said


@pytest.mark.parametrize("args, said", [
    (["--monitor", "stdio"], ["-monitor", "stdio"]),
    (["--monitor", "tcp:4444"], ["-chardev", "socket,id=monitor,host=127.0.0.1,port=4444,server=on,wait=off,telnet=off"]),
    (["--monitor", "telnet:10.0.0.1:23"], ["-chardev", "socket,id=monitor,host=10.0.0.1,port=23,server=on,wait=off,telnet=on"]),
    (["--monitor", "tcp:1", "--nographic"], ["-nographic", "-serial", "mon:stdio"])])
def test_monitor_is_where_it_was_asked_for(run, raw, args, said):
    argv = printed(run, *args, f"{raw('a')}:ro")
    at = argv.index(said[0])
    assert argv[at:at + len(said)] == said


@pytest.mark.parametrize("args, words", [
    (["a:sanpshot"], ["'sanpshot' is not snapshot, write or ro", "a:snapshot"]),
    (["--snapshot", "a", "--net", "usre"], ["'usre' is not", "did you mean user"]),
    (["--snapshot", "a", "--net", "tap"], ["needs a name"]),
    (["--snapshot", "a", "--net", "tap="], ["1 to 15 characters"]),
    (["--snapshot", "a", "--net", "tap=x,script=/tmp/x"], ["1 to 15 characters"]),
    (["--snapshot", "a", "--net", "bridge=abcdefghijklmnop"], ["1 to 15 characters"]),
    (["--snapshot", "a", "--net", "user=x"], ["takes no name"]),
    (["--snapshot", "a", "--net", "user", "--no-net"], ["exclude"]),
    (["--snapshot", "a", "--net", "none", "--forward", "1:2"], ["--net none"]),
    (["--snapshot", "a", "--net", "tap=t", "--forward", "1:2"], ["--forward needs --net user"]),
    (["--snapshot", "a", "--net", "none", "--ssh"], ["--ssh needs --net user"]),
    (["--snapshot", "a", "--ssh", "--nographic"], ["exclude", "terminal"]),
    (["--snapshot", "a", "--ssh-user", "x"], ["is for --ssh"]),
    (["--snapshot", "a", "--ssh", "--ssh-user=-oProxyCommand=x"], ["not a user's name"]),
    (["--snapshot", "a", "--monitor", "vc"], ["stdio, unix:PATH"]),
    (["--snapshot", "a", "--monitor", "unix:"], ["stdio, unix:PATH"]),
    (["--snapshot", "a", "--monitor", "tcp:0"], ["1 to 65535"]),
    (["--snapshot", "a", "--monitor", "tcp:host:1"], ["IPv4"]),
    (["--snapshot", "a", "--monitor", "telnet:1,server,nowait"], ["leave out server"]),
    (["--snapshot", "a", "--monitor", "unix:" + "x" * 200], ["the limit is"]),
    (["--snapshot", "a", "--monitor", "unix:nowhere/m"], ["nowhere/m", "No such file"]),
    (["--snapshot", "a", "--monitor", "stdio", "--nographic"], ["exclude", "Ctrl-A C"]),
    (["--snapshot", "a", "--monitor", "stdio", "--ssh"], ["exclude"]),
    (["--stateless", "o", "--snapshot", "a"], ["exclude"]),
    (["--stateless", "o", "--write", "a"], ["exclude"]),
    (["--stateless", "o", "a:ro"], ["1 --stateless for 0 disks"]),
    (["--stateless", "o", "a", "a"], ["1 --stateless for 2 disks"]),
    (["--stateless", "a", "a"], ["the file exists"]),
    (["--stateless", "", "a"], ["the name is empty"]),
    (["--stateless", "no/where", "a"], ["no", "No such file"]),
    (["--stateless", "o", "--stateless", "o", "a", "a"], ["given twice"]),
    (["--stateless", "o", "--keep", "o", "a", "a:snapshot"], ["given twice"]),
    (["--stateless", "o", "--keep-overlay", "--commit-on-exit", "a"], ["exclude"]),
    (["--snapshot", "--keep-overlay", "a"], ["is for --stateless"]),
    (["--stateless", "o", "--scratch", ".", "a"], ["where its name says"]),
    (["--commit-on-exit", "a:write"], ["for --snapshot"]),
    (["--keep", "k", "a:ro"], ["for --snapshot"]),
    (["--keep", "k", "a:snapshot", "a:snapshot"], ["1 --keep for 2 disks"]),
], ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else None)
def test_bad_input_is_refused_before_the_guest_starts(run, raw, fake, tmp_path, args, words):
    raw("a")
    p = run("run", *fake("open('started', 'w')"), "-f", "raw", *args, status=1, cwd=tmp_path)
    assert all(w in p.stderr for w in words), p.stderr
    assert sorted(os.listdir(tmp_path)) == ["a", "fake-qemu"]


# ---------------------------------------------------------------- the monitor's socket

def test_monitor_socket_is_the_owners_and_gone_afterwards(run, raw, fake, tmp_path):
    mon = tmp_path / "mon"
    run("run", "-f", "raw", "--monitor", f"unix:{mon}", *fake(
        "import stat\n"
        "assert stat.S_IMODE(os.stat(%r).st_mode) == 0o600\n"
        "s = socket.socket(fileno=fd_of('socket,id=monitor'))\n"
        "c = socket.socket(socket.AF_UNIX); c.connect(%r)\n"
        "c.sendall(b'hello'); assert s.accept()[0].recv(5) == b'hello'" % (str(mon), str(mon))), f"{raw('a')}:ro")
    assert not mon.exists()


def test_file_in_place_of_the_monitor_socket_is_left_alone(run, raw, fake, tmp_path):
    (tmp_path / "mon").write_text("precious")
    p = run("run", "-f", "raw", "--monitor", f"unix:{tmp_path}/mon", *fake(""), f"{raw('a')}:ro", status=1)
    assert "not a socket" in p.stderr
    assert (tmp_path / "mon").read_text() == "precious"


def test_real_monitor_answers_on_its_socket(spawn, raw, tmp_path):
    mon = tmp_path / "mon"
    p = spawn("-f", "raw", "-m", "64", "--accel", "tcg", "--net", "none", "--monitor", f"unix:{mon}",
              f"{raw('a')}:ro", "--", "-display", "none", "-S")
    with connected(mon) as s:
        text = b""
        while b"(qemu) " not in text:
            text += (got := s.recv(4096))
            assert got
        s.sendall(b"quit\n")
        while s.recv(4096):
            pass
    p.communicate(timeout=60)
    assert p.returncode == 0 and not mon.exists()


# ---------------------------------------------------------------- an overlay with a name

def test_stateless_overlay_is_there_meanwhile_and_gone_afterwards(run, raw, fake, tmp_path):
    a, over = raw("a"), tmp_path / "over.qcow2"
    p = run("run", "--stateless", over, "-f", "raw", *fake(
        "disks[0].pwrite(b'x' * 4096, 0); disks[0].flush()\n"
        "h = open(%r, 'rb').read(); assert h[:4] == b'QFI\\xfb' and %r.encode() in h" % (str(over), str(a))), a)
    assert "threw away 4 KiB" in p.stderr
    assert not over.exists() and a.read_bytes() == b"a" * 65536


def test_stateless_overlay_is_kept_on_request(run, peer, raw, fake, tmp_path):
    a, b, over = raw("a"), raw("b"), tmp_path / "over.qcow2"
    run("run", "--stateless", "over.qcow2", "--keep-overlay", "-f", "raw",
        *fake("disks[0].pwrite(b'x' * 512, 0)"), a, f"{b}:ro", cwd=tmp_path)
    peer("qemu-img", "check", "-q", over)
    peer("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x78 0 512", "-c", "read -P 0x61 512 512", over)
    assert a.read_bytes() == b"a" * 65536


def test_kept_overlay_is_what_the_guest_saw_last(run, spawn, peer, raw, fake, tmp_path):
    """A drop puts another overlay in the place of the first: the file that stays is the second."""
    a, over, ctl, step = raw("a"), tmp_path / "over", tmp_path / "ctl", tmp_path / "step"
    p = spawn("--stateless", over, "--keep-overlay", "--control", ctl, "-f", "raw", *fake(
        "import pathlib; step = pathlib.Path(%r)\n"
        "disks[0].pwrite(b'x' * 512, 0); step.write_text('1')\n"
        "while step.read_text() != '2': time.sleep(.01)\n"
        "disks[0].pwrite(b'y' * 512, 512)" % str(step)), a)
    wait_until(lambda: step.exists() and step.read_text() == "1", 60, "first write")
    run("ctl", ctl, "drop")
    (tmp_path / "next").write_text("2")
    (tmp_path / "next").rename(step)
    p.communicate(timeout=60)
    assert p.returncode == 0
    peer("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x61 0 512", "-c", "read -P 0x79 512 512", over)


def test_stateless_commits_when_asked_to(run, raw, fake, tmp_path):
    a, over = raw("a"), tmp_path / "over"
    run("run", "--stateless", over, "--commit-on-exit", "-f", "raw",
        *fake("disks[0].pwrite(b'x' * 512, 0)"), a)
    assert a.read_bytes()[:513] == b"x" * 512 + b"a" and not over.exists()


def test_guest_that_dies_leaves_no_overlay(run, raw, fake, tmp_path):
    run("run", "--stateless", tmp_path / "over", "-f", "raw",
        *fake("os.kill(os.getpid(), signal.SIGKILL)"), raw("a"), status=137)
    assert not (tmp_path / "over").exists()


def test_file_that_took_the_overlays_place_is_left_alone(run, raw, fake, tmp_path):
    over = tmp_path / "over"
    run("run", "--stateless", over, "-f", "raw", *fake(
        "os.rename(%r, %r)\nopen(%r, 'w').write('precious')" % (str(over), str(over) + "1", str(over))), raw("a"))
    assert over.read_text() == "precious"


# ---------------------------------------------------------------- kill -9

@pytest.fixture
def three(spawn, raw, fake, tmp_path):
    """A run with an overlay and a socket that have names: (process, guest, janitor, the two files)."""
    over, mon = tmp_path / "over", tmp_path / "mon"
    p = spawn("--stateless", over, "--monitor", f"unix:{mon}", "-f", "raw", *fake(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(100)"), raw("a"))
    assert p.stdout.readline() == "up\n"
    assert over.exists() and mon.exists()
    return p, guest_of(p.pid), janitor_of(p.pid), (over, mon)


def test_kill_9_of_strata_leaves_no_process_and_no_file(three):
    p, guest, janitor, files = three
    p.kill()
    p.wait()
    wait_until(lambda: not alive(guest) and not alive(janitor), 60, "processes gone")
    assert not any(f.exists() for f in files)


def test_kill_9_of_the_guest_leaves_no_process_and_no_file(three):
    p, guest, janitor, files = three
    os.kill(guest, signal.SIGKILL)
    p.communicate(timeout=60)
    assert p.returncode == 137
    assert not alive(janitor) and not any(f.exists() for f in files)


def test_kill_9_of_the_janitor_disturbs_nobody(three):
    p, guest, janitor, files = three
    os.kill(janitor, signal.SIGKILL)
    wait_until(lambda: not alive(janitor), 60, "janitor gone")
    assert alive(guest)
    os.kill(guest, signal.SIGKILL)
    p.communicate(timeout=60)
    assert p.returncode == 137 and not any(f.exists() for f in files)


def test_janitor_removes_only_what_is_still_ours(three):
    p, guest, janitor, (over, mon) = three
    over.rename(over.with_name("moved"))
    over.write_text("somebody else's")
    p.kill()
    p.wait()
    wait_until(lambda: not alive(guest) and not alive(janitor), 60, "processes gone")
    assert over.read_text() == "somebody else's" and not mon.exists()


def test_janitor_outlives_what_a_terminal_sends_to_all(three):
    p, guest, janitor, files = three
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(janitor, s)
    p.kill()
    p.wait()
    wait_until(lambda: not alive(guest) and not alive(janitor), 60, "processes gone")
    assert not any(f.exists() for f in files)


# ---------------------------------------------------------------- a session

@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """ssh(code) puts Python statements in place of the program ssh."""
    folder = tmp_path / "bin"

    def make(code):
        folder.mkdir()
        (folder / "ssh").write_text("#!/usr/bin/python3\nimport os, signal, sys, time\n" + code)
        (folder / "ssh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return make


def test_session_begins_with_the_greeting_and_its_end_is_the_guests(run, raw, fake, ssh, tmp_path):
    ssh("open('args', 'w').write('\\n'.join(sys.argv[1:])); sys.exit(5)")
    a = raw("a")
    p = run("run", "--snapshot", "--ssh", "--ssh-user", "root", "-f", "raw", *fake(
        "assert not os.path.exists('args')\n"
        "s = socket.create_server(('127.0.0.1', port()))\n"
        "s.accept()[0].close()\n"  # as QEMU does while nobody listens in the guest
        "c, _ = s.accept(); c.sendall(b'220 not ssh\\r\\n'); assert not os.path.exists('args'); c.close()\n"
        "c, _ = s.accept(); c.sendall(b'SSH-2.0-fake\\r\\n')\n"
        "open('port', 'w').write(str(port())); time.sleep(100)"), a, status=5, cwd=tmp_path)
    args = (tmp_path / "args").read_text().split("\n")
    assert args[-1] == "127.0.0.1" and args[args.index("-l") + 1] == "root"
    assert args[args.index("-p") + 1] == (tmp_path / "port").read_text()
    assert "waiting for the guest's sshd" in p.stderr and "threw away" in p.stderr


def test_guest_whose_disk_is_written_is_asked_to_switch_off(run, raw, fake, ssh):
    ssh("")
    a = raw("a")
    p = run("run", "--write", "--ssh", "-f", "raw",
            *fake("c = sshd(); power(); disks[0].pwrite(b'x' * 512, 0); disks[0].flush()"), a)
    assert a.read_bytes()[:512] == b"x" * 512
    assert "switch itself off" in p.stderr


def test_session_commits_when_the_guest_has_switched_off(run, raw, fake, ssh):
    ssh("")
    a = raw("a")
    run("run", "--snapshot", "--commit-on-exit", "--ssh", "-f", "raw",
        *fake("c = sshd(); disks[0].pwrite(b'x' * 512, 0); power()"), a)
    assert a.read_bytes()[:512] == b"x" * 512


REAL = r'''#!/usr/bin/python3
import os, re, socket, sys, time
words = " ".join(sys.argv)
port = int(re.search(r"hostfwd=tcp:127.0.0.1:(\d+)-:22", words).group(1))
s = socket.create_server(("127.0.0.1", port))
if os.fork() == 0:
    os.closerange(0, 3)
    while not os.path.exists("go"):
        time.sleep(.01)
    s.accept()[0].sendall(b"SSH-2.0-fake\r\n")
    os._exit(0)
s.close()
os.execvp(PROGRAM, [PROGRAM, *(re.sub(",hostfwd=[^,]*", "", a) for a in sys.argv[1:])])
'''


def test_real_guest_hears_its_power_button(spawn, run, raw, ssh, tmp_path):
    """The session's sshd is a stand-in; QEMU is real and tells on a second control socket."""
    ssh("")
    a, qemu = raw("a"), tmp_path / "fake-qemu"
    qemu.write_text(REAL.replace("PROGRAM", repr(printed(run, f"{a}:ro")[0])))
    qemu.chmod(0o755)
    p = spawn("--write", "--ssh", "-f", "raw", "-m", "64", "--accel", "tcg", "--qemu", qemu, a, "--",
              "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off", cwd=tmp_path)
    with connected(tmp_path / "qmp") as s:
        lines = s.makefile()
        lines.readline()
        s.sendall(b'{"execute": "qmp_capabilities"}\n')
        assert "return" in lines.readline()
        (tmp_path / "go").touch()
        while '"POWERDOWN"' not in (line := lines.readline()):
            assert line
        s.sendall(b'{"execute": "quit"}\n')
    p.communicate(timeout=60)
    assert p.returncode == 0


def test_guest_that_ends_first_takes_the_session_along(run, raw, fake, ssh, tmp_path):
    ssh("open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ssh.pid'); time.sleep(100)")
    run("run", "--snapshot", "--ssh", "-f", "raw", *fake(
        "c = sshd()\nwhile not os.path.exists('ssh.pid'): time.sleep(.01)\nsys.exit(3)"), raw("a"),
        status=3, cwd=tmp_path)
    assert not alive(int((tmp_path / "ssh.pid").read_text()))


def test_guest_that_ends_before_its_sshd_is_waited_for_no_longer(run, raw, fake, ssh):
    ssh("")
    run("run", "--snapshot", "--ssh", "-f", "raw", *fake("sys.exit(4)"), raw("a"), status=4)


def test_silent_server_is_no_sshd_and_holds_up_no_end(run, raw, fake, ssh):
    ssh("")
    run("run", "--snapshot", "--ssh", "-f", "raw", *fake(
        "s = socket.create_server(('127.0.0.1', port())); c = s.accept(); sys.exit(6)"), raw("a"), status=6)


@pytest.fixture
def session(spawn, raw, fake, ssh, tmp_path):
    """A run in the middle of its session: (process, guest, ssh)."""
    ssh("open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ssh.pid'); time.sleep(100)")
    p = spawn("--snapshot", "--ssh", "-f", "raw", *fake("c = sshd(); time.sleep(100)"), raw("a"), cwd=tmp_path)
    pid = tmp_path / "ssh.pid"
    wait_until(pid.exists, 60, "session")
    return p, guest_of(p.pid), int(pid.read_text())


@pytest.mark.parametrize("victim, status", [("strata", None), ("guest", 137), ("ssh", 137)])
def test_kill_9_during_a_session_leaves_no_process(session, victim, status):
    p, guest, ssh = session
    os.kill({"strata": p.pid, "guest": guest, "ssh": ssh}[victim], signal.SIGKILL)
    p.communicate(timeout=60)
    wait_until(lambda: not alive(guest) and not alive(ssh), 60, "processes gone")
    assert status is None or p.returncode == status


def test_signal_during_a_session_ends_both(session):
    p, guest, ssh = session
    p.terminate()
    p.communicate(timeout=60)
    assert p.returncode == 143 and not alive(guest) and not alive(ssh)


def test_session_without_the_program_is_refused_with_its_package(run, raw, fake, tmp_path, monkeypatch):
    a, args = raw("a"), fake("open('started', 'w')")
    monkeypatch.setenv("PATH", str(tmp_path))
    p = run("run", "--snapshot", "--ssh", "-f", "raw", *args, a, status=1, cwd=tmp_path)
    assert "openssh-client" in p.stderr and not (tmp_path / "started").exists()


# ---------------------------------------------------------------- firmware

@pytest.fixture
def firmware(tmp_path, monkeypatch):
    folder = tmp_path / "firmware"
    folder.mkdir()
    for what in ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd", "AAVMF_CODE.fd", "AAVMF_VARS.fd"):
        (folder / what).write_bytes(what.encode().ljust(4096, b"."))
    monkeypatch.setenv("STRATA_OVMF", str(folder))
    return folder


def test_uefi_variables_are_a_copy_that_nobody_keeps(run, raw, fake, firmware):
    before = {f: f.read_bytes() for f in firmware.iterdir()}
    run("run", "--snapshot", "--uefi", "-f", "raw", *fake(
        "code, data = fd_of('set=1'), fd_of('set=2')\n"
        "assert b'_CODE' in os.pread(code, 4096, 0) and b'_VARS' in os.pread(data, 4096, 0)\n"
        "assert os.fstat(data).st_size == 4096 and os.fstat(data).st_nlink == 0\n"
        "os.pwrite(data, b'changed', 0)\n"
        "try: os.pwrite(code, b'x', 0); sys.exit(9)\n"
        "except OSError: pass"), raw("a"))
    assert {f: f.read_bytes() for f in firmware.iterdir()} == before


def test_missing_firmware_is_refused_with_its_package(run, raw, fake, monkeypatch, tmp_path):
    monkeypatch.setenv("STRATA_OVMF", str(tmp_path))
    p = run("run", "--snapshot", "--uefi", "-f", "raw", *fake("open('started', 'w')"), raw("a"), status=1,
            cwd=tmp_path)
    assert "Debian: ovmf" in p.stderr or "Debian: qemu-efi" in p.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("content", [b"", None], ids=["empty", "folder"])
def test_variables_that_are_none_are_refused(run, raw, fake, firmware, content):
    for f in firmware.glob("*VARS*"):
        f.unlink()
        f.mkdir() if content is None else f.write_bytes(content)
    p = run("run", "--snapshot", "--uefi", "-f", "raw", *fake(""), raw("a"), status=1)
    assert "not firmware variables" in p.stderr


def test_real_firmware_looks_for_a_system_on_the_disk(spawn, raw, tmp_path):
    with open(tmp_path / "serial", "w") as f:
        p = spawn("--uefi", "-f", "raw", "-m", "128M", "--accel", "tcg", "--nographic", "--net", "none",
                  f"{raw('a')}:ro", stdout=f)
    wait_until(lambda: "BdsDxe" in (tmp_path / "serial").read_text(errors="replace"), 200, "firmware")
    p.terminate()
    p.communicate(timeout=60)
    assert p.returncode == 143
