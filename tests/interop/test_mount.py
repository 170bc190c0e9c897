# SPDX-License-Identifier: MIT
"""mount, unmount, attach, detach: disks in the file system tree, with sfdisk, ext4, xfs and the kernel beside us."""
import errno
import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import pytest

MIB = 1 << 20
os.environ["PATH"] += ":/sbin:/usr/sbin"


def mounts():
    with open("/proc/self/mountinfo") as f:
        return {line.split()[4]: line.split(" - ")[1].split()[:2] for line in f}


def wait_until(true, what, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.fixture
def folder(tmp_path, peer):
    """An empty folder; whatever a failed test left mounted there goes."""
    d = tmp_path / "mnt"
    d.mkdir()
    yield d
    while str(d) in mounts():
        subprocess.run(["umount", "-l", d], check=True)


@pytest.fixture
def parted(tmp_path, run):
    """A qcow2 of 64 MiB with a GPT: 20 MiB, 20 MiB, and random bytes at the head of both."""

    def make(table="label: gpt\n,20M\n,20M\n"):
        raw = tmp_path / "raw.img"
        with open(raw, "wb") as f:
            f.truncate(64 * MIB)
        subprocess.run(["sfdisk", "-q", raw], input=table, text=True, check=True, capture_output=True)
        with open(raw, "r+b") as f:
            for at in (1, 21):
                f.seek(at * MIB)
                f.write(random.Random(at).randbytes(MIB))
        run("convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / "d.qcow2")
        return raw, tmp_path / "d.qcow2"

    return make


def digest(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def server_pid(folder):
    return int(os.getxattr(folder, "user.strata.pid"))


def test_disk_and_partitions_are_files_with_the_image_content(run, parted, folder):
    raw, image = parted()
    run("mount", image, folder)
    assert sorted(os.listdir(folder)) == ["disk", "p1", "p2"]
    whole = raw.read_bytes()
    assert (folder / "disk").read_bytes() == whole
    assert (folder / "p1").read_bytes() == whole[MIB:21 * MIB]
    assert (folder / "p2").read_bytes() == whole[21 * MIB:41 * MIB]
    run("unmount", folder)
    assert str(folder) not in mounts() and os.listdir(folder) == []


def test_a_mount_is_read_only_unless_asked(run, parted, folder):
    _, image = parted()
    before = digest(image)
    run("mount", image, folder)
    with pytest.raises(OSError) as caught:
        open(folder / "disk", "r+b")
    assert caught.value.errno in (errno.EROFS, errno.EACCES)
    run("unmount", folder)
    assert digest(image) == before


def test_what_is_written_is_in_the_image_when_unmount_returns(run, peer, parted, folder, tmp_path):
    raw, image = parted()
    run("mount", "--write", image, folder)
    data = random.Random(7).randbytes(3 * MIB + 77)
    for path, at in (("p2", 5 * MIB + 13), ("disk", 50 * MIB + 1)):
        with open(folder / path, "r+b") as f:
            f.seek(at)
            f.write(data)
    run("unmount", folder)
    with open(raw, "r+b") as f:
        for at in (26 * MIB + 13, 50 * MIB + 1):
            f.seek(at)
            f.write(data)
    peer("qemu-img", "check", image)
    peer("qemu-img", "compare", raw, image)


def test_a_snapshot_mount_leaves_the_image_as_it_was(run, parted, folder):
    _, image = parted()
    before = digest(image)
    run("mount", "--snapshot", image, folder)
    with open(folder / "p1", "r+b") as f:
        f.write(b"changed" * 1000)
        os.fsync(f.fileno())
    assert (folder / "p1").read_bytes()[:7] == b"changed"
    run("unmount", folder)
    assert digest(image) == before


def test_a_full_scratch_space_is_enospc_and_the_mount_lives(run, parted, folder):
    _, image = parted()
    run("mount", "--snapshot", "--scratch-size", "4M", image, folder)
    fd = os.open(folder / "disk", os.O_RDWR)
    with pytest.raises(OSError) as caught:
        for i in range(16):
            os.pwrite(fd, os.urandom(MIB), (44 + i) * MIB)
            os.fsync(fd)
    assert caught.value.errno == errno.ENOSPC
    os.close(fd)
    assert len((folder / "p1").read_bytes()) == 20 * MIB
    run("unmount", folder)


def test_holes_are_seen_punched_and_zeroed(run, parted, folder, tmp_path):
    raw, image = parted()
    run("mount", "--write", image, folder)
    fd = os.open(folder / "p1", os.O_RDWR)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    assert os.lseek(fd, 0, os.SEEK_HOLE) == MIB
    with pytest.raises(OSError) as caught:
        os.lseek(fd, 2 * MIB, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    subprocess.run(["fallocate", "-p", "-o", "0", "-l", str(MIB // 2), folder / "p1"], check=True)
    assert os.lseek(fd, 0, os.SEEK_DATA) == MIB // 2
    assert os.pread(fd, MIB // 2, 0) == bytes(MIB // 2)
    with pytest.raises(OSError) as caught:
        os.posix_fallocate(fd, 20 * MIB, MIB)
    os.close(fd)
    with pytest.raises(OSError):
        os.truncate(folder / "p1", MIB)
    run("unmount", folder)


def test_a_file_as_mount_point_becomes_the_disk(run, parted, tmp_path):
    raw, image = parted()
    point = tmp_path / "here"
    point.write_bytes(b"")
    run("mount", image, point)
    try:
        assert digest(point) == digest(raw)
    finally:
        run("unmount", point)
    assert point.read_bytes() == b""


def test_a_file_as_mount_point_has_the_size_of_the_disk_and_takes_writes(run, peer, parted, tmp_path):
    raw, image = parted()
    point = tmp_path / "here"
    point.write_bytes(b"")
    run("mount", "--write", image, point)
    try:
        assert point.stat().st_size == 64 * MIB
        for path in (raw, point):
            with open(path, "r+b") as f:
                f.seek(30 * MIB + 5)
                f.write(b"through the file" * 1000)
    finally:
        run("unmount", point)
    peer("qemu-img", "compare", raw, image)


def test_logical_partitions_have_the_numbers_that_linux_gives(run, parted, folder):
    raw, image = parted("label: dos\n1 : size=10M\n2 : size=40M, type=E\n5 : size=5M\n6 : size=6M\n")
    run("mount", image, folder)
    listed = subprocess.run(["sfdisk", "-l", "-o", "device,start,sectors", raw], check=True,
                            capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines() if line.startswith(str(raw))]
    whole = raw.read_bytes()
    names = {"disk"}
    for device, start, sectors in rows:
        number = device[len(str(raw)):]
        if number == "2":  # the extended one holds the others
            continue
        names.add("p" + number)
        first = int(start) * 512
        assert (folder / ("p" + number)).read_bytes() == whole[first:first + int(sectors) * 512]
    assert set(os.listdir(folder)) == names == {"disk", "p1", "p5", "p6"}
    run("unmount", folder)


def test_the_second_copy_of_a_gpt_serves_when_the_first_is_damaged(run, parted, folder):
    raw, _ = parted()
    with open(raw, "r+b") as f:
        f.seek(512 + 40)
        f.write(b"\xff" * 8)
    run("mount", "-f", "raw", raw, folder)
    assert "p2" in os.listdir(folder)
    run("unmount", folder)


def test_a_gpt_damaged_in_both_copies_is_named_and_the_disk_alone_shown(run, parted, folder):
    raw, _ = parted()
    with open(raw, "r+b") as f:
        for at in (512 + 40, 64 * MIB - 512 + 40):
            f.seek(at)
            f.write(b"\xff" * 8)
    p = run("mount", "-f", "raw", raw, folder)
    assert "both copies of the GPT partition table are damaged" in p.stderr
    assert os.listdir(folder) == ["disk"]
    run("unmount", folder)


def test_hostile_partition_tables_end_and_stay_inside_the_disk(run, folder, tmp_path):
    rnd = random.Random(99)
    image = tmp_path / "hostile.img"
    for turn in range(6):
        data = bytearray(MIB)
        for sector in (0, 8, 16):
            at = sector * 512
            for entry in range(4):
                kind = rnd.choice([0x05, 0x83, 0x0f, 0xee])
                data[at + 446 + entry * 16:at + 462 + entry * 16] = (
                    bytes([0, 0, 0, 0, kind, 0, 0, 0]) +
                    rnd.choice([0, 8, 16, 2047, 0xffffffff]).to_bytes(4, "little") +
                    rnd.choice([0, 8, 2048, 0xffffffff]).to_bytes(4, "little"))
            data[at + 510:at + 512] = b"\x55\xaa"
        image.write_bytes(data)
        run("mount", "-f", "raw", image, folder)
        for name in os.listdir(folder):
            assert 0 < (folder / name).stat().st_size <= MIB
        run("unmount", folder)


def make_fs(kind, path):
    with open(path, "wb") as f:
        f.truncate(320 * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", path], check=True, capture_output=True)


def fsck(kind, path):
    command = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n"]}[kind]
    return subprocess.run([*command, path], capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_is_mounted_changed_and_clean_afterwards(run, peer, folder, tmp_path, kind):
    raw, image, out = tmp_path / "fs.raw", tmp_path / "fs.qcow2", tmp_path / "out.raw"
    make_fs(kind, raw)
    run("convert", "-f", "raw", "-O", "qcow2", raw, image)
    run("mount", "--fs", "--write", image, folder)
    (folder / "etc").mkdir()
    (folder / "etc/shadow").write_text("root::0:::::\n")
    run("unmount", folder)
    peer("qemu-img", "check", image)
    run("convert", "-O", "raw", image, out)
    assert fsck(kind, out).returncode == 0
    run("mount", "--fs", image, folder)
    assert (folder / "etc/shadow").read_text() == "root::0:::::\n"
    with pytest.raises(OSError):
        (folder / "new").write_text("x")
    run("unmount", folder)


def test_plain_umount_ends_the_server_too(run, folder, tmp_path):
    raw, image = tmp_path / "fs.raw", tmp_path / "fs.qcow2"
    make_fs("ext4", raw)
    run("convert", "-f", "raw", "-O", "qcow2", raw, image)
    run("mount", "--fs", "--write", image, folder)
    (folder / "a").write_text("kept")
    subprocess.run(["umount", folder], check=True)
    # The image is ours again as soon as the server has let go of it.
    wait_until(lambda: run("check", image, status=None).returncode == 0, "the server goes on")
    run("mount", "--fs", image, folder)
    assert (folder / "a").read_text() == "kept"
    run("unmount", folder)


def test_the_only_partition_is_meant_and_several_are_listed(run, parted, folder):
    _, image = parted()
    p = run("mount", "--fs", image, folder, status=1)
    assert "several partitions: 1, 2" in p.stderr and "--partition" in p.stderr
    p = run("mount", "--fs", f"{image}:7", folder, status=1)
    assert "no partition 7; it has 1, 2" in p.stderr
    assert str(folder) not in mounts()


def hidden_of(folder):
    source = mounts()[str(folder)][1]
    name = pathlib.Path(source).name
    return pathlib.Path(pathlib.Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()).parent, source


def test_kill_9_leaves_no_mount_device_or_folder(run, folder, tmp_path):
    raw = tmp_path / "fs.raw"
    make_fs("ext4", raw)
    run("mount", "--fs", "--snapshot", "-f", "raw", raw, folder)
    (folder / "a").write_text("lost with the overlay")
    hidden, device = hidden_of(folder)
    os.kill(server_pid(hidden), signal.SIGKILL)
    wait_until(lambda: str(folder) not in mounts() and str(hidden) not in mounts(), "mounts are left")
    wait_until(lambda: not hidden.exists(), "the hidden folder is left")
    backing = pathlib.Path(f"/sys/block/{pathlib.Path(device).name}/loop/backing_file")
    wait_until(lambda: not backing.exists() or str(hidden) not in backing.read_text(), "the loop device is left")


def test_what_was_synced_survives_kill_9(run, peer, folder, tmp_path):
    raw, image, out = tmp_path / "fs.raw", tmp_path / "fs.qcow2", tmp_path / "out.raw"
    make_fs("ext4", raw)
    run("convert", "-f", "raw", "-O", "qcow2", raw, image)
    run("mount", "--fs", "--write", image, folder)
    with open(folder / "kept", "wb") as f:
        f.write(b"k" * 100000)
        f.flush()
        os.fsync(f.fileno())
    hidden, _ = hidden_of(folder)
    os.kill(server_pid(hidden), signal.SIGKILL)
    wait_until(lambda: str(folder) not in mounts() and not hidden.exists(), "something is left")
    assert peer("qemu-img", "check", image, status=None).returncode in (0, 3)
    run("convert", "-O", "raw", image, out)
    subprocess.run(["e2fsck", "-fp", out], check=False, capture_output=True)
    assert fsck("ext4", out).returncode == 0
    dump = subprocess.run(["debugfs", "-R", "cat kept", out], check=True, capture_output=True).stdout
    assert dump == b"k" * 100000


def test_sigterm_unmounts_in_order(run, peer, parted, folder):
    _, image = parted()
    run("mount", "--write", image, folder)
    pid = server_pid(folder)
    with open(folder / "disk", "r+b") as f:
        f.seek(60 * MIB)
        f.write(b"late" * 1000)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: str(folder) not in mounts(), "still mounted")
    wait_until(lambda: run("io", "-r", "-c", "read -P 0x6c 60M 1", image, status=None).returncode == 0, "not written")
    peer("qemu-img", "check", image)


def test_a_mount_in_use_is_not_torn_away(run, parted, folder):
    _, image = parted()
    run("mount", image, folder)
    with open(folder / "disk", "rb") as f:
        p = run("unmount", folder, status=1)
        assert "busy" in p.stderr.lower()
        assert len(f.read(4096)) == 4096
    run("unmount", folder)


def test_unmount_refuses_what_is_not_ours(run, folder, tmp_path):
    p = run("unmount", folder, status=1)
    assert "nothing is mounted there" in p.stderr
    p = run("unmount", "/proc", status=1)
    assert "somebody else" in p.stderr


def test_attach_gives_a_block_device_with_partitions(run, peer, parted):
    raw, image = parted()
    device = run("attach", "--write", image).stdout.strip()
    try:
        assert int(subprocess.check_output(["blockdev", "--getsize64", device])) == 64 * MIB
        with open(device, "r+b") as f:
            assert f.read(MIB) == raw.read_bytes()[:MIB]
            f.seek(45 * MIB)
            f.write(b"by the device")
            f.flush()
            os.fsync(f.fileno())
    finally:
        run("detach", device)
    assert not pathlib.Path(f"/sys/block/{pathlib.Path(device).name}/loop/backing_file").exists()
    peer("qemu-img", "check", image)
    with open(raw, "r+b") as f:
        f.seek(45 * MIB)
        f.write(b"by the device")
    peer("qemu-img", "compare", raw, image)


def test_detach_refuses_a_device_of_somebody_else(run):
    assert "not a device of" in run("detach", "/dev/null", status=1).stderr


@pytest.mark.parametrize("how", ["--commit-on-exit", "--keep"])
def test_the_changes_of_a_snapshot_can_be_committed_or_kept(run, strata, peer, parted, folder, tmp_path, how):
    raw, image = parted()
    kept = tmp_path / "kept.qcow2"
    more = [how] if how == "--commit-on-exit" else [how, kept]
    before = digest(image)
    server = subprocess.Popen([strata, "mount", "--foreground", "--snapshot", *more, image, folder])
    wait_until(lambda: str(folder) in mounts(), "not mounted")
    with open(folder / "disk", "r+b") as f:
        f.seek(55 * MIB)
        f.write(b"worth keeping")
    run("unmount", folder)
    assert server.wait(20) == 0
    with open(raw, "r+b") as f:
        f.seek(55 * MIB)
        f.write(b"worth keeping")
    result = kept if how == "--keep" else image
    peer("qemu-img", "check", result)
    peer("qemu-img", "compare", raw, result)
    assert (digest(image) == before) == (how == "--keep")


def test_keep_without_foreground_is_refused(run, parted, folder, tmp_path):
    _, image = parted()
    p = run("mount", "--snapshot", "--keep", tmp_path / "k", image, folder, status=1)
    assert "--foreground" in p.stderr


def test_without_root_ext4_is_mounted_through_fuse2fs(run, strata, tmp_path):
    home = tmp_path / "home"
    image = home / "fs.raw"
    point = home / "mnt"
    point.mkdir(parents=True)
    make_fs("ext4", image)
    for p in (*tmp_path.parents, tmp_path):
        if str(p).startswith("/tmp/pytest"):
            os.chmod(p, 0o755)
    for p in (home, image, point):
        os.chown(p, 65534, 65534)
    program = home / "strata"
    shutil.copy(strata, program)
    who = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]

    def user(*args):
        return subprocess.run([*who, program, *map(str, args)], capture_output=True, text=True, timeout=60)

    p = user("mount", "--fs", "--write", "-f", "raw", image, point)
    assert p.returncode == 0, p.stderr
    subprocess.run([*who, "sh", "-c", f"echo reset > {point}/shadow"], check=True)
    p = user("unmount", point)
    assert p.returncode == 0, p.stderr
    assert fsck("ext4", image).returncode == 0
    dump = subprocess.run(["debugfs", "-R", "cat shadow", image], check=True, capture_output=True).stdout
    assert dump == b"reset\n"
