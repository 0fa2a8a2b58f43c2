"""The web page as programs reach it: Gradio's own client, and plain HTTP for what a browser would never send."""

import asyncio
import http.client
import json
import re
import socket
import time
import urllib.parse
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.demo_models import BOXES, LONG, PLAIN, scripted_assistant
from helpers.tiny_models import make_image
from PIL import Image

from convllava_hf import demo
from convllava_hf.demo.limits import Limits


gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

from gradio.route_utils import GradioMultiPartParser  # noqa: E402
from starlette.datastructures import Headers  # noqa: E402

from convllava_hf.demo.guard import _Upload  # noqa: E402
from convllava_hf.demo.serving import page_of  # noqa: E402
from convllava_hf.errors import ConvLlavaError  # noqa: E402


SIDE = "128 × 128 px · 4 visual tokens"
UPLOAD = 300_000  # bytes


@pytest.fixture(scope="module")
def assistant():
    return scripted_assistant(seconds_a_token=0.005)


@pytest.fixture(scope="module")
def url(assistant):
    with page_of(assistant, "scripted", limits=Limits(queue=3, upload_bytes=UPLOAD)) as url:
        yield url


@pytest.fixture
def client(url):
    client = gradio_client.Client(url, verbose=False)
    yield client
    client.close()


@pytest.fixture
def image(tmp_path) -> str:
    make_image(300, 400).save(tmp_path / "image.jpg")
    return str(tmp_path / "image.jpg")


def question(image, text: str = "What?", resolution: str = SIDE, length: int = 512, heat: float = 0.0) -> list:
    return [gradio_client.handle_file(image) if image else None, text, resolution, length, heat]


def ask(client, *args, **kwargs):
    """Messages of the conversation, and what the status says without its markup."""
    messages, status = client.predict(*question(*args, **kwargs), api_name="/ask")
    return [texts(message) for message in messages], re.sub("<[^>]+>", " ", status)


def texts(message) -> str:
    """What a message says; of an image, its file."""
    parts = [part.get("text") or part["file"] for part in message["content"]]
    return parts[0] if isinstance(parts[0], str) else parts[0]["path"]


def refusal(client, *args, **kwargs) -> str:
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        ask(client, *args, **kwargs)
    return str(caught.value)


def test_ask_and_follow_up(client, image, assistant):
    messages, status = ask(client, image, "What is on the sign?")
    assert messages == ["What is on the sign?", PLAIN]
    assert re.search(r"visual tokens\s+4\s+first token\s+\d+\.\d\d s\s+answer\s+\d+ tokens in", status)
    messages, _ = ask(client, image, "And below?")
    assert messages == ["What is on the sign?", PLAIN, "And below?", PLAIN]
    assert PLAIN in assistant.model.prompts[-1]


def test_answers_stream(client, image):
    job = client.submit(*question(image), api_name="/ask")
    job.result(timeout=60)
    said = [texts(output[0][-1]) for output in job.outputs()]
    assert len(set(said)) > 3 and said[-1] == PLAIN


def test_a_smaller_resolution_costs_fewer_tokens(client, image):
    _, status = ask(client, image, resolution="64 × 64 px · 1 visual token")
    assert re.search(r"resolution\s+64 × 64 px\s+visual tokens\s+1\s", status)


def test_boxes_come_as_an_image(client, image):
    messages, status = ask(client, image, "Where? Give a box.")
    assert messages[1] == BOXES and re.search(r"boxes\s+2", status)
    with Image.open(messages[2]) as drawn:
        assert drawn.size == (400, 300)


@pytest.mark.slow
def test_visitors_do_not_see_each_others_conversations(url, client, image):
    ask(client, image, "Mine?")
    other = gradio_client.Client(url, verbose=False)
    messages, _ = ask(other, image, "Yours?")
    assert messages == ["Yours?", PLAIN]
    messages, _ = ask(client, image, "Mine again?")
    assert messages == ["Mine?", PLAIN, "Mine again?", PLAIN]


