"""What is behind the web page: boxes, images of strangers, presets, the Space, the command. Needs no gradio."""

import ast
import asyncio
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.demo_models import BOXES
from helpers.tiny_models import image_with_broken_exif, make_image, make_processor
from PIL import Image

from convllava_hf import cli
from convllava_hf.demo import space_files
from convllava_hf.demo.answer_boxes import Box, boxes_in, draw, on_image
from convllava_hf.demo.examples import write_examples
from convllava_hf.demo.guard import Guard
from convllava_hf.demo.images import read_image
from convllava_hf.demo.limits import Limits
from convllava_hf.demo.presets import Preset, presets, view
from convllava_hf.demo.space import GRADIO_VERSION
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import load


LIMITS = Limits()


# --- boxes


def test_boxes_of_an_answer():
    assert boxes_in(BOXES) == [Box(0.41, 0.44, 0.65, 0.70), Box(0.12, 0.55, 0.31, 0.72)]
    assert boxes_in("[0,0,1,1] then [ .5 , 0.25,1.0, 1. ] and again [0,0,1,1]") == [
        Box(0, 0, 1, 1),
        Box(0.5, 0.25, 1, 1),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "in [1, 2, 3, 4]",
        "[0.1, 0.2, 0.4]",
        "[0.1, 0.2, 0.4, 0.5, 0.6]",
        "[0.4, 0.2, 0.1, 0.5]",
        "[0.1, 0.5, 0.4, 0.5]",
        "[-0.1, 0.2, 0.4, 0.5]",
        "[0.1, 0.2, 0.4, 1.5]",
        "(0.1, 0.2, 0.4, 0.5)",
        "[0.1, 0.2, 0.4, 0.5",
        "[a, b, c, d]",
        "[" * 5000 + "0.1," * 5000,
    ],
)
def test_other_numbers_are_no_boxes(text):
    start = time.perf_counter()
    assert boxes_in(text) == []
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("width", "height"), [(300, 120), (120, 301), (200, 200), (640, 37)])
def test_the_padding_is_undone(width, height):
    """Against the image processor itself: a mark drawn on the image is found in what the model sees."""
    left, top, right, bottom = width // 4, height // 3, width // 4 + width // 3, height // 3 + height // 2
    image = Image.new("RGB", (width, height), "black")
    image.paste((255, 255, 255), (left, top, right, bottom))
    processor = make_processor(768).image_processor
    white = processor(image, return_tensors="np")["pixel_values"][0].min(axis=0) > 1
    rows, columns = np.where(white)
    seen = Box(columns.min() / 768, rows.min() / 768, (columns.max() + 1) / 768, (rows.max() + 1) / 768)
    found = on_image(seen, view(processor, Preset("own"), width, height))
    tolerance = 2 * max(width, height) / 768 + 1  # two pixels of the model's view, in pixels of the image
    for edge, expected in [
        (found.left * width, left),
        (found.top * height, top),
        (found.right * width, right),
        (found.bottom * height, bottom),
    ]:
        assert edge == pytest.approx(expected, abs=tolerance)


def test_a_box_is_cut_at_the_image_and_gone_in_the_padding():
    wide = view(make_processor().image_processor, Preset("own"), 400, 200)  # the image is the middle half
    assert on_image(Box(0, 0, 1, 1), wide) == Box(0, 0, 1, 1)
    assert on_image(Box(0.5, 0.1, 1, 0.5), wide) == Box(0.5, 0, 1, 0.5)
    assert on_image(Box(0.2, 0.0, 0.4, 0.25), wide) is None
    assert on_image(Box(0.2, 0.76, 0.4, 0.9), wide) is None


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (400, 200), "white")
    drawn = np.asarray(draw(image, [Box(0.25, 0.5, 0.75, 1.0)]))
    rows, columns = np.where((drawn != 255).any(axis=-1))
    assert (columns.min(), columns.max()) == (100, 299)
    assert (rows.min(), rows.max()) == (100, 199)
    assert (drawn[120:180, 120:280] == 255).all()  # the inside stays visible
    assert (np.asarray(image) == 255).all()
    assert max(draw(Image.new("RGB", (5000, 40)), [Box(0, 0, 1, 1)] * 100).size) == 1280


# --- images


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A PNG of 200 million pixels in few bytes."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(path)
    assert path.stat().st_size < 100_000
    return path


