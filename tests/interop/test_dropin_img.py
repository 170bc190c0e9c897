# SPDX-License-Identifier: MIT
"""strata called as qemu-img beside Debian's qemu-img: the same command lines, each in its own copy of
one folder; standard output, standard error and exit status must be the same.

NORMAL lists what is taken out before comparing, and why.  Where a command line is known to be
answered differently it is in DIVERGENCES, with the reason.
"""
import os
import pathlib
import re
import shutil
import subprocess

import pytest

# (pattern, replacement, why)
NORMAL = [
    (r"^(disk size:) .*$", r"\1 N", "clusters lie elsewhere, and host blocks are allocated ahead"),
    (r'"actual-size": \d+', '"actual-size": N', "the same"),
    (r"in \d+\.\d{3} seconds", "in N seconds", "time"),
    (r"    \(\d+\.\d\d/100%\)\r", "", "steps of progress"),
    (r"\A\n(?=Images)", "", "compare ends the line of progress before its result, 7.2 behind it"),
    (r"\s+\Z", "\n", "what progress leaves at the end"),
    (r"Detected format of raw\.\n?", "", "without a newline in 7.2, with one later"),
    (r', "compressed": (false|true)', "", "QEMU 10 has it, 7.2 has not"),
    (r"^ID +TAG.*$", "ID TAG", "columns of newer versions"),
    (r"^(\d+) +(\S+) +([\d.]+ \S+) .*$", r"\1 \2 \3 T", "the same; and time"),
    (r'"date-(n?)sec": \d+', r'"date-\1sec": N', "time"),
    (r'"icount": 0,\n +', "", "without a machine, 7.2 stores 0 and not \"unknown\""),
    (r'^( *)"children": \[\n(\1 .*\n)*\1\],\n', "", "the same"),
    (r"^Child node '/file':\n(    .*\n)*", "", "the same"),
]


@pytest.fixture(scope="module")
def dropin(strata, tmp_path_factory):
    """The program under its drop-in name."""
    link = tmp_path_factory.mktemp("bin") / "qemu-img"
    link.symlink_to(os.path.abspath(strata))
    return str(link)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """raw, q (qcow2 with data), top.qcow2 -> mid.qcow2 -> base.raw, odd (1000 bytes), bad images."""
    d = tmp_path_factory.mktemp("images")

    def img(*args):
        subprocess.run(["qemu-img", *args], cwd=d, check=True, stdout=subprocess.DEVNULL)

    def io(fmt, path, *commands):
        args = sum((["-c", c] for c in commands), [])
        subprocess.run(["qemu-io", "-f", fmt, *args, path], cwd=d, check=True,
                       stdout=subprocess.DEVNULL)

    img("create", "-q", "-f", "raw", "raw", "8M")
    io("raw", "raw", "write -P 1 1M 1M", "write -P 2 5M 64k")
    img("convert", "-q", "-f", "raw", "-O", "qcow2", "raw", "q")
    shutil.copy(d / "raw", d / "base.raw")
    img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2")
    io("qcow2", "mid.qcow2", "write -P 3 2M 128k")
    img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2")
    io("qcow2", "top.qcow2", "write -P 4 64k 64k", "write -z 1M 64k")
    img("create", "-q", "-f", "qcow2", "-u", "-b", "none", "-F", "raw", "lost.qcow2", "1M")
    img("create", "-q", "-f", "qcow2", "-u", "-b", "lost.qcow2", "-F", "qcow2", "lost2.qcow2", "1M")
    (d / "odd").write_bytes(b"x" * 1000)
    (d / "version").write_bytes((d / "q").read_bytes()[:7] + b"\x09" + (d / "q").read_bytes()[8:])
    (d / "short").write_bytes((d / "q").read_bytes()[:60])
    (d / "dir").mkdir()
    return d


def normal(text):
    for pattern, replacement, _ in NORMAL:
        text = re.sub(pattern, replacement, text, flags=re.M)
    return text


