"""Boxes are found in texts and moved between the padded square and the image; what is no box stays as it is."""

import math
import random
import time

import numpy as np
import pytest
from PIL import Image

import convllava_hf
from convllava_hf import convert_boxes
from convllava_hf.boxes import draw_boxes, find_boxes, frame_of_mode, place_in_square
from convllava_hf.errors import ConvLlavaError
from convllava_hf.modeling.configuration_convllava import IMAGE_ASPECT_RATIOS


SIZES = [(480, 640), (640, 480), (3000, 1000), (1080, 1920), (101, 60), (60, 101), (33, 32), (7, 300)]


@pytest.mark.parametrize(
    ("square", "image"),
    [
        ("[0.10, 0.16, 0.40, 0.39]", "[0.10, 0.05, 0.40, 0.35]"),
        ("[0.100, 0.163, 0.400, 0.388]", "[0.100, 0.051, 0.400, 0.351]"),
        ("[100, 163, 400, 388]", "[100, 51, 400, 351]"),
        ("[0.10,0.16,0.40,0.39]", "[0.10,0.05,0.40,0.35]"),
        ("(0.10, 0.16, 0.40, 0.39)", "(0.10, 0.05, 0.40, 0.35)"),
        ("at [ 0.10 ,0.16,  0.40, 0.39 ], or so.", "at [ 0.10 ,0.05,  0.40, 0.35 ], or so."),
        ('{"bbox_2d": [100, 163, 400, 388]}', '{"bbox_2d": [100, 51, 400, 351]}'),
        ("[[0.10, 0.16, 0.40, 0.39], [0.10, 0.5, 0.40, 0.61]]", "[[0.10, 0.05, 0.40, 0.35], [0.10, 0.5, 0.40, 0.65]]"),
        ("[0, 0.16, 1, 0.5]", "[0, 0.05, 1, 0.5]"),  # JSON's own way to write numbers
    ],
)  # fmt: skip
def test_a_box_in_both_frames(square, image):
    """Of 640 x 480 pixels; the first is the box from pixel (64, 24) to (256, 168)."""
    assert convert_boxes(square, 480, 640) == image
    assert convert_boxes(image, 480, 640, source="image", target="square") == square
    assert convert_boxes(square, 480, 640, "square", "square") == square
    assert convert_boxes(square, 640, 640) == square


def test_single_boxes():
    found = convert_boxes((64 / 640, (24 + 80) / 640, 256 / 640, (168 + 80) / 640), height=480, width=640)
    assert found == pytest.approx((64 / 640, 24 / 480, 256 / 640, 168 / 480))
    assert convert_boxes([100, 163, 400, 388], 480, 640) == (100, 51, 400, 351)
    assert convert_boxes(np.array([0.1, 0.0, 0.4, 0.5]), 480, 640) == pytest.approx((0.1, 0.0, 0.4, 0.5))  # clipped
    assert "convert_boxes" in convllava_hf.__all__


@pytest.mark.parametrize(
    "text",
    [
        "in [1, 2, 3, 4]",
        "[0, 0, 1, 1]",
        "[0, 1, 1, 0]",
        "the years [1914, 1918, 1939, 1945]",
        "[0.16, 0.39, 0.10, 0.40]",  # the third is smaller than the first
        "[0.10, 0.39, 0.40, 0.16]",
        "[-0.10, 0.16, 0.40, 0.39]",
        "[0.10, 0.16, 0.40, 1.39]",
        "[100.5, 163.0, 400.0, 388.5]",
        "[100, 163, 400, 1001]",
        "[0.10, 0.16, 0.40]",
        "[0.10, 0.16, 0.40, 0.39, 0.50]",
        "0.10, 0.16, 0.40, 0.39",
        "[0.10, 0.16, 0.40, 0.39",
        "[0.10, 0.16, 0.40, 0.39)",
        "[a, b, c, d] [1e999, 0, 1e999, 1]",
        "",
    ],
)
def test_other_numbers_are_left_alone(text):
    assert convert_boxes(text, 480, 640) == text
    assert convert_boxes(text, 480, 640, "image", "square") == text


