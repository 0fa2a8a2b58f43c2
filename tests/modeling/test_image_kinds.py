"""Kinds of values that images come in: type and file decide what stands for white, not the values at hand."""

import io
import struct

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_image
from PIL import Image

from convllava_hf import ConvLlavaImageProcessor
from convllava_hf.data.image_files import examine
from convllava_hf.inference.prompt_cache import _key


PROCESSOR = ConvLlavaImageProcessor(size=128)
GRAY = np.asarray(make_image(64, 128, mode="L"))
COLORS = np.asarray(make_image(64, 128))
MASK = GRAY > 128


def seen(image, **kwargs) -> np.ndarray:
    """What the tower sees, 0-255, (height, width, 3)."""
    options = {"do_normalize": False, "do_rescale": False, "return_tensors": "np", **kwargs}
    return PROCESSOR(image, **options)["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize(
    "image, twin",
    [
        (MASK.astype(np.float32), MASK * np.uint8(255)),
        (MASK.astype(np.float64)[..., None], MASK * np.uint8(255)),
        (MASK, MASK * np.uint8(255)),
        (np.ones((64, 64, 3), np.float32), np.full((64, 64, 3), 255, np.uint8)),
        (np.zeros((64, 64), np.float32), np.zeros((64, 64), np.uint8)),
        (COLORS.astype(np.float32), COLORS),
        (COLORS.astype(np.float16), COLORS),
        (COLORS.astype(np.int64), COLORS),
        (COLORS.astype(">i2"), COLORS),
        (COLORS.astype(np.uint16) * 257, COLORS),
        ((GRAY.astype(np.uint16) * 257).astype(">u2"), GRAY),
        (np.dstack([COLORS, GRAY]), COLORS),
        (np.dstack([COLORS, GRAY]).transpose(2, 0, 1), COLORS),
        (np.dstack([GRAY, 255 - GRAY]), GRAY),
        (np.dstack([COLORS, GRAY]).astype(np.float32) / 255, COLORS),
        (np.dstack([COLORS / 255.0, GRAY]), COLORS),
        (torch.tensor(COLORS / 255.0).permute(2, 0, 1), COLORS),
        (torch.tensor(COLORS / 255.0, requires_grad=True), COLORS),
        (torch.tensor(MASK).to(torch.bfloat16), MASK * np.uint8(255)),
        (torch.tensor(MASK), MASK * np.uint8(255)),
    ],
)
def test_an_array_is_seen_as_the_same_image_in_8_bits(image, twin):
    np.testing.assert_array_equal(seen(image), seen(Image.fromarray(twin)))


def test_half_precision_is_seen_as_the_same_values_in_float32():
    values = torch.rand(3, 64, 64)
    for dtype in (torch.float16, torch.bfloat16):
        np.testing.assert_array_equal(seen(values.to(dtype)), seen(values.to(dtype).float()))


def test_a_chats_memory_tells_tensors_of_half_precision_apart():
    values = torch.rand(3, 64, 64).to(torch.bfloat16)
    assert _key(values, {}) == _key(values.clone(), {}) == _key(values.float(), {}) != _key(values + 1, {})


def test_floats_are_rounded_and_not_cut_off():
    levels = np.arange(256, dtype=np.float32).reshape(16, 16) / np.float32(255)
    found = seen(levels.repeat(8, 0).repeat(8, 1))[::8, ::8, 0]
    np.testing.assert_array_equal(found, np.arange(256).reshape(16, 16))


def with_value(value: float) -> np.ndarray:
    values = (GRAY / 255).astype(np.float32)
    values[0, 0] = value
    return values


@pytest.mark.parametrize("value, gray", [(1.02, 255), (-0.02, 0), (np.nan, 0), (np.inf, 255), (-np.inf, 0)])
@pytest.mark.parametrize("kind", ["array", "PIL", "TIFF"])
def test_one_odd_value_changes_no_other(value, gray, kind, tmp_path):
    image = with_value(value)
    if kind != "array":
        image = Image.fromarray(image)
    if kind == "TIFF":
        image.save(tmp_path / "odd.tif")
        image = tmp_path / "odd.tif"
        assert examine({"bytes": None, "path": image}).kind is None
    expected = GRAY.copy()
    expected[0, 0] = gray
    options = {"do_resize": False, "image_aspect_ratio": "native"}
    np.testing.assert_array_equal(seen(image, **options)[..., 0], expected)


@pytest.mark.parametrize("value", [3.0, -1.0, 200.0])
@pytest.mark.parametrize("kind", ["array", "PIL", "tensor"])
def test_values_beyond_the_range_are_refused_and_not_guessed_at(value, kind):
    image = with_value(value)
    image = {"array": image, "PIL": Image.fromarray(image), "tensor": torch.tensor(image)}[kind]
    with pytest.raises(ValueError, match=r"floats from .* to .*; expected \[0, 1\], or 0-255 with do_rescale=False"):
        PROCESSOR(image)