def run_all(program, d, lines):
    out = []
    for line in lines:
        p = subprocess.run([program, *line], cwd=d, capture_output=True, timeout=60,
                           stdin=subprocess.DEVNULL)
        out.append((p.returncode, normal(p.stdout.decode()), normal(p.stderr.decode())))
    return out


def words(line):
    import shlex
    return shlex.split(line)


# One command line each, or several with ; between.
SAME = """
info raw
info -f raw raw
info q
info --output=json q
info --output json raw
info --output=json top.qcow2
info top.qcow2
info --backing-chain top.qcow2
info --backing-chain --output=json top.qcow2
info --back --out=json top.qcow2
info lost.qcow2
info -U q
info --force-share q
info --image-opts driver=qcow2,file.filename=q
info nofile
info dir
info -f qcow2 raw
info -f fancy raw
info fancy:raw
info version
info short
info --backing-chain lost2.qcow2
info
info raw q
info --fancy raw
info -f
info --output=xml raw
info -Z raw
info --object secret,id=x,data=y raw
info --object fancy,id=x raw
info --object
info -h -f raw ; info raw
check q
check --output=json q
check -q q
check top.qcow2
check raw
check nofile
check -f qcow2 raw
check
check -r fancy q
map raw
map q
map top.qcow2
map --output=json raw
map --output=json q
map --output=json top.qcow2
map -s 1M -l 64k --output=json top.qcow2
map --start-offset=1M --max-length=128k raw
map -s 10G raw
map -s x raw
map --output=xml raw
map nofile
compare raw q
compare -f raw -F qcow2 raw q
compare raw top.qcow2
compare -s raw base.raw
compare -q raw top.qcow2
compare raw nofile
compare raw
compare -p raw q
create a.raw 1M
create -f raw a.raw 1.5M
create -q -f qcow2 a 1G ; info a
create -f qcow2 a 1M
create -f qcow2 a 0
create -f qcow2 -o size=1M a
create -f raw -o preallocation=falloc a 1M
create -f qcow2 -o compat=v3,lazy_refcounts=on,refcount_bits=8,cluster_size=4k,compression_type=zstd,preallocation=metadata a 2M
create -f qcow2 -b raw -F raw a
create -f qcow2 -b raw -F raw a 16M ; info a
create -f qcow2 -b raw -F raw -o compat=0.10,preallocation=off a 16M
create -f qcow2 -o backing_file=raw,backing_fmt=raw a
create -u -f qcow2 -b none -F raw a 1M
create -u -f qcow2 -b none -F raw a
create -f qcow2 -b none -F raw a
create -f qcow2 -b raw -F fancy a
create -f qcow2 -b raw a
create -f qcow2 -F raw a 1M
create -f qcow2 -b raw -F raw raw
create -f qcow2 a
create -f fancy a 1M
create -f qcow2 -o fancy=1 a 1M
create -f qcow2 -o cluster_size=3 a 1M
create -f qcow2 -o cluster_size=3x a 1M
create -f qcow2 -o compat=9 a 1M
create -f qcow2 -o lazy_refcounts=x a 1M
create -f qcow2 -o preallocation=x a 1M
create -f qcow2 a 1X
create a 9E
create a 16E
create -f qcow2 nodir/a 1M
create a 1M 2M
create
create -f raw
create -f fancy -o help
create -f raw -o help
create -f qcow2 -o help
convert -O qcow2 raw a ; compare raw a ; info a
convert -f raw -O qcow2 -c raw a ; check a
convert -O raw top.qcow2 a ; compare top.qcow2 a
convert -O qcow2 -B mid.qcow2 -F qcow2 top.qcow2 a ; info a ; compare a top.qcow2
convert -O qcow2 raw q a ; info a
convert -p -O qcow2 raw a
convert -n raw nofile
convert raw
convert -O fancy raw a
convert -f raw -O qcow2 -o fancy=1 raw a
convert -c raw a
convert -O qcow2 raw nodir/a
convert nofile a
convert lost2.qcow2 a
convert -S x raw a
convert -m 17 raw a
convert -r x raw a
convert -B raw -O qcow2 top.qcow2 a
convert -n -o size=1 q raw
convert --target-image-opts raw a
convert --target-is-zero raw a
convert -t fancy raw a
convert -T fancy raw a
convert odd a ; info a
convert -C raw a ; compare raw a
convert -f raw -O qcow2 -o preallocation=metadata raw a ; check a
convert -U -T none -t none -O qcow2 top.qcow2 a ; check a
convert -m 4 -W -O qcow2 raw a ; compare raw a
convert -r 100M -O raw raw a ; compare raw a
convert --salvage raw a ; compare raw a
convert -S 0 raw a ; compare raw a
convert --image-opts driver=raw,file.filename=raw a ; compare raw a
convert -n -O qcow2 raw q ; check q
convert -n --target-image-opts raw driver=qcow2,file.filename=q ; check q
convert -O qcow2 raw raw
resize q +1M ; info q
resize -f raw raw 16M ; info raw
resize q -1M
resize --shrink q 4M ; info q
resize raw 16M
resize -f raw raw -1G
resize -f raw --shrink raw 0
resize -f raw raw x
resize raw
resize
resize nofile 1M
resize -f raw --shrink --preallocation=falloc raw -1M
resize -f raw --preallocation=falloc raw +1M
resize -q q +1M
measure -O qcow2 --size 1G
measure -O qcow2 q
measure --output=json -O qcow2 q
measure raw
measure
measure --size 1G raw
measure -f raw --size 1G
measure -O fancy --size 1
measure -O qcow2 --size x
measure -O qcow2 -o fancy=1 --size 1
measure raw q
commit top.qcow2 ; info mid.qcow2 ; map --output=json top.qcow2
commit -q top.qcow2
commit -d top.qcow2 ; map --output=json top.qcow2
commit -b base.raw top.qcow2 ; compare -F raw top.qcow2 base.raw
commit -b fancy top.qcow2
commit -p top.qcow2
commit q
commit nofile
commit lost.qcow2
commit
rebase -b base.raw -F raw top.qcow2 ; info top.qcow2 ; check top.qcow2
rebase -b '' top.qcow2 ; info top.qcow2 ; check top.qcow2
rebase -u -b /elsewhere -F raw top.qcow2 ; info top.qcow2
rebase -u top.qcow2 ; info top.qcow2
rebase top.qcow2
rebase -b raw top.qcow2
rebase -b nofile -F raw top.qcow2
rebase -b raw -F fancy top.qcow2
rebase -f raw -b q -F qcow2 raw
rebase -b raw -F raw lost.qcow2
rebase
dd if=raw of=a ; compare raw a
dd if=raw of=a bs=1M skip=1 ; info a
dd if=raw of=a bs=1M count=2 ; info a
dd -O qcow2 if=q of=a bs=64k ; compare raw a
dd if=raw of=a bs=1M skip=100
dd if=raw
dd if=nofile of=a
dd if=raw of=a bs=0
dd if=raw of=a bs=x
dd if=raw of=a fancy=1
dd if=odd of=a ; info a
snapshot -c one q ; snapshot -l q ; info q ; check -q q
snapshot -c one q ; info --output=json q
snapshot -c one q ; snapshot -c one q ; snapshot -d one q ; snapshot -l q ; check -q q
snapshot -c 2 q ; snapshot -c x q ; resize q +1M ; snapshot -a 2 q ; info q
snapshot -c 2 q ; resize q +1M ; snapshot -c x q ; snapshot -a x q ; snapshot -a 1 q ; check -q q
snapshot -c one q ; convert -l one q a ; compare q a
snapshot -c one q ; convert -l snapshot.name=one,snapshot.id=1 q a ; compare -F raw q a
snapshot -c one q ; convert -l snapshot.id=2 q a
snapshot -c one q ; convert -l snapshot.name=one,snapshot.id=2 q a
snapshot -c one q ; convert -l snapshot.fancy=2 q a
convert -l nope q a
convert -l x raw a
convert -l one q q a
snapshot -c one q ; measure -l one -O qcow2 q
measure -l one -O qcow2 q
measure -l one raw
measure -l one
snapshot q
snapshot -l q
snapshot -l raw
snapshot -q -l q
snapshot -U -l q
snapshot -U -c x q
snapshot -l --image-opts driver=qcow2,file.filename=q
snapshot -c x --image-opts driver=qcow2,file.filename=q ; snapshot -l q
snapshot -d nope q
snapshot -a nope q
snapshot -c one q ; snapshot -d 1 q
snapshot -c x raw
snapshot -d x raw
snapshot -a x --image-opts driver=raw,file.filename=raw
snapshot -l nofile
snapshot -c x nofile
snapshot -c
snapshot -c x
snapshot -l q raw
snapshot -l -c x q
snapshot -c x -d y q
snapshot --fancy q
snapshot
create -q -f qcow2 -o refcount_bits=1,preallocation=metadata a 1M ; snapshot -c x a ; snapshot -l a
snapshot -c one top.qcow2 ; commit top.qcow2
bench -c 10 q
bench -c 10 -d 4 -s 8k -S 64k -o 1M -f raw raw
bench -w -c 16 -d 4 --flush-interval 8 q
bench -w -c 16 --flush-interval 8 q
bench --flush-interval 8 q
bench -c x q
bench -t fancy q
bench -i fancy q
bench -i native q
bench -w --pattern=300 q
bench -o -1 q
bench nofile
convert -m 0 raw a
convert -m x raw a
convert -W -c -O qcow2 raw a ; compare raw a
convert -S 512 raw a ; compare raw a
convert -S 3000 raw a
convert -S 1G raw a
convert -C -c -O qcow2 raw a
convert -C -S 64k raw a
convert --salvage -C raw a
convert -n --target-is-zero -O qcow2 raw q ; check q
convert -F qcow2 -O qcow2 top.qcow2 a
convert -O qcow2 -o size=4M raw a ; info a
convert -O qcow2 -o cluster_size=3k raw a
convert -n -O qcow2 q odd
convert -n -f raw -O raw q odd
convert -O qcow2 odd raw odd a ; check a
convert --bitmaps -O raw q a
compare -f qcow2 raw q
compare -s top.qcow2 mid.qcow2
compare -s raw odd
compare odd raw
compare --image-opts -f raw driver=raw,file.filename=raw driver=qcow2,file.filename=q
compare version raw
compare raw lost.qcow2
commit -b mid.qcow2 top.qcow2 ; compare -F raw top.qcow2 base.raw
commit -r 1M -q top.qcow2
commit -r x top.qcow2
commit -f raw top.qcow2
commit --image-opts driver=qcow2,file.filename=top.qcow2
commit raw
rebase -U -u -b base.raw -F raw top.qcow2 ; info top.qcow2
rebase -t fancy -b base.raw -F raw top.qcow2
rebase --image-opts -b base.raw -F raw driver=qcow2,file.filename=top.qcow2 ; info top.qcow2
dd if=raw of=a bs=1M skip=9 ; info a
dd if=raw of=a bs=3G
dd -O fancy if=raw of=a
dd -U if=q of=a ; compare q a
dd --image-opts if=driver=qcow2,file.filename=q of=a ; compare q a
bench -c 10 --no-drain q
bench -w -c 8 -d 2 --flush-interval 4 --no-drain q
resize --preallocation=metadata raw 16M
resize top.qcow2 --preallocation=metadata 16M ; compare top.qcow2 raw
resize q +1
resize q 8E
rebase -b top.qcow2 -F qcow2 top.qcow2
bench -c 10 -o 9M q
fancy
fancy raw

--fancy
""".strip("\n").split("\n")