def test_stop_ends_the_generation(client, image, assistant):
    job = client.submit(*question(image, "Say a long thing"), api_name="/ask")
    _until(lambda: len(job.outputs()) > 3)
    client.predict(api_name="/stop")
    messages, status = job.result(timeout=10)
    said = texts(messages[1])
    assert said and LONG.startswith(said) and len(said) < len(LONG)
    assert re.search(r"ended.*stopped", status)
    assert assistant.model.generating == 0 and assistant.model.generated < 500
    assert ask(client, image, "Again?")[0][-1] == PLAIN


def test_a_visitor_who_goes_away_ends_the_generation(url, image, assistant):
    client = gradio_client.Client(url, verbose=False)
    job = client.submit(*question(image, "Say a long thing"), api_name="/ask")
    _until(lambda: len(job.outputs()) > 1)
    job.cancel()
    _until(lambda: assistant.model.generating == 0)
    assert assistant.model.generated < 500


def _until(condition, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- bad input


def test_bad_input_is_answered_clearly_and_the_next_question_works(client, image, tmp_path, caplog):
    (tmp_path / "text.jpg").write_text("no image at all")
    content = (tmp_path / "image.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(content[: len(content) // 2])
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    for arguments, message in [
        ((None,), "There is no image yet"),
        ((str(tmp_path / "text.jpg"),), "not an image that can be read"),
        ((str(tmp_path / "broken.jpg"),), "damaged or incomplete"),
        ((str(tmp_path / "bomb.png"),), "too large"),
        ((image, "  "), "no question yet"),
        ((image, "x" * 5000), "5000 characters"),
        ((image, "What?", "9 px"), "9 px"),
        ((image, "What?", SIDE, 100_000), "1024"),
        ((image, "What?", SIDE, 512, 50.0), "2"),
    ]:
        told = refusal(client, *arguments)
        assert message in told and str(tmp_path) not in told
    messages, _ = ask(client, image, "What does <image> mean?")
    assert messages == ["What does <image> mean?", PLAIN]


def test_a_fault_of_the_program_is_told_without_its_details(client, image, caplog):
    told = refusal(client, image, "break")
    assert "Something went wrong on the server" in told and "secret" not in told
    assert "a fault with a /secret/path in it" in caplog.text  # and logged whole
    assert ask(client, image)[0] == ["What?", PLAIN]


def test_a_broken_image_is_told_as_soon_as_it_is_dropped(client, tmp_path):
    (tmp_path / "text.jpg").write_text("no image at all")
    image, messages, status = client.predict(gradio_client.handle_file(str(tmp_path / "text.jpg")), api_name="/look")
    assert messages == [] and "not an image that can be read" in status and "role='alert'" in status
    assert not image or image.get("value") is None


@pytest.mark.slow
def test_a_hundred_messages(client, image):
    """One visitor's conversation grows until it is refused; the refusal says what to do, and that works."""
    with pytest.raises(gradio_client.exceptions.AppError, match="Start a new one") as caught:
        for number in range(100):
            ask(client, image, f"Question {number}?", length=1)
    assert "has 30 questions" in str(caught.value)
    client.predict(api_name="/restart")
    assert ask(client, image, "New?")[0] == ["New?", PLAIN]


@pytest.mark.slow
def test_many_visitors_at_once_are_answered_or_told_that_it_is_full(url, image, assistant):
    clients = [gradio_client.Client(url, verbose=False) for _ in range(8)]
    jobs = [clients[number % 8].submit(*question(image, "Hi?"), api_name="/ask") for number in range(40)]
    answered, refused = 0, set()
    for job in jobs:
        try:
            answered += texts(job.result(timeout=120)[0][-1]) == PLAIN
        except Exception as error:  # noqa: BLE001
            refused.add(str(error))
    assert answered >= 4
    assert refused and all("full" in message for message in refused)
    assert ask(clients[0], image, "Still there?")[0][-1] == PLAIN


# --- what strangers can reach


def request(url: str, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, bytes]:
    """A request whose path goes over the wire as it is written here."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, response.read()


def form(content: bytes, name: str = "a.png") -> tuple[bytes, str]:
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
    body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def upload(url: str, content: bytes, name: str = "a.png") -> tuple[int, bytes]:
    body, content_type = form(content, name)
    return request(url, "POST", "/gradio_api/upload", body, Content_Type=content_type)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "../../../../etc/passwd",
        "%2Fetc%2Fpasswd",
        "/proc/self/environ",
        "pyproject.toml",
        "file:///etc/passwd",
        "{folder}/../../etc/passwd",
        "{tests}",
    ],
)
def test_files_of_the_host_cannot_be_read(url, path, client, image):
    folder = _folder_of(url, client, image)
    path = path.format(folder=folder, tests=urllib.parse.quote(__file__))
    for prefix in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/"):
        status, body = request(url, "GET", prefix + path)
        assert status in (403, 404, 405), (prefix, status)
        assert b"root:" not in body and b"PATH=" not in body and b"import" not in body


def _folder_of(url, client, image) -> str:
    """Where the server keeps uploads, as its answer to one says."""
    status, body = upload(url, open(image, "rb").read())
    assert status == 200
    return json.loads(body)[0].rpartition("/")[0].rpartition("/")[0]


def test_an_upload_can_be_read_by_who_knows_where_it_is(url, image):
    content = open(image, "rb").read()
    _, body = upload(url, content)
    assert request(url, "GET", f"/gradio_api/file={json.loads(body)[0]}") == (200, content)


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/hostname", __file__, "../../etc/passwd", "file:///etc/passwd"])
def test_a_question_cannot_name_a_file_of_the_host_as_its_image(url, path):
    told = _join(url, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert "process_completed" in told and '"success": false' in told.replace('":false', '": false')
    assert "root:" not in told and path not in told


def test_a_question_cannot_make_the_server_fetch_an_address(url, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download", lambda *args, **_: fetched.append(args)
    )
    for address in ("http://127.0.0.1:9/a.png", "https://example.com/a.png", "http://169.254.169.254/latest"):
        for image_data in (
            {"path": address, "meta": {"_type": "gradio.FileData"}},
            {"path": "", "url": address, "meta": {"_type": "gradio.FileData"}},
        ):
            told = _join(url, image_data)
            assert "process_generating" not in told and "process_completed" in told
            assert "from your device" in told or image_data["path"] == ""
    assert fetched == []


def _join(url: str, image: dict) -> str:
    """What the server streams back to a question with this image, sent as a program of ill will would."""
    config = json.loads(request(url, "GET", "/config")[1])
    index = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == "ask")
    session = uuid.uuid4().hex[:10]
    body = {"data": [image, "What?", SIDE, 8, 0, None], "fn_index": index, "session_hash": session}
    status, answer = request(
        url, "POST", "/gradio_api/queue/join", json.dumps(body).encode(), Content_Type="application/json"
    )
    assert status == 200, answer
    return request(url, "GET", f"/gradio_api/queue/data?session_hash={session}")[1].decode()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://127.0.0.1:9/a",
        "/gradio_api/file=https://example.com/",
        "/gradio_api/proxy=https://example.com/",
        "/gradio_api/deep_link?session_hash=a",
        "/gradio_api/runs",
        "/gradio_api/vibe-code",
        "/gradio_api/dev/reload",
        "/gradio_api/custom_component/0/client/component/index.js",
        "/monitoring",
        "/docs",
        "/openapi.json",
    ],
)
def test_what_the_page_does_not_need_is_closed(url, path):
    assert request(url, "GET", path)[0] == 404


@pytest.mark.parametrize(
    "path", ["/gradio_api/component_server", "/gradio_api/vibe-edit", "/gradio_api/process_recording"]
)
def test_what_would_change_the_page_is_closed(url, path):
    assert request(url, "POST", path, b"{}", Content_Type="application/json")[0] == 404


def test_the_queue_cannot_be_passed_by(url):
    config = json.loads(request(url, "GET", "/config")[1])
    index = next(entry["id"] for entry in config["dependencies"] if entry["api_name"] == "ask")
    body = json.dumps({"data": [None, "What?", SIDE, 8, 0, None], "fn_index": index, "session_hash": "abc"}).encode()
    status, _ = request(url, "POST", "/gradio_api/run/predict", body, Content_Type="application/json")
    assert status >= 400
    assert request(url, "POST", "/gradio_api/run/ask", body, Content_Type="application/json")[0] == 404


def test_uploads_are_bounded(url):
    assert upload(url, b"x" * (UPLOAD - 1000))[0] == 200
    status, body = upload(url, b"x" * (UPLOAD + 100_000))
    assert status == 413 and b"too large" in body
    assert upload(url, b"x" * (UPLOAD + 100))[0] in (400, 413)  # within the request's bound, not within the file's
    chunks = iter([b"x"])
    assert request(url, "POST", "/gradio_api/upload", chunks, Transfer_Encoding="chunked")[0] == 411


def test_stored_uploads_are_bounded(assistant):
    limits = Limits(upload_bytes=200_000, stored_bytes=500_000)
    with page_of(assistant, "scripted", limits=limits) as url:
        statuses = [upload(url, bytes([number]) * 150_000)[0] for number in range(6)]
        assert statuses[0] == 200 and statuses[-1] == 503
        assert request(url, "GET", "/")[0] == 200


def disk_bytes(folder: Path) -> int:
    """What `du` says."""
    return sum(512 * path.lstat().st_blocks for path in (folder, *folder.rglob("*")))


def test_the_bound_holds_for_uploads_that_arrive_together(assistant):
    limits = Limits(upload_bytes=1_000_000, stored_bytes=5_000_000)
    with page_of(assistant, "scripted", limits=limits) as other:
        bodies = [form(bytes([number]) * 900_000) for number in range(24)]
        with ThreadPoolExecutor(24) as pool:
            sent = [
                pool.submit(request, other, "POST", "/gradio_api/upload", body, Content_Type=content_type)
                for body, content_type in bodies
            ]
            answers = [one.result() for one in sent]
        statuses = Counter(status for status, _ in answers)
        assert set(statuses) == {200, 503} and 1 <= statuses[200] <= 5
        folder = Path(next(json.loads(body)[0] for status, body in answers if status == 200)).parents[1]
        assert disk_bytes(folder) <= limits.stored_bytes
        # What was refused has left no reservation: as much as before fits in again.
        for path in folder.glob("*/a.png"):
            path.unlink()
        assert upload(other, b"x" * 900_000)[0] == 200


@pytest.mark.slow
def test_many_small_files_take_no_more_than_the_bound(assistant):
    limits = Limits(upload_bytes=1_000_000, stored_bytes=800_000)
    with page_of(assistant, "scripted", limits=limits) as url:
        _, body = upload(url, b"first")
        folder = Path(json.loads(body)[0]).parents[1]
        before = len(list(folder.rglob("*")))
        boundary = uuid.uuid4().hex
        parts = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{number}"\r\n\r\n{number}\r\n'
            for number in range(1000)
        )
        content = f"{parts}--{boundary}--\r\n".encode()
        headers = {"Content_Type": f"multipart/form-data; boundary={boundary}"}
        status, said = request(url, "POST", "/gradio_api/upload", content, **headers)
        assert status == 413 and b"too many files" in said
        assert len(list(folder.rglob("*"))) - before < 20
        statuses = [upload(url, b"%d" % number)[0] for number in range(100)]  # each of one block, in one more
        assert statuses[0] == 200 and statuses[-1] == 503
        assert disk_bytes(folder) <= limits.stored_bytes


def test_the_number_of_stored_files_is_bounded(assistant):
    with page_of(assistant, "scripted", limits=Limits(stored_files=20)) as url:
        statuses = [upload(url, b"%d" % number)[0] for number in range(12)]
        assert statuses[0] == 200 and statuses[-1] == 503


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_the_files_of_an_upload_are_counted_however_its_body_is_cut(size):
    """Against Gradio's own parser, which is given what the guard lets through."""

    def parts(count: int) -> bytes:
        head = b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
        return b"".join(head + b"-%d-\r\n" % number for number in range(count)) + b"--xyz--\r\n"

    async def through(body: bytes) -> tuple[int, bool]:
        pieces = iter([body[start : start + size] for start in range(0, len(body), size)])
        left = {"pieces": len(range(0, len(body), size))}

        async def receive() -> dict:
            left["pieces"] -= 1
            return {"type": "http.request", "body": next(pieces), "more_body": left["pieces"] > 0}

        guarded = _Upload({"headers": [(b"content-type", b"multipart/form-data; boundary=xyz")]}, receive)

        async def stream():
            more = True
            while more:
                message = await guarded.receive()
                more = message["more_body"]
                yield message["body"]

        headers = Headers({"Content-Type": "multipart/form-data; boundary=xyz"})
        data = await GradioMultiPartParser(headers, stream(), max_file_size=1000).parse()
        return len(data.getlist("files")), guarded.cut

    for count in (1, 4, 5, 40):
        assert asyncio.run(through(parts(count))) == (min(count, 4), count > 4), count


@pytest.mark.slow
def test_uploads_that_were_broken_off_are_deleted(assistant):
    with page_of(assistant, "scripted", limits=Limits(stored_seconds=2)) as url:
        folder = Path(json.loads(upload(url, b"first")[1])[0]).parents[1]
        body, content_type = form(b"x" * 200_000)
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Type: {content_type}\r\n"
        with socket.create_connection(urllib.parse.urlsplit(url).netloc.split(":")) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:100_000])
            _until(lambda: [path for path in folder.iterdir() if path.is_file()])
        time.sleep(2.5)
        assert upload(url, b"second")[0] == 200
        assert not [path for path in folder.iterdir() if path.is_file()]