def test_a_box_in_the_padding_alone_is_left_and_others_are_clipped():
    assert convert_boxes("[0.10, 0.00, 0.40, 0.08]", 480, 640) == "[0.10, 0.00, 0.40, 0.08]"
    assert convert_boxes("[0.10, 0.90, 0.40, 1.00]", 480, 640) == "[0.10, 0.90, 0.40, 1.00]"
    assert convert_boxes("[0.10, 0.05, 0.40, 0.39]", 480, 640) == "[0.10, 0.00, 0.40, 0.35]"
    assert convert_boxes("[0.10, 0.12, 0.40, 0.97]", 480, 640) == "[0.10, 0.00, 0.40, 1.00]"
    # Flat boxes at the edge of the image, in the padding by rounding alone.
    assert convert_boxes("[0.10, 0.12, 0.40, 0.12]", 480, 640) == "[0.10, 0.00, 0.40, 0.00]"


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_square_is_that_of_the_image_processor(height, width):
    """Against the processor's own padding: white pixels in the image are found again in the square."""
    from convllava_hf.modeling.image_processing_convllava import _pad_to_square

    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = height // 3, width // 4
    bottom, right = max(top + 1, 2 * height // 3), max(left + 1, 3 * width // 4)
    pixels[top:bottom, left:right] = 255
    padded = np.asarray(_pad_to_square(Image.fromarray(pixels), [0.0, 0.0, 0.0]))[..., 0] == 255
    rows, columns = np.flatnonzero(padded.any(1)), np.flatnonzero(padded.any(0))
    side = max(height, width)
    square = (columns[0] / side, rows[0] / side, (columns[-1] + 1) / side, (rows[-1] + 1) / side)
    image = (left / width, top / height, right / width, bottom / height)
    assert convert_boxes(square, height, width) == pytest.approx(image, abs=1e-12)
    assert convert_boxes(image, height, width, "image", "square") == pytest.approx(square, abs=1e-12)


@pytest.mark.parametrize(("height", "width"), [size for size in SIZES if size != (33, 32)])
@pytest.mark.parametrize("decimals", [2, 3, 7, None])
def test_from_the_square_and_back_is_the_same_text(height, width, decimals):
    """The image is a part of its square, so fractions of it are the finer ones: no digit is lost on the way."""
    rng = random.Random(f"{height} {width} {decimals}")
    unit = 10 ** (3 if decimals is None else decimals)
    left, top, across, down = place_in_square(height, width)
    for _ in range(100):
        x, y = (
            sorted(rng.randint(math.ceil(unit * first), math.floor(unit * (first + part))) for _ in range(2))
            for first, part in ((left, across), (top, down))
        )
        box = [x[0], y[0], x[1], y[1]]
        if decimals is None and max(box) < 100:
            continue  # no thousandths, as far as anybody can tell
        text = f"[{', '.join(str(one) if decimals is None else f'{one / unit:.{decimals}f}' for one in box)}]"
        there = convert_boxes(text, height, width)
        assert decimals is None or len(there) == len(text)
        assert convert_boxes(there, height, width, "image", "square") == text


def test_mistakes_are_named():
    for arguments, says in (
        (("[0.1, 0.2, 0.3, 0.4]", 480, 640, "padded"), "'padded'; expected square"),
        (("[0.1, 0.2, 0.3, 0.4]", 480, 640, "square", None), "None; expected square"),
        (("[0.1, 0.2, 0.3, 0.4]", 0, 640), "640 x 0 pixels"),
        (((0.1, 0.2, 0.3), 480, 640), "expected left, top, right and bottom"),
        (((64, 24, 1256, 168), 480, 640), "Divide pixels"),
        (((float("nan"), 0, 1, 1), 480, 640), "expected left"),
        (("abcd", 480, 640, ["square"]), "expected square"),
    ):
        with pytest.raises(ConvLlavaError, match=says):
            convert_boxes(*arguments)
    with pytest.raises(ConvLlavaError, match="The box"):
        convert_boxes(["0.1", "0.2", "0.3", "0.4"], 480, 640)


def test_long_texts_take_no_long_time():
    texts = [
        "[" * 50_000,
        "[" + "1" * 50_000,
        "[0.1," * 20_000,
        "[0." + "1" * 5000 + ", 0.2, 0.3, 0.4]",
        "[ " * 30_000,
    ]
    start = time.perf_counter()
    for text in texts:
        convert_boxes(text, 480, 640)
    convert_boxes("[1e-999999999, 0.2, 0.3, 0.4]" + "[0.10, 0.16, 0.40, 0.39]" * 2000, 480, 640)
    assert time.perf_counter() - start < 3


def test_the_frame_of_each_mode():
    assert {mode: frame_of_mode(mode) for mode in IMAGE_ASPECT_RATIOS} == {
        "pad": "square",
        "native": "image",
        "shortest_edge": "image",
    }


def test_thousandths_and_fractions_are_told_apart():
    found = find_boxes("[0.25, 0.5, 0.75, 1] (250, 500, 750, 1000) [0.0, 0.0, 1.0, 1.0]")
    assert [box.box for box in found] == [(0.25, 0.5, 0.75, 1), (0.25, 0.5, 0.75, 1), (0, 0, 1, 1)]
    assert [box.decimals for box in found] == [2, None, 1]
    assert [box.bracketed for box in found] == [True, False, True]


def test_boxes_are_drawn():
    image = Image.new("RGB", (400, 200), "white")
    drawn = np.asarray(draw_boxes(image, [(0.25, 0.5, 0.75, 1.0)]))
    rows, columns = np.where((drawn != 255).any(axis=-1))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (100, 299, 100, 199)
    assert (np.asarray(image) == 255).all()
    assert len(set(draw_boxes(image, [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]).get_flattened_data())) > 2
