# SPDX-License-Identifier: MIT
"""The frame around the verbs: help, options, suggestions, output that cannot be written."""
import os
import subprocess

import pytest

VERBS = ["info", "create", "check", "map", "help"]


def words(run):
    """The commands that the overview lists."""
    lines = run("--help").stdout.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    return [line.split()[0] for line in lines]


def test_overview_lists_every_verb_and_the_formats(run):
    p = run("--help")
    assert set(VERBS) <= set(words(run))
    assert "raw" in p.stdout.split("Formats:")[1]
    assert p.stderr == ""


def test_every_verb_has_help_on_both_spellings(run):
    for verb in words(run):
        p = run(verb, "--help")
        assert p.stdout.startswith(f"Usage: strata {verb}")
        assert run("help", verb).stdout == p.stdout


def test_help_fits_eighty_columns(run):
    for verb in words(run):
        for line in run(verb, "--help").stdout.splitlines():
            if not line.startswith(("  strata", "Usage:", "      ")):
                assert len(line) <= 80, line


def test_no_arguments_is_an_error_with_help(run):
    p = run(status=1)
    assert p.stdout == ""
    assert "Usage: strata COMMAND" in p.stderr


def test_version(run):
    name, number = run("--version").stdout.split()
    assert name == "strata" and number.count(".") == 2


def test_unknown_verb_suggests_the_nearest(run):
    p = run("inof", status=1)
    assert p.stderr == "strata: unknown command 'inof'\n  did you mean 'info'?\n"


def test_unknown_verb_cannot_drive_the_terminal(run):
    assert "\x1b" not in run("\x1b[2J", status=1).stderr


def test_unknown_long_option_suggests_the_nearest(run):
    p = run("info", "--outptu=json", "x", status=1)
    assert p.stderr == "strata: info: unknown option '--outptu'\n  did you mean '--output'?\n"


def test_unknown_letter_points_at_help(run):
    p = run("info", "-Z", "x", status=1)
    assert p.stderr == "strata: info: unknown option '-Z'\n  see 'strata info --help'\n"


@pytest.mark.parametrize("args, text", [
    (["info"], "arguments are missing: info takes FILE"),
    (["info", "a", "b"], "unexpected argument 'b'"),
    (["info", "--output", "xml", "a"], "option '--output': 'xml' is not one of human, json"),
    (["info", "--output"], "option '--output' needs a value (FORM)"),
    (["info", "-f"], "option '-f' needs a value (FMT)"),
    (["info", "--backing-chain=yes", "a"], "option '--backing-chain' takes no value"),
    (["map", "-s", "12x", "a"], "option '-s': size '12x' is not a size"),
    (["map", "-s", "-1", "a"], "option '-s': size '-1' is not a size"),
    (["map", "-s9E", "a"], "option '-s': size '9E' is larger than 9223372036854775807 bytes"),
])
def test_misuse_is_one_clear_line(run, args, text):
    p = run(*args, status=1)
    assert p.stderr.splitlines()[0] == f"strata: {args[0]}: {text}"
    assert p.stdout == ""


def test_spellings_of_options_mean_the_same(run, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 512)
    a = tmp_path / "a"
    want = run("info", "--output=json", "--format=raw", a).stdout
    for args in (["--output", "json", "--format", "raw", a], [a, "-f", "raw", "--output=json"],
                 ["-Ufraw", "--output=json", a], ["--output=human", "--output=json", "-f", "raw", a],
                 ["--output=json", "-fraw", "--", a]):
        assert run("info", *args).stdout == want


def test_a_name_that_begins_with_a_dash_goes_behind_two(run, tmp_path):
    (tmp_path / "-a").write_bytes(b"x" * 512)
    assert "image: -a\n" in run("info", "--", "-a", cwd=tmp_path).stdout


def test_help_wins_over_missing_arguments(run):
    assert run("info", "-h").stdout == run("info", "--help").stdout


