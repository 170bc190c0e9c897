# SPDX-License-Identifier: MIT
"""Bad input that several verbs are shown, and how they must answer."""
import os
import socket
import subprocess


def assert_one_line_error(p, *parts):
    """One line that names the verb (and maybe a hint below), nothing on standard output."""
    lines = p.stderr.splitlines()
    assert 1 <= len(lines) <= 2, p.stderr
    assert lines[0].startswith("strata: ")
    assert all(line.startswith("  ") for line in lines[1:]), p.stderr
    for part in parts:
        assert part in lines[0], f"{part!r} not in {lines[0]!r}"
    assert p.stdout == ""


def without_root(*argv):
    """argv with the powers of root dropped, so that file modes count for root, too."""
    if os.geteuid():
        return list(map(str, argv))
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *map(str, argv)]


def make_socket(path):
    # The name of a socket is at most 107 bytes long.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        s = socket.socket(socket.AF_UNIX)
        s.bind(path.name)
        s.close()
    finally:
        os.chdir(here)


# name -> (function that makes it at the path, words of the refusal)
NOT_DISKS = {
    "missing": (lambda p: None, ["No such file or directory"]),
    "directory": (lambda p: p.mkdir(), ["directory"]),
    "fifo": (lambda p: os.mkfifo(p), ["FIFO"]),
    "socket": (make_socket, ["socket"]),
    "dangling-link": (lambda p: p.symlink_to("nowhere"), ["No such file or directory"]),
    "link-loop": (lambda p: p.symlink_to(p.name), ["symbolic links"]),
}


def run_unreadable(strata, verb, path, *args):
    path.write_bytes(b"x" * 4096)
    path.chmod(0)
    return subprocess.run(without_root(strata, verb, *args, path), capture_output=True, text=True,
                          timeout=20)