def test_images_are_read_upright_in_rgb_and_bounded(tmp_path):
    sideways = make_image(60, 100)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    sideways.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", LIMITS).size == (60, 100)
    make_image(50, 50, mode="RGBA").save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png", LIMITS).mode == "RGB"
    Image.new("RGB", (9000, 100)).save(tmp_path / "c.png")
    assert read_image(tmp_path / "c.png", LIMITS).size == (4096, 46)


def test_a_small_image_is_untouched(tmp_path):
    image = make_image(300, 400)
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", LIMITS).tobytes() == image.tobytes()


def test_too_many_pixels_are_refused_before_they_are_decoded(bomb, tmp_path):
    start = time.perf_counter()
    with pytest.raises(ConvLlavaError, match="too large.*50 million"):
        read_image(bomb, LIMITS)
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    with pytest.raises(ConvLlavaError, match="10000 x 6000 pixels, and this page takes 50 million"):
        read_image(tmp_path / "large.png", LIMITS)
    assert time.perf_counter() - start < 2


def test_files_that_are_no_images_are_refused_without_naming_their_place(tmp_path):
    make_image().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    files = {
        "text.jpg": b"no image at all",
        "empty.png": b"",
        "half.png": whole[: len(whole) // 2],
        "header.png": whole[:40],
        "header.bmp": b"BM" + bytes(60),
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvLlavaError, match="not an image|damaged") as caught:
            read_image(tmp_path / name, LIMITS)
        assert str(tmp_path) not in str(caught.value) and name not in str(caught.value)


def test_an_image_with_broken_exif_is_shown_upright(tmp_path):
    (tmp_path / "exif.jpg").write_bytes(image_with_broken_exif())
    assert read_image(tmp_path / "exif.jpg", LIMITS).size == make_image().size[::-1]


# --- presets


def test_presets_are_multiples_of_the_stride_up_to_the_checkpoints_own():
    offered = presets(make_processor(1536).image_processor)
    assert list(offered) == [
        "1536 × 1536 px · 576 visual tokens",
        "1024 × 1024 px · 256 visual tokens",
        "768 × 768 px · 144 visual tokens",
        "512 × 512 px · 64 visual tokens",
        "own shape · up to 576 visual tokens",
        "own shape · up to 256 visual tokens",
    ]
    assert [len(presets(make_processor(side).image_processor)) for side in (64, 128, 192, 512)] == [1, 2, 3, 5]


def test_a_checkpoint_of_native_images_offers_its_own_way_first():
    offered = presets(make_processor(768, preset="large").image_processor)
    assert list(offered) == [
        "own shape · up to 576 visual tokens",
        "512 × 512 px · 64 visual tokens",
        "256 × 256 px · 16 visual tokens",
        "128 × 128 px · 4 visual tokens",
        "own shape · up to 256 visual tokens",
    ]
    fixed = presets(make_processor(128, image_aspect_ratio="shortest_edge").image_processor)
    assert list(fixed) == ["shorter side 128 px · up to 32 visual tokens", "64 × 64 px · 1 visual token"]


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (300, 900), (5, 5)])
@pytest.mark.parametrize("own", [{}, {"preset": "small"}, {"image_aspect_ratio": "shortest_edge"}])
def test_a_preset_shows_the_model_that_many_pixels(own, shape):
    """The figures of a preset are those of the processor's own call."""
    processor = make_processor(768, **own)
    image = make_image(*shape)
    for preset in presets(processor.image_processor).values():
        data = processor.image_processor(image, return_tensors="np", **preset.image_options)
        seen = view(processor.image_processor, preset, *image.size)
        assert data["pixel_values"].shape[2:] == (seen.height, seen.width)
        inputs = processor(image, "<image>", images_kwargs=dict(preset.image_options))
        assert inputs["input_ids"][0].count(processor.image_token_id) == seen.visual_tokens
        whole = (seen.left, seen.top, seen.across, seen.down) == (0, 0, 1, 1)
        assert whole is (shape[0] == shape[1] or "px" not in preset.name or "shorter" in preset.name)


# --- examples, the Space, the command


def test_examples_are_images_with_questions(tmp_path):
    examples = write_examples(tmp_path / "examples")
    assert len(examples) == 4
    for path, question in examples:
        assert max(read_image(path, LIMITS).size) == 1200 and question[-1] in "?."


