"""Files as they come: broken, of odd formats, no files at all. What the image processor raises is an `ImageError`."""

import base64
import copy
import http.server
import io
import os
import pickle
import random
import socket
import struct
import threading

import numpy as np
import pytest
from helpers.tiny_models import image_with_broken_exif, make_image, make_processor
from PIL import Image, ImageOps

from convllava_hf import ConvLlavaImageProcessor
from convllava_hf.cli import main
from convllava_hf.data.image_files import examine, stored_size, upright_size
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import open_image
from convllava_hf.modeling.image_processing_convllava import ImageError
from convllava_hf.modeling.image_utils_convllava import IMAGE_FORMATS, orientation_of


PROCESSOR = ConvLlavaImageProcessor(size=128)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or make_image(40, 60)).save(buffer, kind, **options)
    return buffer.getvalue()


def with_exif(entries: list[tuple], tail: bytes = b"") -> bytes:
    """A JPEG of 40 x 60 with EXIF entries of tag, type, count and four bytes."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    body = struct.pack("<H", len(entries)) + packed + bytes(4) + tail
    payload = b"Exif\0\0II*\0" + struct.pack("<I", 8) + body
    plain = encoded("JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + plain[2:]


# --- what is no file


@pytest.fixture
def odd_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket.png"))
    os.symlink("/dev/zero", tmp_path / "device.png")
    (tmp_path / "folder.png").mkdir()
    yield {
        "pipe": tmp_path / "pipe.png",
        "socket": tmp_path / "socket.png",
        "device": tmp_path / "device.png",
        "folder": tmp_path / "folder.png",
    }
    server.close()


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(odd_paths, kind):
    path = odd_paths[kind]
    for look in (PROCESSOR, PROCESSOR.fetch_images, lambda path: PROCESSOR({"bytes": None, "path": str(path)})):
        with pytest.raises(ImageError, match=f"{path.name}.* is not an image but a {kind}"):
            look(path)
    assert examine({"bytes": None, "path": str(path)}).kind in ("unreadable image", "missing image")
    assert stored_size({"bytes": None, "path": str(path)}) is None
    with pytest.raises(ConvLlavaError, match=f"a {kind}"):
        open_image(path)


def test_ask_refuses_a_pipe_on_one_line(odd_paths, checkpoint, capsys):
    assert main(["ask", str(checkpoint), str(odd_paths["pipe"]), "What?"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "is not an image but a pipe" in err and err.count("\n") == 1


@pytest.mark.parametrize("path", ["a" * 5000 + ".png", "a\0b.png", "\ud800.png", "x/" * 3000])
def test_names_that_no_file_can_have(path):
    with pytest.raises((ImageError, FileNotFoundError)) as caught:
        PROCESSOR(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert examine({"bytes": None, "path": path}).kind in ("unreadable image", "missing image")


@pytest.mark.parametrize("row", [{"bytes": "abc"}, {"bytes": 5}, {"path": 5}, {"bytes": b"", "path": None}])
def test_rows_of_other_types_are_refused(row):
    with pytest.raises(ImageError):
        PROCESSOR.fetch_images(row)
    assert examine(row).kind is not None and stored_size(row) is None


class Server(http.server.BaseHTTPRequestHandler):
    """An image, a redirect to it, PostScript, and nothing else."""

    files = {"/photo.png": encoded("PNG"), "/drawing.png": EPS}

    def do_GET(self):
        content = self.files.get(self.path)
        self.send_response(302 if self.path == "/moved.png" else 404 if content is None else 200)
        self.send_header("Location", "/photo.png")
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args):
        pass


def test_urls_are_read_as_files_are(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        expected = PROCESSOR({"bytes": encoded("PNG"), "path": None})["pixel_values"]
        for name in ("photo.png", "moved.png"):
            np.testing.assert_array_equal(PROCESSOR(f"{base}/{name}")["pixel_values"], expected)
        with pytest.raises(ImageError, match="drawing.png.* is not an image of a format"):
            PROCESSOR(f"{base}/drawing.png")
        with pytest.raises(ImageError, match=r"Cannot read an image from .*gone.png.*404"):
            PROCESSOR(f"{base}/gone.png")
        server.shutdown()


# --- formats


@pytest.mark.parametrize("name", ["cat.jpg", "cat.eps"])
def test_postscript_starts_no_ghostscript(name, tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started"))
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(ImageError, match=f"{name}.* is not an image of a format that is opened here"):
        PROCESSOR(tmp_path / name)
    with pytest.raises(ImageError, match="PostScript"):
        PROCESSOR(Image.open(tmp_path / name))
    with pytest.raises(ImageError, match="is not an image of a format"):
        PROCESSOR("data:image/png;base64," + base64.b64encode(EPS).decode())
    with pytest.raises(ConvLlavaError):
        open_image(tmp_path / name)
    assert examine({"bytes": EPS, "path": name}).kind == "unreadable image"
    assert stored_size({"bytes": EPS, "path": name}) is None


def test_every_format_of_the_list_is_opened():
    Image.init()
    image = make_image(40, 60)
    for kind in set(IMAGE_FORMATS) & set(Image.OPEN):
        row = {"bytes": encoded(kind, image), "path": None}
        difference = np.abs(PROCESSOR(row, return_tensors="np")["pixel_values"] - PROCESSOR(image)["pixel_values"])
        assert difference.mean() < 0.5, kind
        assert examine(row).kind is None and examine(row).size == stored_size(row) == (40, 60)


def test_deep_images_in_base64_are_as_in_files():
    deep = np.asarray(make_image(mode="L")).astype(np.uint16) * 257
    content = encoded("PNG", Image.fromarray(deep))
    given = PROCESSOR("data:image/png;base64," + base64.b64encode(content).decode())["pixel_values"]
    np.testing.assert_array_equal(given, PROCESSOR(deep)["pixel_values"])


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_images_without_pixels_are_refused(size):
    with pytest.raises(ImageError, match=f"number 2 of the call has {size[0]} x {size[1]} pixels"):
        PROCESSOR([make_image(), Image.new("RGB", size)])


# --- EXIF

SIX = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    "content, turns",
    [
        (with_exif([(0x0100, 2, 4, b"abc\0"), SIX]), True),
        (with_exif([SIX, (0x011A, 5, 1, struct.pack("<I", 38))], struct.pack("<II", 72, 0)), True),
        (with_exif([(0x0103, 11, 1, struct.pack("<f", 1.5)), SIX]), True),
        (with_exif([(0x0112, 2, 2, b"6\0\0\0")]), False),
        (with_exif([(0x0112, 7, 4, b"\x06\0\0\0")]), False),
        (with_exif([(0x0112, 3, 1, struct.pack("<HH", 9, 0))]), False),
        (with_exif([SIX]).replace(b"II*\0", b"??*\0"), False),
    ],
)
def test_broken_exif_hides_no_image(content, turns, tmp_path):
    """PIL decodes the pixels: they are shown, turned where the orientation can be read."""
    stored = Image.open(io.BytesIO(encoded("JPEG")))
    expected = stored.transpose(Image.Transpose.ROTATE_270) if turns else stored
    row = {"bytes": content, "path": "photo.jpg"}
    for image in (row, Image.open(io.BytesIO(content)), PROCESSOR.fetch_images(row)):
        np.testing.assert_array_equal(PROCESSOR(image)["pixel_values"], PROCESSOR(expected)["pixel_values"])
    found = examine(row)
    assert found.kind is None and found.size == stored_size(row) == (expected.height, expected.width)
    (tmp_path / "photo.jpg").write_bytes(content)
    assert open_image(tmp_path / "photo.jpg").size == expected.size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("loaded", [False, True])
def test_the_upright_size_is_that_of_the_image_turned_by_pil(kind, orientation, loaded):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    make_image(20, 30).save(buffer, kind, exif=exif)
    width, height = ImageOps.exif_transpose(Image.open(buffer)).size
    with Image.open(buffer) as image:
        if loaded:
            image.load()
        assert upright_size(image) == (height, width)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_pils(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    row = {"bytes": content, "path": None}
    once = PROCESSOR.fetch_images(row)
    assert once.tobytes() == expected.tobytes() and orientation_of(once) == 1
    assert PROCESSOR.fetch_images(once) is once
    assert examine(row).size == stored_size(row) == (expected.height, expected.width)


# --- one door


@pytest.mark.filterwarnings("ignore")
def test_changed_bytes_raise_nothing_but_image_errors_and_the_check_agrees(monkeypatch):
    """Over all formats: what the check finds good can be prepared, and whatever PIL raises is an `ImageError`."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    Image.init()
    chance = random.Random(0)
    gray = make_image(24, 32, mode="L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    floats = Image.fromarray((np.asarray(gray) / 255).astype(np.float32))
    files = [encoded(kind, make_image(24, 32)) for kind in set(IMAGE_FORMATS) & set(Image.OPEN)]
    files += [encoded("PNG", deep), encoded("TIFF", deep), encoded("TIFF", floats), image_with_broken_exif()]
    files += [encoded("GIF", gray.convert("P")), encoded("TIFF", compression="tiff_lzw"), encoded("PNG", gray)]
    outcomes = {True: 0, False: 0}
    for _ in range(600):
        content = bytearray(chance.choice(files))
        for _ in range(chance.randrange(1, 4)):
            # Headers decide most; a byte of pixels is rarely missed.
            reach = chance.choice((64, 300, len(content)))
            content[chance.randrange(min(reach, len(content)))] = chance.randrange(256)
        row = {"bytes": bytes(content), "path": None}
        try:
            PROCESSOR.fetch_images(row)
            PROCESSOR(row)
            opens = True
        except ImageError as error:
            assert "\n" not in str(error)
            opens = False
        assert opens or examine(row).kind is not None, bytes(content)
        outcomes[opens] += 1
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.parametrize(
    "raised", [TypeError("a"), IndexError("b"), struct.error("c"), SyntaxError("d"), MemoryError()]
)
def test_whatever_pil_raises_is_one_error_that_names_the_file(raised, tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    make_image().save(path)

    def load(self):
        raise raised

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    for image in (path, Image.open(path)):
        with pytest.raises(ImageError, match="photo.png.* cannot be decoded") as caught:
            PROCESSOR(image)
        assert caught.value.__cause__ is raised
    assert examine({"bytes": None, "path": str(path)}).kind == "truncated image"


def test_what_cannot_be_prepared_is_named():
    with pytest.raises(ImageError, match="number 1 of the call cannot be prepared"):
        PROCESSOR(make_image(50, 70), do_resize=False, image_aspect_ratio="native")


def test_open_image_meets_what_only_converting_finds(tmp_path):
    bright = np.linspace(0, 3, 64**2, dtype=np.float32).reshape(64, 64)
    Image.fromarray(bright).save(tmp_path / "bright.tif")
    with pytest.raises(ConvLlavaError, match=r"bright.tif.*expected \[0, 1\]"):
        open_image(tmp_path / "bright.tif")
    assert examine({"bytes": None, "path": str(tmp_path / "bright.tif")}).kind == "unreadable image"


# --- threads


def test_threads_with_different_padding_get_what_each_gets_alone():
    processor = make_processor()
    processor = pickle.loads(pickle.dumps(copy.deepcopy(processor)))
    image = make_image()
    texts = ["<image>\nWhat is this?", "<image>\nA longer question about the sign on the left, please: what is it?"]
    ways = [
        {"padding": True},
        {"padding": "max_length", "max_length": 120},
        {"padding": "longest", "pad_to_multiple_of": 32},
        {"padding": False},
    ]
    expected = [processor([image, image], texts, **way)["input_ids"] for way in ways]
    failures = []

    def work(number: int) -> None:
        way = number % len(ways)
        for _ in range(12):
            try:
                assert processor([image, image], texts, **ways[way])["input_ids"] == expected[way]
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
