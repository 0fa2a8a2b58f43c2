"""The handler's downloads: from public addresses alone, to the address that was checked, within bounds."""

import base64
import io
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.handler_loading import load_handler, make_repository
from helpers.tiny_models import make_image


PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
SECRET = "/secret.png"
PATIENCE = 6.0  # seconds after which the slow server gives up, so that a handler that waits fails a test


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    make_image(seed=seed).save(buffer, format="PNG")
    return buffer.getvalue()


PNG = png(1)


class Images(BaseHTTPRequestHandler):
    """What the internet holds, on loopback. A redirect's target is in its query."""

    def do_GET(self):  # noqa: N802
        self.server.seen.append((self.path, self.headers["Host"]))
        path, _, target = self.path.partition("?")
        if path == "/redirect":
            self.answer(b"", 302, Location=target)
        elif path == "/nowhere":
            self.answer(b"", 302)
        elif path == "/image.png" or path == SECRET:
            self.answer(PNG)
        elif path == "/notes.jpg":
            self.answer(b"This is a text, whatever its name says.\n" * 20, **{"Content-Type": "image/jpeg"})
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.send_forever(b"x" * 2**16)
        elif path == "/declared":
            self.answer(b"x", 200, **{"Content-Length": str(2**40)})
        elif path == "/drop-by-drop":
            self.send_response(200)
            self.end_headers()
            self.send_forever(b"x", pause=0.1)
        elif path == "/slow-headers":
            self.send_forever(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 10**6, pause=0.1, step=1)
        elif path == "/late":
            self.server.stop.wait(1.0)
            self.answer(PNG)
        elif path == "/silent":
            self.server.stop.wait(PATIENCE)
        elif path == "/cut":
            self.answer(PNG[: len(PNG) // 2], 200, **{"Content-Length": str(len(PNG))})
        elif path == "/garbage":
            self.wfile.write(b"not HTTP at all\r\n\r\n")
        else:
            self.answer(b"not found", 404)

    def answer(self, body: bytes, status: int = 200, **headers) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_forever(self, data: bytes, pause: float = 0.0, step: int | None = None) -> None:
        end = time.monotonic() + PATIENCE
        try:
            while not self.server.stop.wait(pause) and time.monotonic() < end:
                piece, data = (data, data) if step is None else (data[:step], data[step:])
                self.wfile.write(piece)
        except OSError:
            self.server.hung_up += 1

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    server.daemon_threads = True
    server.stop = threading.Event()
    server.seen, server.hung_up = [], 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


class Internet:
    """Names and their addresses; public addresses all lead to the server on loopback, and the others where they do."""

    def __init__(self, server, secure_port: int | None = None):
        self.port = server.server_port
        self.secure_port = secure_port
        self.names: dict[str, list] = {"images.test": [[PUBLIC]], "images.example": [[OTHER]]}
        self.resolved: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self._getaddrinfo, self._connect = socket.getaddrinfo, socket.create_connection

    def getaddrinfo(self, host, port, *args, **kwargs):
        if host not in self.names:
            if host.endswith((".test", ".example")):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return self._getaddrinfo(host, port, *args, **kwargs)
        self.resolved.append(host)
        answers = self.names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    def create_connection(self, address, *args, **kwargs):
        self.connected.append(address)
        if address[0] in (PUBLIC, OTHER):
            address = ("127.0.0.1", self.secure_port if address[1] == 443 else self.port)
        return self._connect(address, *args, **kwargs)


@pytest.fixture
def internet(server, monkeypatch):
    internet = Internet(server)
    monkeypatch.setattr(socket, "getaddrinfo", internet.getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", internet.create_connection)
    server.seen.clear()
    server.hung_up = 0
    return internet


@pytest.fixture(scope="module")
def loaded(checkpoint, tmp_path_factory):
    path = list(sys.path)
    yield load_handler(make_repository(checkpoint, tmp_path_factory.mktemp("repository")))
    sys.path[:] = path
    sys.modules.pop("handler.EndpointHandler")


@pytest.fixture
def handler(loaded):
    yield loaded
    loaded.limits = type(loaded.limits)()


def about(*urls: str) -> dict:
    return {
        "inputs": {"image": list(urls), "question": "What is on the sign?"},
        "parameters": {"max_new_tokens": 8},
    }


def check_next_request(handler) -> None:
    handler.limits = type(handler.limits)()  # a second may be short for a busy machine
    assert "error" not in handler(about("http://images.test/image.png"))


# --- what is fetched


def test_an_image_behind_a_url_is_what_it_is_in_base64(handler, internet, server):
    given = handler(about(base64.b64encode(PNG).decode()))
    assert handler(about("http://images.test/image.png")) == given
    assert handler(about("HTTP://IMAGES.TEST:80/image.png?size=a b&ü=1#part")) == given
    assert internet.connected == [(PUBLIC, 80)] * 2
    assert server.seen == [
        ("/image.png", "images.test"),
        ("/image.png?size=a%20b&%C3%BC=1", "images.test"),
    ]


def test_another_port_and_ipv6_are_reached(handler, internet, server):
    assert "error" not in handler(about("http://images.example:8080/image.png", f"http://[{OTHER}]/image.png"))
    assert internet.connected == [(OTHER, 8080), (OTHER, 80)]
    assert [host for _, host in server.seen] == ["images.example:8080", f"[{OTHER}]"]


def test_redirects_are_followed_up_to_a_number(handler, internet):
    first = "http://images.test"
    relative = f"{first}/redirect?/redirect?http://images.example/redirect?/image.png"
    assert "error" not in handler(about(relative))
    assert internet.resolved == ["images.test", "images.test", "images.example", "images.example"]

    loop = f"{first}/redirect?" * 4 + f"{first}/image.png"
    answer = handler(about(loop))
    assert (answer["status"], len(internet.resolved)) == (424, 4 + 4)
    assert "redirects more than 3 times" in answer["error"]
    check_next_request(handler)


def test_an_address_that_does_not_answer_is_followed_by_the_next(handler, internet, monkeypatch):
    internet.names["images.test"] = [["93.184.215.15", PUBLIC]]
    connect = internet.create_connection

    def refuse(address, *args, **kwargs):
        if address[0] == "93.184.215.15":
            raise ConnectionRefusedError("refused")
        return connect(address, *args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", refuse)
    check_next_request(handler)
    internet.names["images.test"] = [["93.184.215.15"]]
    assert "could not be fetched: refused" in handler(about("http://images.test/image.png"))["error"]


# --- where nothing is fetched from


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",  # metadata of AWS, Azure and Google
        "100.100.100.200",  # of Alibaba
        "192.0.0.192",  # of Oracle
        "168.63.129.16",  # Azure's host
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:93.184.215.14",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "2001:0:7f00:1::1",
        "2002:7f00:1::1",
        "2001:db8::1",
        "fd00:ec2::254",  # metadata of AWS
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_no_private_address_is_connected_to(handler, internet, server, address):
    """By number, by a name, beside nothing else, and after a redirect."""
    internet.names["internal.test"] = [[address]]
    host = f"[{address}]" if ":" in address else address
    urls = [f"http://{host}:{server.server_port}{SECRET}", f"http://internal.test:{server.server_port}{SECRET}"]
    urls += [f"http://images.test/redirect?{url}" for url in urls]
    for url in urls:
        answer = handler(about(url))
        assert answer["status"] in (403, 400, 424), answer
        assert "image" in answer["error"] or "public address" in answer["error"]
    assert all(connected == (PUBLIC, 80) for connected in internet.connected)
    assert not any(path == SECRET for path, _ in server.seen)
    check_next_request(handler)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "LOCALHOST.", "①②⑦.1"])
def test_other_ways_to_write_loopback_are_loopback(handler, internet, server, host):
    answer = handler(about(f"http://{host}:{server.server_port}{SECRET}"))
    assert answer["status"] in (403, 424)
    assert not internet.connected and not server.seen


@pytest.mark.parametrize(
    "url",
    [
        "http://images.test@127.0.0.1:{port}/secret.png",
        "http://127.0.0.1:{port}\\@images.test/secret.png",
        "http://127.0.0.1:{port}#@images.test/secret.png",
        "http://127.0.0.1:{port}?@images.test/secret.png",
        "http://images.test\t@127.0.0.1:{port}/secret.png",
        "http:\\\\127.0.0.1:{port}/secret.png",
        "http:127.0.0.1:{port}/secret.png",
        "http://[::ffff:127.0.0.1]:{port}/secret.png",
    ],
)
def test_urls_that_parsers_read_differently_do_not_lead_to_loopback(handler, internet, server, url):
    answer = handler(about(url.format(port=server.server_port)))
    assert answer.get("status") in (None, 400, 403, 424), answer
    assert all(address == PUBLIC for address, _ in internet.connected)
    assert ("error" in answer) is (not internet.connected)
    check_next_request(handler)


def test_a_name_is_resolved_once_and_connected_to_as_checked(handler, internet, server):
    """DNS rebinding: public when it is checked, and loopback ever after."""
    internet.names["rebound.test"] = [[PUBLIC], ["127.0.0.1"]]
    assert "error" not in handler(about("http://rebound.test/image.png"))
    assert internet.resolved == ["rebound.test"]
    assert internet.connected == [(PUBLIC, 80)]
    answer = handler(about("http://rebound.test/image.png"))
    assert (answer["status"], len(internet.connected)) == (403, 1)


def test_of_several_addresses_the_public_ones_are_used(handler, internet, server):
    internet.names["both.test"] = [["127.0.0.1", "10.0.0.1", PUBLIC]]
    assert "error" not in handler(about("http://both.test/image.png"))
    assert internet.connected == [(PUBLIC, 80)]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://images.test/a.png", "data:image/png;base64,AAAA", "http:", "//[x/"]
)
def test_redirects_lead_to_http_alone(handler, internet, target):
    answer = handler(about(f"http://images.test/redirect?{target}"))
    assert answer["status"] in (400, 424), answer
    assert re.search("is not fetched|which is no URL|redirects more than", answer["error"])
    check_next_request(handler)


def test_proxies_of_the_environment_are_not_used(handler, internet, server, monkeypatch):
    """A proxy would resolve the name again."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    check_next_request(handler)
    assert internet.connected == [(PUBLIC, 80)]


# --- what goes wrong


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("http://images.test/notes.jpg", 415, "notes.jpg' is not an image that can be read"),
        ("http://images.test/cut", 415, "cannot be decoded"),
        ("http://images.test/missing", 424, "answered with status 404"),
        ("http://images.test/nowhere", 424, "redirects to nowhere"),
        ("http://images.test/garbage", 424, "could not be fetched"),
        ("http://images.test/endless", 413, "larger than 100000 bytes"),
        ("http://images.test/declared", 413, "larger than 100000 bytes"),
        ("http://unknown.test/a.png", 424, "the host's name cannot be resolved"),
        ("http://images.test:99999/a.png", 400, "expected a URL of http or https"),
        ("http:///a.png", 400, "names no host"),
        ("http://[::1/a.png", 400, "expected a URL"),
        ("http://a..test/a.png", 400, "expected a URL"),
        ("http://images.test/a\r\nX-Injected: 1", 424, "answered with status 404"),
    ],
)
def test_what_cannot_be_fetched_is_told(handler, internet, server, url, status, message):
    handler.limits = replace(handler.limits, max_bytes=100_000)
    answer = handler(about(url))
    assert answer["status"] == status, answer
    assert message in answer["error"]
    assert len(answer["error"]) < 300
    check_next_request(handler)


@pytest.mark.parametrize("path", ["/drop-by-drop", "/slow-headers", "/silent"])
def test_a_server_that_takes_its_time_is_left(handler, internet, server, path):
    """Though each of its bytes comes in time."""
    handler.limits = replace(handler.limits, fetch_seconds=1.0)
    start = time.monotonic()
    answer = handler(about(f"http://images.test{path}"))
    assert time.monotonic() - start < PATIENCE - 1
    assert answer["status"] == 424
    assert "did not arrive within 1 seconds" in answer["error"]
    check_next_request(handler)


def test_a_server_may_take_longer_for_its_answer_than_for_the_connection(handler, internet, server, monkeypatch):
    monkeypatch.setattr(sys.modules["handler.EndpointHandler"], "_CONNECT_SECONDS", 0.5)
    assert "error" not in handler(about("http://images.test/late"))


def test_the_time_is_that_of_all_images_together(handler, internet, server):
    handler.limits = replace(handler.limits, fetch_seconds=1.0)
    start = time.monotonic()
    answer = handler(about(*["http://images.test/drop-by-drop"] * 4))
    assert time.monotonic() - start < PATIENCE - 1
    assert answer["status"] == 424


def test_a_resolver_that_takes_its_time_is_left(handler, internet, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(PATIENCE) or [])
    handler.limits = replace(handler.limits, fetch_seconds=0.5)
    start = time.monotonic()
    answer = handler(about("http://images.test/image.png"))
    assert time.monotonic() - start < PATIENCE - 1
    assert "did not arrive within 0.5 seconds" in answer["error"]


def test_connections_and_threads_are_given_back(handler, internet, server):
    def threads() -> int:
        return sum(isinstance(thread, threading.Timer) for thread in threading.enumerate())

    before = threads()
    for _ in range(3):
        check_next_request(handler)
        handler(about("http://images.test/redirect?http://127.0.0.1/"))
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() == before


# --- https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of images.test that nobody has signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("certificate")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=images.test"]
    command += ["-addext", "subjectAltName=DNS:images.test", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def secure(certificate, internet, server):
    """The same server behind TLS, at port 443 of the public addresses."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    secure = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    secure.daemon_threads = True
    secure.seen, secure.stop, secure.hung_up = server.seen, server.stop, 0
    secure.handle_error = lambda *args: None  # clients that do not trust it hang up
    threading.Thread(target=secure.serve_forever, daemon=True).start()
    internet.secure_port = secure.server_port
    yield certificate / "cert.pem"
    secure.shutdown()
    secure.server_close()


def test_https_is_checked_against_the_name_and_not_the_address(handler, secure, internet, server, monkeypatch):
    answer = handler(about("https://images.test/image.png"))
    assert answer["status"] == 424
    assert "CERTIFICATE_VERIFY_FAILED" in answer["error"]
    assert not server.seen

    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    assert "error" not in handler(about("https://images.test/image.png"))
    assert server.seen == [("/image.png", "images.test")]
    assert internet.connected == [(PUBLIC, 443)] * 2
    for url in ("https://images.example/image.png", f"https://{PUBLIC}/image.png"):
        assert "CERTIFICATE_VERIFY_FAILED" in handler(about(url))["error"]
    assert "error" not in handler(about("http://images.test/redirect?https://images.test/image.png"))


def test_https_ends_in_time_too(handler, secure, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(secure))
    handler.limits = replace(handler.limits, fetch_seconds=1.0)
    start = time.monotonic()
    answer = handler(about("https://images.test/drop-by-drop"))
    assert time.monotonic() - start < PATIENCE - 1
    assert "did not arrive within 1 seconds" in answer["error"]