@pytest.mark.slow
def test_uploads_and_drawings_are_deleted_and_the_examples_stay(assistant, image):
    with page_of(assistant, "scripted", limits=Limits(stored_seconds=2)) as url:
        client = gradio_client.Client(url, verbose=False, download_files=False)
        _, body = upload(url, open(image, "rb").read() + b"never asked about")
        folder = Path(json.loads(body)[0]).parents[1]
        messages, _ = client.predict(*question(image, "Where? Give a box."), api_name="/ask")
        assert Path(messages[2]["content"][0]["file"]["path"]).is_file()
        examples = json.loads(request(url, "GET", "/config")[1])
        example = next(part for part in examples["components"] if part["type"] == "dataset")["props"]["samples"][0][0]
        asked = _join(url, {"path": example["path"], "meta": {"_type": "gradio.FileData"}})
        assert "visual tokens" in asked

        def files() -> set[str]:
            return {path.name for path in folder.rglob("*") if path.is_file()}

        _until(lambda: files() == {"street-sign.png", "receipt.png", "rain.png", "table.png"})
        time.sleep(2)
        assert Path(example["path"]).is_file()


@pytest.mark.parametrize("name", ["a.html", "a.svg", "a.xml", "a"])
def test_an_uploaded_page_is_not_shown_as_one(url, name):
    """Its scripts would run as this page's own."""
    content = b"<html xmlns='http://www.w3.org/1999/xhtml'><script>alert(1)</script></html>"
    _, body = upload(url, content, name=name)
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
    connection.request("GET", f"/gradio_api/file={json.loads(body)[0]}")
    headers = connection.getresponse().headers
    assert headers["Content-Disposition"].startswith("attachment")
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_names_of_uploads_stay_in_their_folder(url):
    status, body = upload(url, b"x", name="../../../../tmp/outside.png")
    assert status in (200, 400)
    if status == 200:
        path = json.loads(body)[0]
        assert ".." not in path and "/convllava-demo-" in path


def test_every_answer_keeps_the_browser_on_this_page(url):
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc)
    connection.request("GET", "/")
    policy = connection.getresponse().headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy


def test_gradio_leaves_the_packages_folder_as_it_is(url):
    assert list(Path(demo.__file__).parent.glob("*.pyi")) == []


def test_a_taken_port_is_told(url, assistant):
    port = urllib.parse.urlsplit(url).port
    with (
        pytest.raises(ConvLlavaError, match=f"port {port}.*--port"),
        page_of(assistant, "scripted", port=port, limits=Limits()),
    ):
        pass
