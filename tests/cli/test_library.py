# SPDX-License-Identifier: MIT
"""What `make install` puts down for programs that use strata as a library."""
import os
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("BUILD", "build")

PROGRAM = r"""
#include <stdio.h>
#include <strata.h>

int main(int argc, char **argv)
{
    struct strata *s;
    struct strata_disk *d;
    struct strata_error e;
    struct strata_open_options o = {0};
    char got[6] = "";
    o.flags = STRATA_READ_WRITE;
    if (strata_new(&s, &e) < 0 || strata_create(s, argv[1], "qcow2", 1 << 20, NULL, &e) < 0 ||
        strata_open(s, argv[1], &o, &d, &e) < 0) {
        fprintf(stderr, "%s\n", e.message);
        return 1;
    }
    strata_pwrite(d, "bytes", 5, 12345);
    strata_pread(d, got, 5, 12345);
    printf("%s %s %llu\n", strata_format(d), got, (unsigned long long)strata_size(d));
    int r = strata_close(d);
    strata_free(s);
    return r != 0;
}
"""


@pytest.mark.plain_build
def test_a_program_outside_compiles_links_and_runs(tmp_path, strata, peer):
    source, prog, image = tmp_path / "p.c", tmp_path / "p", tmp_path / "d.qcow2"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", f"-I{ROOT}/include", source,
                    f"-L{BUILD}/src", "-lstrata", f"-Wl,-rpath,{BUILD.resolve()}/src", "-o", prog], check=True)
    p = subprocess.run([prog, image], capture_output=True, text=True, timeout=60)
    assert (p.returncode, p.stdout) == (0, "qcow2 bytes 1048576\n"), p.stderr
    peer("qemu-img", "check", image)


def test_the_header_stands_alone_in_cplusplus(tmp_path):
    source = tmp_path / "p.cc"
    source.write_text('#include <strata.h>\nint main() { return strata_version() == nullptr; }\n')
    subprocess.run(["clang", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/include", source],
                   check=True)


@pytest.mark.plain_build
def test_the_library_shows_only_the_names_of_its_header():
    header = (ROOT / "include/strata.h").read_text()
    declared = set(re.findall(r"\b(strata_\w+)\(", header))
    p = subprocess.run(["nm", "-D", "--defined-only", BUILD / "src/libstrata.so"], capture_output=True,
                       text=True, check=True)
    shown = {line.split()[-1].split("@")[0] for line in p.stdout.splitlines()}
    assert shown == declared