def test_floats_that_may_be_either_are_255_where_the_call_says_so():
    dark = GRAY.astype(np.float32) / 20  # all darker than 13 of 255
    with pytest.raises(ValueError, match="do_rescale=False"):
        PROCESSOR(dark)
    np.testing.assert_array_equal(seen(dark), seen(np.rint(dark).astype(np.uint8)))


@pytest.mark.parametrize(
    "array, says",
    [
        (GRAY.astype(np.int32) * 257, "int32 from .* expected 0-255"),
        (GRAY.astype(np.int16) - 300, "int16 from -.* expected 0-255"),
        (GRAY.astype(np.float32) * 257, "floats from"),
        (GRAY.astype(np.complex64), "is no image"),
        (np.zeros((5, 6, 7), np.uint8), "no axis of 1 to 4 channels"),
    ],
)
def test_other_ranges_are_named(array, says):
    with pytest.raises(ValueError, match=says):
        PROCESSOR(array)


def tiff(values: np.ndarray, bits: int, sample_format: int = 1, photometric: int = 1, orientation: int = 1) -> bytes:
    """A gray TIFF of one strip, by hand: PIL writes neither 12 bits nor white as zero nor 32 bits without a sign."""
    if bits == 12:
        first, second = values[:, ::2].astype(np.uint32), values[:, 1::2].astype(np.uint32)
        parts = (first >> 4, ((first & 15) << 4) | (second >> 8), second & 255)
        data = np.stack(parts, -1).astype(np.uint8).tobytes()
    else:
        data = values.tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (274, orientation)]
    tags += [(277, 1), (278, height), (279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        tiff(GRAY.astype(np.uint32) * 4095 // 255, 12),
        tiff(GRAY.astype("<u2") * 257, 16),
        tiff(65535 - GRAY.astype("<u2") * 257, 16, photometric=0),
        tiff((GRAY.astype("<i4") * 32767 // 255).astype("<i2"), 16, sample_format=2),
        tiff(GRAY.astype("<u4") * 16843009, 32),
        tiff((GRAY.astype("<u4") * 8421504).astype("<i4"), 32, sample_format=2),
        tiff((GRAY / 255).astype("<f4"), 32, sample_format=3),
        tiff((1 - GRAY / 255).astype("<f4"), 32, sample_format=3, photometric=0),
    ],
    ids=["12", "16", "16 white is zero", "16 signed", "32", "32 signed", "float", "float white is zero"],
)
def test_what_a_tiff_says_of_its_samples_counts(content):
    """Also of dark images, which look like fewer bits."""
    image = {"bytes": content, "path": None}
    np.testing.assert_allclose(seen(image), seen(Image.fromarray(GRAY)), atol=1)
    assert examine(image).kind is None
    np.testing.assert_allclose(seen(Image.open(io.BytesIO(content))), seen(Image.fromarray(GRAY)), atol=1)


def test_a_turned_tiff_of_12_bits_keeps_its_range():
    turned = np.ascontiguousarray(np.rot90(GRAY))  # which orientation 6 turns back
    image = {"bytes": tiff(turned.astype(np.uint32) * 4095 // 255, 12, orientation=6), "path": None}
    np.testing.assert_allclose(seen(image), seen(Image.fromarray(GRAY)), atol=1)
    assert examine(image).size == GRAY.shape


def test_dark_images_stay_dark_whatever_holds_them(tmp_path):
    dark = GRAY // 16
    Image.fromarray(dark.astype(np.uint16) * 257).save(tmp_path / "dark.png")
    Image.fromarray(dark.astype(np.int32) * 257).save(tmp_path / "dark.pgm")
    (tmp_path / "dark.tif").write_bytes(tiff(dark.astype(np.uint16) * 16, 12))
    for name in ("dark.png", "dark.pgm", "dark.tif"):
        np.testing.assert_allclose(seen(tmp_path / name), seen(Image.fromarray(dark)), atol=1)


def test_whole_numbers_of_32_bits_that_would_be_black_are_refused(tmp_path):
    Image.fromarray(GRAY.astype(np.int32)).save(tmp_path / "labels.tif")
    with pytest.raises(ValueError, match=r"labels.tif.*expected 0 to 2147483647, which is white with 32 bits"):
        PROCESSOR(tmp_path / "labels.tif")
    found = examine({"bytes": None, "path": str(tmp_path / "labels.tif")})
    assert found.kind == "unreadable image" and "2147483647" in found.detail


def test_deep_gray_is_converted_a_strip_at_a_time(monkeypatch):
    whole = seen(Image.fromarray(GRAY.astype(np.uint16) * 257)), seen((GRAY / 255).astype(np.float32))
    monkeypatch.setattr("convllava_hf.modeling.image_utils_convllava._STRIP", 300)
    strips = seen(Image.fromarray(GRAY.astype(np.uint16) * 257)), seen((GRAY / 255).astype(np.float32))
    np.testing.assert_array_equal(whole, strips)