# command line -> why the answers differ; they are run, and must end alike (status).
DIVERGENCES = {
    "create -f qcow2 -o help": "options that this version does not have are left out",
    "info -h -f raw ; info raw": "the help is about strata's verbs",
    "convert -O qcow2 raw raw": "7.2 finds the file locked; here the source is named",
    "rebase -b top.qcow2 -F qcow2 top.qcow2": "there the lock is in the way; here the reason is named",
    "bench -c 10 -o 9M q": "there the first request fails; here it is said before",
    "info --object fancy,id=x raw": "7.2 lists no types either, in other words",
    "create -f raw -o help": "7.2 names the options of the file protocol elsewhere",
}


@pytest.mark.parametrize("line", SAME, ids=lambda l: l or "nothing")
def test_dropin_answers_as_the_peer(dropin, folder, tmp_path, line):
    lines = [words(part) for part in line.split(";")]
    results = []
    for program in dropin, shutil.which("qemu-img"):
        d = tmp_path / pathlib.Path(program).parent.name
        subprocess.run(["cp", "-a", "--sparse=always", folder, d], check=True)
        results.append(run_all(program, d, lines))
        shutil.rmtree(d)
    if line in DIVERGENCES:
        results = [[r[0] for r in result] for result in results]
    assert results[0] == results[1]