def test_full_standard_output_is_an_error(strata):
    with open("/dev/full", "w") as full:
        p = subprocess.run([strata, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert p.returncode == 1
    assert p.stderr == "strata: writing to standard output: No space left on device\n"


def test_closed_standard_output_is_an_error_and_hits_no_image(strata, tmp_path):
    image = tmp_path / "a"
    image.write_bytes(b"x" * 512)
    p = subprocess.run(["sh", "-c", 'exec "$0" info "$1" >&-', strata, image],
                       stderr=subprocess.PIPE, text=True)
    assert p.returncode == 1
    assert "standard output" in p.stderr
    assert image.read_bytes() == b"x" * 512


def test_no_image_gets_the_number_of_a_closed_standard_descriptor(strata, tmp_path):
    """What is printed would be written into it."""
    (tmp_path / "a").write_bytes(b"x" * 512)
    log = tmp_path / "log"
    subprocess.run(["sh", "-c", 'exec strace -e trace=openat,eventfd2,socket -o "$0" "$@" '
                    "<&- >&- 2>&-", log, strata, "convert", "-O", "raw", tmp_path / "a",
                    tmp_path / "b"], env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})
    opened = [line for line in log.read_text().splitlines() if line.endswith((" = 0", " = 1", " = 2"))]
    # The program's loader may use and close the numbers before main runs.
    low = [line for line in opened if not any(s in line for s in (".so", "/dev/null", "/proc/", "/sys/"))]
    assert len([line for line in opened if "/dev/null" in line]) == 3
    assert low == []


def test_reader_that_left_is_an_error_not_a_signal(strata, tmp_path):
    image = tmp_path / "a"
    with open(image, "wb") as f:
        for i in range(4000):
            f.seek(i * 131072)
            f.write(b"x")
    r, w = os.pipe()
    os.close(r)
    p = subprocess.run([strata, "map", "--output=json", image], stdout=w, stderr=subprocess.PIPE,
                       text=True)
    os.close(w)
    assert p.returncode == 1
    assert "Broken pipe" in p.stderr


def test_man_page_is_clean_roff_and_names_every_option(run, peer):
    page = run("help", "--man").stdout
    assert page.startswith(".TH STRATA 1")
    for verb in words(run):
        assert f"strata {verb}" in page
    assert "\\-\\-backing\\-chain" in page
    assert not [line for line in page.splitlines() if line.startswith("'")]


@pytest.mark.parametrize("program", ["qemu-img", "qemu-io", "qemu-nbd"])
def test_drop_in_names_have_a_page_and_a_completion_of_their_own(run, tmp_path, program):
    page = run("help", "--man", "--for", program).stdout
    assert page.startswith(".TH STRATA\\-" + program.upper().replace("-", "\\-"))
    assert not [line for line in page.splitlines() if line.startswith("'")]
    assert "\\-\\-trust" not in page and "\\-\\-object" in page
    if program == "qemu-img":
        # Letters that other rows have there, and none that only strata has.
        assert ".SS qemu\\-img convert" in page and ".SS qemu\\-img serve" not in page
        assert "\\-\\-source\\-format=FMT" in page and "\\-T MODE" in page
        assert complete(run, tmp_path, program, "conv") == ["convert"]
        assert complete(run, tmp_path, program, "ser") == []
        assert "--backing-chain" in complete(run, tmp_path, program, "info", "--b")
        assert complete(run, tmp_path, program, "info", "--tru") == []
        assert "-T" in complete(run, tmp_path, program, "check", "-")
        assert complete(run, tmp_path, program, "map", "--output", "j") == ["json"]
    else:
        assert complete(run, tmp_path, program, "--image") == ["--image-opts"]
        assert "qcow2" in complete(run, tmp_path, program, "-f", "qc")
    if program == "qemu-io":
        assert "aio_write" in page


def complete(run, tmp_path, *line):
    script = tmp_path / "strata.bash"
    dropin = [] if line[0] == "strata" else ["--for", line[0]]
    script.write_text(run("help", "--completion", "bash", *dropin).stdout)
    function = "_strata" if not dropin else "_strata_" + line[0].replace("-", "_")
    words = " ".join(f"'{w}'" for w in line)
    p = subprocess.run(
        ["bash", "-c", f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}; "
         f"{function} 2>/dev/null; printf '%s\\n' \"${{COMPREPLY[@]}}\""],
        capture_output=True, text=True, cwd=tmp_path, check=True)
    return p.stdout.split()


def test_completion_of_verbs_options_values_and_files(run, tmp_path):
    (tmp_path / "disk.img").touch()
    assert complete(run, tmp_path, "strata", "inf") == ["info"]
    assert "--backing-chain" in complete(run, tmp_path, "strata", "info", "--b")
    assert complete(run, tmp_path, "strata", "info", "--output", "j") == ["json"]
    assert complete(run, tmp_path, "strata", "info", "--output", "=", "j") == ["json"]
    assert "raw" in complete(run, tmp_path, "strata", "info", "-f", "")
    assert complete(run, tmp_path, "strata", "info", "di") == ["disk.img"]
