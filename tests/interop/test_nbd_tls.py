# SPDX-License-Identifier: MIT
"""NBD over TLS: certificates and keys, our server with others' clients and the other way round."""
import os
import random
import socket
import ssl
import subprocess
import time

import pytest
from serving import *

MIB = 1 << 20


def certtool(*args, **kw):
    subprocess.run(["certtool", *map(str, args)], check=True, capture_output=True, **kw)


def make_ca(d, name):
    """A folder with a CA, certificates of it for server and client (127.0.0.1, localhost)."""
    d.mkdir()
    (d / "ca.tmpl").write_text(f'cn = "{name}"\nca\ncert_signing_key\nexpiration_days = 30\n')
    (d / "server.tmpl").write_text('cn = "localhost"\ndns_name = "localhost"\nip_address = "127.0.0.1"\n'
                                   "tls_www_server\nencryption_key\nsigning_key\nexpiration_days = 30\n")
    (d / "client.tmpl").write_text('cn = "client"\ntls_www_client\nencryption_key\nsigning_key\nexpiration_days = 30\n')
    for who in ("ca", "server", "client"):
        certtool("--generate-privkey", "--key-type", "ecdsa", "--outfile", d / f"{who}-key.pem")
    certtool("--generate-self-signed", "--load-privkey", d / "ca-key.pem", "--template", d / "ca.tmpl",
             "--outfile", d / "ca-cert.pem")
    for who in ("server", "client"):
        certtool("--generate-certificate", "--load-ca-certificate", d / "ca-cert.pem", "--load-ca-privkey",
                 d / "ca-key.pem", "--load-privkey", d / f"{who}-key.pem", "--template", d / f"{who}.tmpl",
                 "--outfile", d / f"{who}-cert.pem")
    certtool("--get-dh-params", "--sec-param", "medium", "--outfile", d / "dh-params.pem")
    return d


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return make_ca(tmp_path_factory.mktemp("pki") / "good", "CA")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """The same names, another CA."""
    return make_ca(tmp_path_factory.mktemp("pki") / "other", "Other")


@pytest.fixture(scope="module")
def psk(tmp_path_factory):
    d = tmp_path_factory.mktemp("psk")
    for name, user, key in (("keys.psk", "alice", "0123456789abcdef" * 2), ("wrong.psk", "alice", "f" * 32)):
        (d / name).write_text(f"{user}:{key}\n")
    certtool("--get-dh-params", "--sec-param", "medium", "--outfile", d / "dh-params.pem")  # qemu would make its own
    return d


@pytest.fixture
def disk(tmp_path, seed):
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(seed).randbytes(3 * MIB) + bytes(5 * MIB))
    return path


@pytest.fixture
def tcp(strata, disk):
    """A server on 127.0.0.1; s.port."""
    def start(*args):
        s = Server(strata, disk, "-f", "raw", "-t", "-p", "0", *args)
        s.port = int(s.uri.split(":")[2].rstrip("/"))
        return s
    return start


def copy_through(uri, data, work):
    """nbdcopy to there and back."""
    work.write_bytes(data)
    subprocess.run(["nbdcopy", str(work), uri], check=True, timeout=60)
    return subprocess.run(["nbdcopy", uri, "-"], check=True, capture_output=True, timeout=60).stdout


# ---------------------------------------------------------------- our server, libnbd's clients

def test_certificates_with_nbdinfo_and_nbdcopy(tcp, pki, peer, tmp_path, seed):
    with tcp("--tls", pki, "--tls-required") as s:
        assert s.uri == f"nbds://127.0.0.1:{s.port}/"
        uri = f"{s.uri}?tls-certificates={pki}"
        assert peer("nbdinfo", "--size", uri).stdout.strip() == str(8 * MIB)
        assert "protocol: newstyle-fixed with TLS" in peer("nbdinfo", uri).stdout
        data = random.Random(seed).randbytes(8 * MIB)
        assert copy_through(uri, data, tmp_path / "work") == data


