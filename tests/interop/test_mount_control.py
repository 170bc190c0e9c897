# SPDX-License-Identifier: MIT
"""A mounted disk with a control socket; mounts beside and on top of one another; names that are hard to write down."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

MIB = 1 << 20
os.environ["PATH"] += ":/sbin:/usr/sbin"


def mounted():
    """Mount points, in the order in which they came."""
    with open("/proc/self/mountinfo") as f:
        return [line.split()[4].encode().decode("unicode_escape") for line in f]


def wait_until(true, what, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path):
    """An empty folder; whatever a failed test left mounted below tmp_path goes."""
    d = tmp_path / "mnt"
    d.mkdir()
    yield d
    for point in reversed(mounted()):
        if point.startswith(str(tmp_path)):
            subprocess.run(["umount", "-l", point], check=True)


@pytest.fixture
def image(tmp_path, run):
    raw, path = tmp_path / "d.raw", tmp_path / "d.qcow2"
    with open(raw, "wb") as f:
        f.truncate(16 * MIB)
    run("convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


@pytest.fixture
def ctl(run, tmp_path):
    def call(*args, **kw):
        return run("ctl", tmp_path / "c", *args, **kw)
    return call


def disk_status(ctl):
    return json.loads(ctl("status", "--output=json").stdout)["disks"][0]


def server_pid(point):
    return int(os.getxattr(point, "user.strata.pid"))


def write(path, data, at=0):
    """Not synced."""
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(data)


def test_a_mounted_snapshot_is_committed_with_what_was_written(run, peer, image, folder, ctl, tmp_path):
    run("mount", "--snapshot", "--control", tmp_path / "c", image, folder)
    write(folder / "disk", b"worth keeping" * 1000, 5 * MIB)
    ctl("commit")
    write(folder / "disk", b"thrown away", 7 * MIB)
    run("unmount", folder)
    peer("qemu-img", "check", image)
    run("convert", "-O", "raw", image, tmp_path / "after")
    after = (tmp_path / "after").read_bytes()
    assert after[5 * MIB:5 * MIB + 13000] == b"worth keeping" * 1000
    assert after[7 * MIB:8 * MIB] == bytes(MIB)


def test_a_mounted_snapshot_is_kept_and_dropped(run, peer, image, folder, ctl, tmp_path):
    run("mount", "--snapshot", "--control", tmp_path / "c", image, folder)
    write(folder / "disk", b"first", MIB)
    ctl("keep", tmp_path / "kept.qcow2")
    ctl("drop")
    assert (folder / "disk").read_bytes() == bytes(16 * MIB)
    write(folder / "disk", b"second", 2 * MIB)
    run("unmount", folder)
    peer("qemu-io", "-r", "-c", "read -P 0x66 1048576 1", tmp_path / "kept.qcow2")
    run("convert", "-O", "raw", tmp_path / "kept.qcow2", tmp_path / "after")
    after = (tmp_path / "after").read_bytes()
    assert after[MIB:MIB + 5] == b"first" and after[2 * MIB:2 * MIB + 6] == bytes(6)
    run("convert", "-O", "raw", image, tmp_path / "base")
    assert (tmp_path / "base").read_bytes() == bytes(16 * MIB)


def test_status_shows_the_disk_its_open_files_and_the_scratch(run, image, folder, ctl, tmp_path):
    run("mount", "--snapshot", "--scratch-size", "8M", "--control", tmp_path / "c", image, folder)
    assert json.loads(ctl("status", "--output=json").stdout)["program"] == "mount"
    with open(folder / "disk", "r+b") as f:
        f.write(os.urandom(MIB))
        f.flush()
        os.fsync(f.fileno())
        shown = disk_status(ctl)
        assert shown["snapshot"] and shown["size"] == 16 * MIB
        assert shown["scratch"]["limit"] == 8 * MIB and shown["scratch"]["used"] >= MIB
        assert shown["export"]["type"] == "fuse" and shown["export"]["clients"] == 1
        assert shown["export"]["bytes-written"] >= MIB and shown["export"]["requests"] > 0 and shown["export"]["errors"] == 0
    wait_until(lambda: disk_status(ctl)["export"]["clients"] == 0, "the file stays open")
    run("unmount", folder)
    assert not (tmp_path / "c").exists()


def test_a_commit_without_a_snapshot_is_refused(run, image, folder, ctl, tmp_path):
    run("mount", "--control", tmp_path / "c", image, folder)
    assert "no temporary snapshot" in ctl("commit", status=1).stderr
    run("unmount", folder)


def test_files_are_written_while_commits_run(run, strata, peer, image, folder, tmp_path):
    run("mount", "--snapshot", "--control", tmp_path / "c", image, folder)
    ctl = subprocess.Popen(["sh", "-c", 'for i in $(seq 10); do "$0" ctl "$1" commit || exit 1; done', strata,
                            tmp_path / "c"])
    fd, turn = os.open(folder / "disk", os.O_RDWR), 0
    while ctl.poll() is None:
        turn += 1
        for at in range(0, 4 * MIB, 65536):
            os.pwrite(fd, turn.to_bytes(8, "little") * 512, at)
        os.fsync(fd)
        assert os.pread(fd, 8, 65536) == turn.to_bytes(8, "little")
    assert ctl.returncode == 0
    os.close(fd)
    run("ctl", tmp_path / "c", "commit")
    run("unmount", folder)
    peer("qemu-img", "check", image)
    run("convert", "-O", "raw", image, tmp_path / "after")
    with open(tmp_path / "after", "rb") as f:
        for at in range(0, 4 * MIB, 65536):
            f.seek(at)
            assert f.read(4096) == turn.to_bytes(8, "little") * 512


def test_a_file_system_is_committed_with_what_its_caches_hold(run, folder, ctl, tmp_path):
    raw = tmp_path / "fs.raw"
    with open(raw, "wb") as f:
        f.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", raw], check=True, capture_output=True)
    run("mount", "--fs", "--snapshot", "--control", tmp_path / "c", "-f", "raw", raw, folder)
    (folder / "kept").write_text("k" * 100000)
    ctl("commit")
    (folder / "lost").write_text("l" * 100000)
    run("unmount", folder)
    subprocess.run(["e2fsck", "-fp", raw], check=False, capture_output=True)
    dump = subprocess.run(["debugfs", "-R", "cat kept", raw], check=True, capture_output=True).stdout
    assert dump == b"k" * 100000
    names = subprocess.run(["debugfs", "-R", "ls -p /", raw], check=True, capture_output=True, text=True).stdout
    assert "/lost/" not in names


def test_stop_ends_the_mount(run, image, folder, ctl, tmp_path):
    run("mount", "--control", tmp_path / "c", image, folder)
    ctl("stop")
    wait_until(lambda: str(folder) not in mounted(), "it is mounted still")
    wait_until(lambda: not (tmp_path / "c").exists(), "the socket is left")


def test_kill_9_leaves_no_control_socket(run, image, folder, tmp_path):
    run("mount", "--control", tmp_path / "c", image, folder)
    os.kill(server_pid(folder), signal.SIGKILL)
    wait_until(lambda: str(folder) not in mounted(), "it is mounted still")
    wait_until(lambda: not (tmp_path / "c").exists(), "the socket is left")


def state(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def children(parent):
    found = []
    for p in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(p.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(p.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def test_the_guard_of_a_killed_server_leaves_the_mount_of_another(run, strata, image, folder, tmp_path):
    other = tmp_path / "other.qcow2"
    shutil.copy(image, other)
    server = subprocess.Popen([strata, "mount", "--foreground", image, folder])
    wait_until(lambda: str(folder) in mounted(), "not mounted")
    run("mount", other, folder)
    second = server_pid(folder)
    wait_until(lambda: len(children(server.pid)) == 1, "no guard, or a helper that stays")
    guard, = children(server.pid)
    server.kill()
    server.wait(30)
    wait_until(lambda: state(guard) in (None, "Z"), "the guard does not end")
    assert server_pid(folder) == second
    assert len((folder / "disk").read_bytes()) == 16 * MIB
    run("unmount", folder)


@pytest.mark.parametrize("name", ["with blank", "a,b=c", "tab\there", "back\\slash", "-ro", "quote\"s'", " - fuse x",
                                  "new\nline", "\u00fcml\u00e4ut"])
def test_hard_names_are_mounted_found_and_unmounted(run, image, folder, tmp_path, name):
    point, hard = folder / name, tmp_path / ("img " + name)
    point.mkdir()
    shutil.copy(image, hard)
    run("mount", "-f", "qcow2", hard, point)
    assert os.listdir(point) == ["disk"]
    run("unmount", point)
    assert not any(m.startswith(str(tmp_path)) for m in mounted())


def test_a_symlink_in_the_way_leads_to_the_folder(run, image, folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    run("mount", image, tmp_path / "link")
    assert str(folder) in mounted()
    run("unmount", tmp_path / "link")
    assert str(folder) not in mounted()


def test_a_folder_that_somebody_uses_is_mounted_on_and_given_back(run, image, folder):
    (folder / "below").write_text("hidden")
    with open(folder / "below") as f:
        run("mount", image, folder)
        assert os.listdir(folder) == ["disk"] and f.read() == "hidden"
        run("unmount", folder)
    assert os.listdir(folder) == ["below"]
