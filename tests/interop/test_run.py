# SPDX-License-Identifier: MIT
"""strata run: what the guest's writes become, whose exit status it is, what stays behind.

Two kinds of guest.  `linux` boots Debian's cloud kernel under the real QEMU, emulated, with a
script as its only program (scripts/guest.sh).  `fake` is a stand-in for QEMU that finds its disks on
the same command line and speaks NBD to them through libnbd: quick, and it can end in any way.
"""
import hashlib
import os
import pathlib
import pty
import re
import signal
import subprocess
import termios
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
MARK = "kept what the guest wrote"

FAKE = r'''#!/usr/bin/python3
import nbd, os, re, signal, sys, time
disks = []
for a in sys.argv:
    m = re.match(r"driver=nbd,.*server.type=fd,server.str=(\d+),", a)
    if m:
        h = nbd.NBD()
        h.connect_socket(int(m.group(1)))
        disks.append(h)
exec(os.environ["FAKE"])
for h in disks:
    h.shutdown()
'''


def sha256(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def alive(pid):
    """Running, and not merely a zombie that nobody has collected yet."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def wait_until(condition, seconds=20, what="condition"):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def child_of(pid):
    kids = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(kids[0]) if kids else 0


@pytest.fixture
def scratch(tmp_path):
    d = tmp_path / "scratch"
    d.mkdir()
    return d


@pytest.fixture
def disk(tmp_path):
    """A 48 MiB ext4 file system with one file, as a raw image."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "note").write_text("original\n")
    path = tmp_path / "disk.raw"
    subprocess.run(["/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, path, "48M"], check=True,
                   stdout=subprocess.DEVNULL)
    return path


@pytest.fixture
def linux(kernel, tmp_path):
    """Arguments that boot Linux with a script; the console goes to standard output."""

    def args(script):
        text = tmp_path / "script"
        text.write_text(script)
        initrd = tmp_path / "initrd"
        subprocess.run([ROOT / "scripts/guest.sh", "initrd", text, initrd], check=True)
        return ["-m", "192M", "--accel", "tcg", "--nographic", "--no-net", "--kernel", kernel,
                "--initrd", initrd, "--append", "console=ttyS0 quiet panic=-1"]

    return args


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Arguments that run Python statements in place of the guest; `disks` are libnbd handles."""
    path = tmp_path / "fake-qemu"
    path.write_text(FAKE)
    path.chmod(0o755)

    def args(code):
        monkeypatch.setenv("FAKE", code)
        return ["--qemu", path, "--transport", "nbd"]

    return args


def content_of_note(image):
    return subprocess.run(["/sbin/debugfs", "-R", "cat /note", image], check=True, text=True,
                          capture_output=True).stdout


CHANGE = f"""
mount -t ext4 /dev/vda /mnt || exit 1
echo before: $(cat /mnt/note)
echo "{MARK}" >/mnt/note
sync
echo 3 >/proc/sys/vm/drop_caches
echo after: $(cat /mnt/note)
umount /mnt
"""


# ---------------------------------------------------------------- what the writes become

def test_snapshot_leaves_the_disk_byte_for_byte(run, disk, scratch, linux):
    before = sha256(disk)
    p = run("run", "--snapshot", "--scratch", scratch, "-f", "raw", *linux(CHANGE), disk)
    assert "before: original" in p.stdout
    assert f"after: {MARK}" in p.stdout
    assert sha256(disk) == before
    assert os.listdir(scratch) == []
    assert re.search(r"threw away [\d.]+ [KM]iB", p.stderr)


def test_write_changes_the_disk(run, disk, linux):
    p = run("run", "--write", "-f", "raw", *linux(CHANGE), disk)
    assert f"after: {MARK}" in p.stdout
    assert content_of_note(disk) == MARK + "\n"


def test_commit_on_exit_writes_the_changes_into_the_disk(run, disk, scratch, linux):
    run("run", "--snapshot", "--commit-on-exit", "--scratch", scratch, "-f", "raw",
        *linux(CHANGE), disk)
    assert content_of_note(disk) == MARK + "\n"
    assert os.listdir(scratch) == []


def test_keep_saves_an_overlay_over_the_unchanged_disk(run, peer, disk, scratch, tmp_path, linux):
    before = sha256(disk)
    kept = tmp_path / "kept.qcow2"
    run("run", "--snapshot", "--keep", kept, "--scratch", scratch, "-f", "raw", *linux(CHANGE), disk)
    assert sha256(disk) == before
    peer("qemu-img", "check", kept)
    peer("qemu-img", "convert", "-O", "raw", kept, tmp_path / "flat.raw")
    assert content_of_note(tmp_path / "flat.raw") == MARK + "\n"
    assert os.listdir(scratch) == []


def test_full_scratch_is_an_error_in_the_guest_which_goes_on(run, disk, scratch, linux):
    p = run("run", "--snapshot", "--scratch", scratch, "--scratch-size", "8M", "-f", "raw", *linux("""
dd if=/dev/urandom of=/tmp/data bs=1M count=24 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M conv=fsync && echo no error
echo still here
"""), disk, timeout=60)
    assert "no error" not in p.stdout
    assert "still here" in p.stdout


@pytest.mark.parametrize("code, said", [
    ("", "threw away 0 B that"), ("disks[0].pwrite(b'x'*65536, 0)", "threw away 64 KiB that"),
    ("disks[0].pwrite(b'x'*65536, 0); disks[0].trim(65536, 0)", "threw away 0 B that")],
    ids=["nothing", "written", "trimmed"])
def test_what_was_thrown_away_is_what_the_guest_wrote(run, tmp_path, fake, code, said):
    (tmp_path / "d").write_bytes(bytes(1 << 20))
    assert said in run("run", "--snapshot", "-f", "raw", *fake(code), tmp_path / "d").stderr


def test_every_disk_has_its_own_overlay(run, tmp_path, fake):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 65536)
    p = run("run", "--snapshot", "-f", "raw", *fake(
        "disks[0].pwrite(b'x'*512, 0)\n"
        "print(disks[0].pread(513, 0)[511:], disks[1].pread(2, 0), flush=True)"),
        tmp_path / "a", tmp_path / "b")
    assert "bytearray(b'xa') bytearray(b'bb')" in p.stdout
    assert (tmp_path / "a").read_bytes() == b"a" * 65536
    assert (tmp_path / "b").read_bytes() == b"b" * 65536


def test_each_disk_is_kept_under_its_own_name(run, peer, tmp_path, fake):
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(65536))
    run("run", "--snapshot", "--keep", tmp_path / "ka", "--keep", tmp_path / "kb", "-f", "raw",
        *fake("disks[0].pwrite(b'1'*512, 0); disks[1].pwrite(b'2'*512, 0)"),
        tmp_path / "a", tmp_path / "b")
    for name, byte in (("ka", "0x31"), ("kb", "0x32")):
        peer("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {byte} 0 512", tmp_path / name)


def test_cdrom_is_served_read_only(run, tmp_path, fake):
    (tmp_path / "disk").write_bytes(bytes(65536))
    (tmp_path / "cd.iso").write_bytes(b"CD" * 2048)
    p = run("run", "--write", "-f", "raw", "--cdrom", tmp_path / "cd.iso", *fake(
        "print(disks[1].is_read_only(), disks[1].pread(4, 0), disks[0].is_read_only(), flush=True)"),
        tmp_path / "disk")
    assert "True bytearray(b'CDCD') False" in p.stdout


def test_write_is_on_stable_storage_order_with_a_flush(run, tmp_path, fake):
    (tmp_path / "d").write_bytes(bytes(65536))
    run("run", "--write", "-f", "raw", *fake("disks[0].pwrite(b'y'*4096, 4096); disks[0].flush()"),
        tmp_path / "d")
    assert (tmp_path / "d").read_bytes()[4096:8192] == b"y" * 4096


# ---------------------------------------------------------------- firmware boots from our disks

def boot_sector(text):
    """Writes `text` to the serial port, then switches the machine off (ACPI port of q35)."""
    code = bytes.fromhex("31c0 8ed8"            # ds = 0
                         "baf803 be1c7c"        # dx = COM1, si = text
                         "ac 08c0 7403 ee ebf8"  # until the NUL: out dx, al
                         "ba0406 b80020 ef"     # outw(0x604, S5)
                         "f4 ebfd")
    return (code + text.encode() + b"\0").ljust(510, b"\0") + b"\x55\xaa"


def bootable_cd(text):
    """The least that El Torito asks for: a boot record, a catalogue, one image without emulation."""
    def sector(start, data):
        return start * 2048, data.ljust(2048, b"\0")

    entry = bytes([1, 0, 0, 0]) + b"\0" * 24 + b"\0\0" + b"\x55\xaa"
    total = sum(int.from_bytes(entry[i:i + 2], "little") for i in range(0, 32, 2)) & 0xffff
    entry = entry[:28] + (-total & 0xffff).to_bytes(2, "little") + entry[30:]
    initial = bytes([0x88, 0, 0, 0, 0, 0, 1, 0]) + (20).to_bytes(4, "little") + b"\0" * 20
    image = bytearray(24 * 2048)
    for offset, data in (
            sector(16, b"\1CD001\1" + b" " * 72 + (24).to_bytes(4, "little") + (24).to_bytes(4, "big")),
            sector(17, b"\0CD001\1" + b"EL TORITO SPECIFICATION".ljust(32, b"\0") + b"\0" * 32 +
                   (19).to_bytes(4, "little")),
            sector(18, b"\xffCD001\1"), sector(19, entry + initial), sector(20, boot_sector(text))):
        image[offset:offset + 2048] = data
    return bytes(image)


def test_firmware_boots_from_the_disk(run, tmp_path):
    (tmp_path / "disk").write_bytes(boot_sector("hello from the disk").ljust(1 << 20, b"\0"))
    p = run("run", "--snapshot", "-f", "raw", "-m", "64", "--accel", "tcg", "--nographic", "--no-net",
            tmp_path / "disk", timeout=60)
    assert "hello from the disk" in p.stdout


def test_firmware_boots_from_the_cd_when_asked(run, tmp_path):
    (tmp_path / "disk").write_bytes(boot_sector("hello from the disk").ljust(1 << 20, b"\0"))
    (tmp_path / "cd.iso").write_bytes(bootable_cd("hello from the CD"))
    p = run("run", "--snapshot", "-f", "raw", "-m", "64", "--accel", "tcg", "--nographic", "--no-net",
            "--cdrom", tmp_path / "cd.iso", "--boot", "d", tmp_path / "disk", timeout=60)
    assert "hello from the CD" in p.stdout


# ---------------------------------------------------------------- what is refused

@pytest.fixture
def blank(tmp_path):
    path = tmp_path / "blank"
    path.write_bytes(bytes(1 << 20))
    return path


def test_neither_snapshot_nor_write_is_refused_naming_both(run, blank):
    p = run("run", blank, status=1)
    assert "--snapshot" in p.stderr and "--write" in p.stderr


@pytest.mark.parametrize("args, word", [
    (["--snapshot", "--write"], "exclude"),
    (["--write", "--commit-on-exit"], "--snapshot"),
    (["--write", "--keep", "x"], "--snapshot"),
    (["--snapshot", "--keep", "x", "--commit-on-exit"], "exclude"),
    (["--snapshot", "--keep", "x", "--keep", "y"], "2 --keep for 1 disks"),
    (["--snapshot", "--nographic", "--vnc", ":1"], "exclude"),
    (["--snapshot", "--append", "x"], "--kernel"),
    (["--snapshot", "--boot", "c,menu=on"], "order"),
    (["--snapshot", "--no-net", "--forward", "1:2"], "--no-net"),
    (["--snapshot", "--forward", "22"], "two TCP ports"),
    (["--snapshot", "-m", "12x"], "12x"),
    (["--snapshot", "--smp", "0"], "smp"),
    (["--snapshot", "--accel", "magic"], "magic"),
])
def test_contradiction_is_refused(run, blank, fake, tmp_path, args, word):
    p = run("run", *fake("open('started', 'w')"), *args, "-f", "raw", blank, status=1, cwd=tmp_path)
    assert word in p.stderr
    assert not (tmp_path / "started").exists()


def test_existing_keep_file_is_refused_before_the_guest_starts(run, blank, fake, tmp_path):
    (tmp_path / "kept").write_text("precious")
    p = run("run", "--snapshot", "--keep", tmp_path / "kept", *fake("open('started', 'w')"),
            "-f", "raw", blank, status=1, cwd=tmp_path)
    assert "kept" in p.stderr
    assert (tmp_path / "kept").read_text() == "precious"
    assert not (tmp_path / "started").exists()


def test_missing_disk_is_refused_by_name(run, fake, tmp_path):
    p = run("run", "--snapshot", *fake(""), tmp_path / "nowhere", status=1)
    assert "nowhere" in p.stderr


def test_missing_qemu_is_an_error_with_its_name(run, blank):
    p = run("run", "--snapshot", "-f", "raw", "--qemu", "/nowhere/qemu", blank, status=1)
    assert "/nowhere/qemu" in p.stderr


# ---------------------------------------------------------------- the end

def test_exit_status_is_the_guests(run, blank, fake):
    run("run", "--snapshot", "-f", "raw", *fake("sys.exit(7)"), blank, status=7)


def test_status_of_the_real_qemu_is_passed_on(run, blank, scratch):
    p = run("run", "--snapshot", "--scratch", scratch, "-f", "raw", "--accel", "tcg", "--nographic",
            blank, "--", "-device", "no-such-device", status=1)
    assert "no-such-device" in p.stderr
    assert os.listdir(scratch) == []


def test_guest_killed_by_a_signal_gives_128_plus_its_number(run, blank, fake):
    run("run", "--snapshot", "-f", "raw", *fake("os.kill(os.getpid(), signal.SIGKILL)"), blank,
        status=137)


def test_dead_guest_commits_nothing(run, blank, fake):
    p = run("run", "--snapshot", "--commit-on-exit", "-f", "raw",
            *fake("disks[0].pwrite(b'z'*512, 0); os.kill(os.getpid(), signal.SIGKILL)"), blank,
            status=137)
    assert "nothing was committed" in p.stderr
    assert blank.read_bytes() == bytes(1 << 20)


def test_quiet_says_nothing(run, blank, fake):
    p = run("run", "--snapshot", "-q", "-f", "raw", *fake("disks[0].pwrite(b'z'*512, 0)"), blank)
    assert p.stdout == "" and p.stderr == ""


def test_extra_arguments_reach_qemu(run, blank, fake):
    p = run("run", "--snapshot", "-f", "raw", *fake("print(sys.argv[-2:], flush=True)"), blank,
            "--", "-device", "a,b=c d")
    assert "['-device', 'a,b=c d']" in p.stdout


def test_only_its_sockets_are_inherited(run, blank, fake):
    p = run("run", "--snapshot", "-f", "raw", *fake(
        "mine = [int(f) for f in os.listdir('/proc/self/fd') if int(f) > 2]\n"
        "links = [os.readlink(f'/proc/self/fd/{f}') for f in mine if os.path.exists(f'/proc/self/fd/{f}')]\n"
        "print('bad', [l for l in links if not l.startswith(('socket:', 'anon_inode:[eventpoll]', '/proc'))], flush=True)"),
        blank)
    assert "bad []" in p.stdout


@pytest.fixture
def started(strata, fake, blank, scratch):
    """A run whose guest is up and waits; gives (process, pid of the guest)."""
    procs = []

    def start(code, *args):
        p = subprocess.Popen([strata, "run", "--snapshot", "--scratch", scratch, "-f", "raw",
                              *fake(code + "\nprint('up', flush=True)\ntime.sleep(60)"), *args, blank],
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
        procs.append(p)
        assert p.stdout.readline() == "up\n"
        return p, child_of(p.pid)

    yield start
    for p in procs:
        p.kill()
        p.communicate()


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_guest_and_leaves_nothing(started, scratch, signo):
    p, guest = started("disks[0].pwrite(b'z'*65536, 0)")
    p.send_signal(signo)
    _, err = p.communicate(timeout=20)
    assert p.returncode == 128 + signo, err
    assert not alive(guest)
    assert os.listdir(scratch) == []


def test_guest_that_ignores_sigterm_is_killed(started):
    p, guest = started("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    p.terminate()
    time.sleep(0.3)
    p.terminate()  # asked twice: at once
    p.communicate(timeout=4)
    assert p.returncode == 143
    assert not alive(guest)


def test_kill_9_of_strata_takes_the_guest_along(started, scratch):
    p, guest = started("signal.signal(signal.SIGTERM, signal.SIG_IGN); disks[0].pwrite(b'z'*65536, 0)")
    p.kill()
    p.wait()
    wait_until(lambda: not alive(guest), what="guest gone")
    assert os.listdir(scratch) == []


def test_control_socket_commits_and_drops_under_a_running_guest(started, run, blank, tmp_path):
    """The guest writes z, which is committed, then y, which is dropped; it reads what is true."""
    ctl, step = tmp_path / "ctl", tmp_path / "step"
    code = ("print('up', flush=True); import time, pathlib\nstep = pathlib.Path(%r)\n"
            "def wait(n):\n while not step.exists() or step.read_text() != n: time.sleep(.01)\n"
            "disks[0].pwrite(b'z'*512, 0)\nstep.write_text('1')\nwait('2')\n"
            "disks[0].pwrite(b'y'*512, 0)\nstep.write_text('3')\nwait('4')\n"
            "assert disks[0].pread(512, 0) == b'z'*512\nstep.write_text('5')\ntime.sleep(60)" % str(step))
    p, _ = started(code, "--control", ctl)
    wait_until(lambda: step.exists() and step.read_text() == "1", what="first write")
    assert "disk0" in run("ctl", ctl, "status").stdout
    run("ctl", ctl, "commit")
    assert blank.read_bytes()[:512] == b"z" * 512
    step.write_text("2")
    wait_until(lambda: step.read_text() == "3", what="second write")
    run("ctl", ctl, "drop")
    assert "ends with its guest" in run("ctl", ctl, "stop", status=1).stderr
    step.write_text("4")
    wait_until(lambda: step.read_text() == "5", what="guest satisfied")
    p.terminate()
    p.communicate(timeout=20)
    assert blank.read_bytes()[:512] == b"z" * 512 and not ctl.exists()


def test_stopped_guest_commits_nothing(started, blank):
    p, _ = started("disks[0].pwrite(b'z'*512, 0)", "--commit-on-exit")
    p.terminate()
    _, err = p.communicate(timeout=20)
    assert "nothing was committed" in err
    assert blank.read_bytes() == bytes(1 << 20)


@pytest.fixture
def full(tmp_path):
    """A file system of 4 MiB, for a base that cannot take what is committed."""
    where = tmp_path / "full"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", where], check=True)
    yield where
    subprocess.run(["umount", where], check=True)


def test_changes_that_cannot_be_committed_are_saved_beside_the_disk(run, peer, fake, full, scratch, tmp_path):
    base, name = full / "base.raw", tmp_path / "disk.raw"
    with open(base, "wb") as f:
        f.truncate(16 << 20)
    name.symlink_to(base)  # beside it there is room
    p = run("run", "--snapshot", "--commit-on-exit", "--scratch", scratch, "-f", "raw", *fake(
        "[disks[0].pwrite(bytes([65 + i]) * (1 << 20), i << 20) for i in range(12)]"), name, status=1)
    saved = tmp_path / "disk.raw.uncommitted.qcow2"
    assert "No space left on device" in p.stderr and f"the guest's changes are saved in {saved}" in p.stderr
    base.write_bytes(b"")  # whatever the failed commit left there
    with open(base, "r+b") as f:
        f.truncate(16 << 20)
    peer("qemu-img", "check", "-q", saved)
    read = [x for i in range(12) for x in ("-c", f"read -P {65 + i} {i}M 1M")]
    out = peer("qemu-io", "-r", "-f", "qcow2", *read, saved).stdout
    assert "verification failed" not in out and out.count("read 1048576/1048576") == 12
    assert not list(scratch.iterdir())


def test_changes_that_nobody_can_take_are_told_so(run, fake, full, scratch):
    base = full / "base.raw"
    with open(base, "wb") as f:
        f.truncate(16 << 20)
    p = run("run", "--snapshot", "--commit-on-exit", "--scratch", scratch, "-f", "raw", *fake(
        "[disks[0].pwrite(b'x' * (1 << 20), i << 20) for i in range(12)]"), base, status=1)
    assert "the guest's changes could not be saved either" in p.stderr
    assert [f.name for f in full.iterdir()] == ["base.raw"]


def test_interrupt_that_ends_the_guest_first_still_commits_nothing(run, blank, fake):
    # Ctrl-C reaches both; the guest ends at once and with status 0.
    run("run", "--snapshot", "--commit-on-exit", "-f", "raw", *fake(
        "disks[0].pwrite(b'z'*512, 0); os.kill(os.getppid(), signal.SIGINT); os._exit(0)"), blank,
        status=130)
    assert blank.read_bytes() == bytes(1 << 20)


def test_real_guest_ends_on_sigterm(strata, disk, scratch, linux):
    before = sha256(disk)
    p = subprocess.Popen([strata, "run", "--snapshot", "--scratch", scratch, "-f", "raw",
                          *linux("echo up; sleep 100"), disk], stdin=subprocess.DEVNULL,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while "up" not in (line := p.stdout.readline()):
            assert line, p.stderr.read()
        guest = child_of(p.pid)
        assert "qemu-system" in os.readlink(f"/proc/{guest}/exe")
        p.terminate()
        p.communicate(timeout=20)
    finally:
        p.kill()
    assert p.returncode == 143
    assert not alive(guest)
    assert os.listdir(scratch) == []
    assert sha256(disk) == before


def test_terminal_is_as_before_after_a_killed_guest(strata, blank, fake):
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        code = ("import tty; tty.setraw(0); os.set_blocking(0, False)\n"
                "os.kill(os.getpid(), signal.SIGKILL)")
        p = subprocess.run([strata, "run", "--snapshot", "-f", "raw", *fake(code), blank],
                           stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
        assert p.returncode == 137
        assert termios.tcgetattr(slave) == before
        assert os.get_blocking(slave)
    finally:
        os.close(master)
        os.close(slave)