def test_keys_with_nbdinfo_and_nbdcopy(strata, disk, psk, peer, tmp_path, seed):
    with Server(strata, disk, "-f", "raw", "-t", "--tls", f"psk:{psk}/keys.psk", "--tls-required",
                socket_path=tmp_path / "s") as s:
        assert s.uri == f"nbds+unix:///?socket={tmp_path}/s"
        uri = f"nbds+unix://alice@/?socket={s.path}&tls-psk-file={psk}/keys.psk"
        assert peer("nbdinfo", "--size", uri).stdout.strip() == str(8 * MIB)
        data = random.Random(seed).randbytes(8 * MIB)
        assert copy_through(uri, data, tmp_path / "work") == data
        wrong = uri.replace("keys.psk", "wrong.psk")
        assert peer("nbdinfo", "--size", wrong, status=None).returncode != 0
        nobody = uri.replace("alice", "mallory")
        assert peer("nbdinfo", "--size", nobody, status=None).returncode != 0


def test_strangers_are_refused_and_others_served(tcp, pki, stranger, peer):
    with tcp("--tls", pki, "--tls-required") as s:
        for uri in (f"{s.uri}?tls-certificates={stranger}",
                    f"{s.uri}?tls-certificates={stranger}&tls-verify-peer=false",
                    s.uri.replace("nbds:", "nbd:")):
            assert peer("nbdinfo", "--size", uri, status=None).returncode != 0
        assert peer("nbdinfo", "--size", f"{s.uri}?tls-certificates={pki}").stdout.strip() == str(8 * MIB)