def test_space_files_describe_the_space():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files = space_files("someone/ConvLLaVA-1536")
    card = huggingface_hub.SpaceCard(files["README.md"]).data.to_dict()
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["someone/ConvLLaVA-1536"]
    assert card["sdk_version"] == GRADIO_VERSION and len(card["short_description"]) <= 60
    compile(files["app.py"], "app.py", "exec")
    assert '"someone/ConvLLaVA-1536"' in files["app.py"]
    requirements = files["requirements.txt"].splitlines()
    assert any(line.startswith("transformers") for line in requirements)
    assert not any("extra" in line or line.startswith(("trl", "gradio", "convllava")) for line in requirements)


def test_space_files_are_the_packages_own():
    from pathlib import Path

    import convllava_hf

    package = Path(convllava_hf.__file__).parent
    files = space_files("someone/model")
    for name in ("inference/assistant.py", "demo/page.py", "demo/chat_session.py"):
        assert files[f"convllava_hf/{name}"] == (package / name).read_text(encoding="utf-8")
    assert "convllava_hf/modeling/modeling_convllava.py" in files


@pytest.mark.parametrize("name", ["./folder", "model", "a/b/c", 'a/b"', "a/b\n"])
def test_a_space_needs_an_id_of_the_hub(name):
    with pytest.raises(ConvLlavaError, match="owner/name"):
        space_files(name)


def test_space_files_need_no_gradio_and_no_torch():
    code = (
        "import sys\nsys.argv = ['convllava']\nfrom convllava_hf.demo import space_files\nspace_files('a/b')\n"
        "print(sorted({'gradio', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_without_gradio_the_command_names_the_remedy(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", str(checkpoint)]) == 2
    assert "pip install 'convllava-hf[demo]'" in capsys.readouterr().err


def test_the_command_hands_on_what_it_was_told(checkpoint, monkeypatch):
    seen = {}
    monkeypatch.setattr("convllava_hf.demo.serving.serve", lambda model, **options: seen.update(options, model=model))
    flags = ["--host", "0.0.0.0", "--port", "8000", "--queue", "3", "--max-upload", "2", "--max-new-tokens", "4096"]
    assert cli.main(["demo", str(checkpoint), *flags]) == 0
    assert (seen["model"], seen["host"], seen["port"]) == (str(checkpoint), "0.0.0.0", 8000)
    assert (seen["limits"].queue, seen["limits"].upload_bytes) == (3, 2 * 2**20)
    assert seen["generation"]["max_new_tokens"] == seen["limits"].answer_tokens == 4096


def test_websockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message["type"])

    asyncio.run(Guard(None, 1, 1, 1, 1, ".")({"type": "websocket", "path": "/gradio_api/queue/join"}, None, send))
    assert sent == ["websocket.close"]


@pytest.mark.parametrize("flags", [["--port", "0"], ["--port", "70000"], ["--queue", "0"], ["--max-upload", "x"]])
def test_mistakes_in_the_command_are_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "model", *flags])
    assert flags[0] in capsys.readouterr().err


def _copes_without(node: ast.AST) -> bool:
    """Whether it is `try: ... except ModuleNotFoundError`."""
    return isinstance(node, ast.Try) and "ModuleNotFoundError" in {
        handler.type.id for handler in node.handlers if isinstance(handler.type, ast.Name)
    }


def test_a_space_asks_to_convert_an_original_first(golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "convllava_hf.convert.cache", None)  # a Space does not have it
    with pytest.raises(ConvLlavaError, match="convllava convert"):
        load(golden / "checkpoint-stage3")


def test_a_space_holds_every_file_that_its_files_import():
    files = space_files("someone/model")
    lacking = set()
    for name, content in files.items():
        if not name.endswith(".py") or "/" not in name:
            continue
        package = Path(name).parent
        nodes = list(ast.walk(ast.parse(content)))
        # What may be missing has its way out beside it.
        optional = {child for node in nodes if _copes_without(node) for child in node.body}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level and node not in optional:
                base = [package, *package.parents][node.level - 1]
                module = base.joinpath(*(node.module or "").split("."))
                if node.module and not {f"{module}.py", f"{module}/__init__.py"} & set(files):
                    lacking.add(f"{name}: {module}")
    assert not lacking