def both_locked(dropin, folder, tmp_path, line, opener):
    results = []
    for program in dropin, shutil.which("qemu-img"):
        d = tmp_path / pathlib.Path(program).parent.name
        shutil.copytree(folder, d)
        holder = subprocess.Popen(["qemu-io", *opener], cwd=d, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True)
        holder.stdin.write("length\n")
        holder.stdin.flush()
        holder.stdout.readline()
        results.append(run_all(program, d, [words(line)]))
        holder.communicate()
    return results


def test_dropin_knows_the_letters_of_newer_versions(dropin, folder, tmp_path):
    def call(*args):
        return subprocess.run([dropin, *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "backing_fmt=raw" in call("create", "-f", "qcow2", "-b", str(folder / "raw"), "-B", "raw", "a")
    call("convert", "--source-format", "qcow2", "-O", "qcow2", "-b", str(folder / "raw"), "-F", "raw", "a", "b")
    assert "backing file format: raw" in call("info", "b")


@pytest.mark.parametrize("line", ["info q", "info -U q", "check q", "resize q +1M", "convert q a",
                                  "commit top.qcow2", "rebase -u -b x -F raw q"])
def test_dropin_says_that_a_writer_has_the_image(dropin, folder, tmp_path, line):
    image = "top.qcow2" if "top" in line else "q"
    ours, theirs = both_locked(dropin, folder, tmp_path, line, ["-f", "qcow2", image])
    assert ours == theirs


@pytest.mark.parametrize("line", ["info q", "resize q +1M"])
def test_dropin_says_that_a_reader_has_the_image(dropin, folder, tmp_path, line):
    ours, theirs = both_locked(dropin, folder, tmp_path, line, ["-r", "-f", "qcow2", "q"])
    assert ours == theirs


def test_dropin_names_a_version_that_clients_can_parse(dropin):
    """libvirt, Proxmox and OpenStack look for 'qemu-img version X.Y'."""
    out = subprocess.run([dropin, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.match(r"qemu-img version \d+\.\d+", out)


def test_dropin_help_names_all_commands(dropin):
    out = subprocess.run([dropin, "--help"], capture_output=True, text=True, check=True).stdout
    for verb in ("bench check commit compare convert create dd info map measure rebase resize").split():
        assert re.search(rf"^  {verb}\b", out, re.M)
    assert "Supported formats:" in out


def test_dropin_follows_names_in_images_anywhere(dropin, peer, tmp_path):
    """QEMU's behaviour, which scripts rely on; `strata` itself asks for --trust."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base, top = tmp_path / "a" / "base", tmp_path / "b" / "top"
    peer("qemu-img", "create", "-q", base, "1M")
    peer("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    p = subprocess.run([dropin, "convert", top, tmp_path / "out"], capture_output=True, text=True)
    assert (p.returncode, p.stderr) == (0, "")