def test_clients_without_certificate_only_when_allowed(tcp, pki, peer, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    for args, ok in (([], False), (["--tls-anyone"], True)):
        with tcp("--tls", pki, "--tls-required", *args) as s:
            p = peer("nbdinfo", "--size", f"{s.uri}?tls-certificates={bare}", status=None)
            assert (p.returncode == 0) == ok


def test_revoked_client_is_refused(tcp, pki, peer, tmp_path):
    d = tmp_path / "with-crl"
    d.mkdir()
    for f in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
        (d / f).write_bytes((pki / f).read_bytes())
    (tmp_path / "crl.tmpl").write_text("crl_next_update = 30\ncrl_number = 1\n")
    certtool("--generate-crl", "--load-ca-privkey", pki / "ca-key.pem", "--load-ca-certificate", pki / "ca-cert.pem",
             "--load-certificate", pki / "client-cert.pem", "--template", tmp_path / "crl.tmpl",
             "--outfile", d / "ca-crl.pem")
    with tcp("--tls", d, "--tls-required") as s:
        assert peer("nbdinfo", "--size", f"{s.uri}?tls-certificates={pki}", status=None).returncode != 0


def test_tls_offered_but_not_required(tcp, pki, peer):
    with tcp("--tls", pki) as s:
        for uri in (f"{s.uri}?tls-certificates={pki}", s.uri.replace("nbds:", "nbd:")):
            assert peer("nbdinfo", "--size", uri).stdout.strip() == str(8 * MIB)


# ---------------------------------------------------------------- QEMU

def qemu_x509(pki, endpoint, *more):
    return ["--object", ",".join([f"tls-creds-x509,id=t,endpoint={endpoint},dir={pki}", *more])]


def test_qemu_img_reads_from_us(tcp, pki, stranger, disk, tmp_path):
    with tcp("--tls", pki, "--tls-required") as s:
        def convert(creds):
            return subprocess.run(["qemu-img", "convert", *qemu_x509(creds, "client"), "--image-opts", "-O", "raw",
                                   f"driver=nbd,host=127.0.0.1,port={s.port},tls-creds=t", str(tmp_path / "out")],
                                  capture_output=True, text=True, timeout=60)
        p = convert(pki)
        assert p.returncode == 0, p.stderr
        assert (tmp_path / "out").read_bytes() == disk.read_bytes()
        assert convert(stranger).returncode != 0


@pytest.fixture
def dropin(strata, tmp_path):
    """dropin("qemu-nbd") -> path of the link."""
    def make(name):
        link = tmp_path / "bin" / name
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(strata)
        return str(link)
    return make


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_port(port):
    for _ in range(3000):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("creds", ["x509", "psk"])
@pytest.mark.parametrize("server", ["ours", "theirs"])
@pytest.mark.parametrize("client", ["ours", "theirs"])
def test_same_command_lines_as_qemu(dropin, pki, psk, disk, tmp_path, creds, server, client):
    """qemu-nbd and qemu-img with --object and tls-creds, each by either program."""
    port = free_port()

    def obj(endpoint):
        if creds == "x509":
            return qemu_x509(pki, endpoint)
        user = ",username=alice" if endpoint == "client" else ""
        return ["--object", f"tls-creds-psk,id=t,endpoint={endpoint},dir={psk}{user}"]

    nbd = dropin("qemu-nbd") if server == "ours" else "qemu-nbd"
    img = dropin("qemu-img") if client == "ours" else "qemu-img"
    lister = dropin("qemu-nbd") if client == "ours" else "qemu-nbd"
    p = subprocess.Popen([nbd, "-t", "-f", "raw", *obj("server"), "--tls-creds", "t", "-b", "127.0.0.1", "-p",
                          str(port), "-x", "x", str(disk)])
    try:
        wait_port(port)
        q = subprocess.run([img, "convert", *obj("client"), "--image-opts", "-O", "raw",
                            f"driver=nbd,host=127.0.0.1,port={port},export=x,tls-creds=t", str(tmp_path / "out")],
                           capture_output=True, text=True, timeout=60)
        assert q.returncode == 0, q.stderr
        assert (tmp_path / "out").read_bytes() == disk.read_bytes()
        q = subprocess.run([lister, "-L", *obj("client"), "--tls-creds", "t", "-b", "127.0.0.1", "-p", str(port)],
                           capture_output=True, text=True, timeout=60)
        assert q.returncode == 0 and "export: 'x'" in q.stdout, q.stderr
        q = subprocess.run([img, "info", f"nbd://127.0.0.1:{port}/x"], capture_output=True, timeout=60)
        assert q.returncode != 0
    finally:
        p.terminate()
        p.wait(20)


@pytest.mark.parametrize("objects,creds,text", [
    ([], "t", "No TLS credentials with id 't'"),
    (["secret,id=t,data=x"], "t", "Object with id 't' is not TLS credentials"),
    (["tls-creds-anon,id=t,endpoint=client"], "t", "Expecting TLS credentials with a server endpoint"),
    (["tls-creds-x509,id=t,endpoint=server"], "t", "dir"),
    (["tls-creds-psk,id=t,endpoint=server,dir=/,username=x"], "t", "username should not be set when endpoint=server"),
    (["tls-creds-x509,id=t,endpoint=server,dir=/nowhere"], "t", "/nowhere"),
])
def test_bad_credentials_are_refused_by_name(dropin, disk, objects, creds, text):
    more = [a for o in objects for a in ("--object", o)]
    p = subprocess.run([dropin("qemu-nbd"), *more, "--tls-creds", creds, "-p", str(free_port()), str(disk)],
                       capture_output=True, text=True, timeout=20)
    assert p.returncode == 1 and text in p.stderr


def test_anonymous_tls(dropin, disk, tmp_path):
    """Only QEMU's client speaks it."""
    port = free_port()
    p = subprocess.Popen([dropin("qemu-nbd"), "-t", "-f", "raw", "--object", "tls-creds-anon,id=t,endpoint=server",
                          "--tls-creds", "t", "-b", "127.0.0.1", "-p", str(port), str(disk)])
    try:
        wait_port(port)
        subprocess.run(["qemu-img", "convert", "--object", "tls-creds-anon,id=t,endpoint=client", "--image-opts", "-O",
                        "raw", f"driver=nbd,host=127.0.0.1,port={port},tls-creds=t", str(tmp_path / "out")],
                       check=True, timeout=60)
        assert (tmp_path / "out").read_bytes() == disk.read_bytes()
    finally:
        p.terminate()
        p.wait(20)


# ---------------------------------------------------------------- our client

def test_nbds_uris_with_our_client(tcp, run, pki, stranger, disk, tmp_path):
    with tcp("--tls", pki, "--tls-required") as s:
        run("convert", "-f", "raw", "-O", "raw", f"{s.uri}?tls-certificates={pki}", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk.read_bytes()
        run("info", "-f", "raw", f"{s.uri}?tls-certificates={stranger}", status=1)
        run("info", "-f", "raw", s.uri.replace("nbds:", "nbd:"), status=1)


def test_our_client_never_falls_back_to_plain(tcp, run, pki):
    """A server that has no TLS is refused when TLS was asked for."""
    with tcp() as s:
        run("info", "-f", "raw", s.uri.replace("nbd:", "nbds:") + f"?tls-certificates={pki}", status=1)


def test_our_client_with_keys_of_nbdkit(run, psk, disk, tmp_path):
    sock = tmp_path / "kit"
    p = subprocess.Popen(["nbdkit", "-f", "-U", sock, "--tls=require", f"--tls-psk={psk}/keys.psk", "file", disk])
    try:
        for _ in range(200):
            if sock.exists():
                break
            time.sleep(0.02)
        run("convert", "-f", "raw", "-O", "raw",
            f"nbds+unix:///?socket={sock}&tls-psk-file={psk}/keys.psk&tls-username=alice", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == disk.read_bytes()
    finally:
        p.terminate()
        p.wait(20)


# ---------------------------------------------------------------- the rules of STARTTLS

@pytest.fixture(scope="module")
def required(strata, pki, tmp_path_factory):
    d = tmp_path_factory.mktemp("required")
    (d / "disk.raw").write_bytes(bytes(MIB))
    with Server(strata, d / "disk.raw", "-f", "raw", "-t", "--tls", pki, "--tls-required", "--handshake-timeout", "2",
                socket_path=d / "s") as s:
        yield s.path


def test_every_other_option_is_refused_before_tls(required):
    with Client(required) as c:
        for opt, data in ((OPT_LIST, b""), (OPT_INFO, c.info_data()), (OPT_GO, c.info_data()), (OPT_STRUCTURED, b""),
                          (OPT_EXTENDED, b""), (OPT_LIST_META, c.meta_data()), (OPT_SET_META, c.meta_data()),
                          (0x7777, b"x")):
            assert c.option(opt, data)[-1][0] == ERR_TLS_REQD
        assert c.option(OPT_STARTTLS, b"x")[-1][0] == ERR_INVALID
    with Client(required) as c:
        c.send_option(OPT_EXPORT_NAME, b"")
        assert c.closed()
    with Client(required) as c:
        assert c.option(OPT_ABORT)[-1][0] == ERR_TLS_REQD
        assert c.closed()


def wrapped(sock, pki):
    """The same socket inside TLS, as a client of ours."""
    ctx = ssl.create_default_context(cafile=pki / "ca-cert.pem")
    ctx.load_cert_chain(pki / "client-cert.pem", pki / "client-key.pem")
    return ctx.wrap_socket(sock, server_hostname="localhost")


def test_bytes_behind_starttls_end_the_connection(required, pki):
    """They were not encrypted, so somebody on the way may have put them there."""
    with Client(required) as c:
        c.s.sendall(b"IHAVEOPT" + struct_pack(OPT_STARTTLS) + b"IHAVEOPT" + struct_pack(OPT_LIST))
        assert c.option_reply()[1] == REP_ACK
        with pytest.raises(OSError):
            wrapped(c.s, pki)


def struct_pack(option):
    return option.to_bytes(4, "big") + bytes(4)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70000],
                         ids=["nothing", "half", "no-tls", "long-record"])
def test_tls_handshake_that_does_not_end_is_ended(required, sent):
    with Client(required) as c:
        assert c.option(OPT_STARTTLS)[-1][0] == REP_ACK
        start = time.monotonic()
        try:
            c.s.sendall(sent)
        except OSError:
            pass
        assert c.closed()
        assert time.monotonic() - start < 6


def test_random_bytes_instead_of_tls(required, seed):
    rnd = random.Random(seed)
    for i in range(60):
        with Client(required) as c:
            assert c.option(OPT_STARTTLS)[-1][0] == REP_ACK
            record = b"\x16\x03\x01" if i % 2 else b""
            try:
                c.s.sendall(record + rnd.randbytes(rnd.randrange(1, 600)))
            except OSError:
                pass
    with Client(required) as c:
        assert c.option(OPT_STARTTLS)[-1][0] == REP_ACK


def test_what_was_agreed_before_tls_is_forgotten(strata, pki, disk, tmp_path):
    """Structured replies were asked for in the clear: not for the session inside."""
    with Server(strata, disk, "-f", "raw", "-t", "--tls", pki, socket_path=tmp_path / "s") as s:
        with Client(s.path) as c:
            assert c.option(OPT_STRUCTURED)[-1][0] == REP_ACK
            assert c.option(OPT_STARTTLS)[-1][0] == REP_ACK
            c.s = wrapped(c.s, pki)
            assert c.option(OPT_SET_META, c.meta_data(b"", [b"base:allocation"]))[-1][0] == ERR_INVALID
            assert c.option(OPT_STARTTLS)[-1][0] == ERR_INVALID
            c.go(structured=False)
            assert c.pread(0, 3 * MIB) == disk.read_bytes()[:3 * MIB]
            assert c.pwrite(0, b"x" * MIB) == 0
            assert c.pread(0, MIB) == b"x" * MIB
