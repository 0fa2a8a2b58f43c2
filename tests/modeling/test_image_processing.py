import base64
import io

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_image
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from convllava_hf import ConvLlavaImageProcessor


PROCESSOR = ConvLlavaImageProcessor(size=128)


def pixels(image, **kwargs) -> np.ndarray:
    return PROCESSOR(image, return_tensors="np", **kwargs)["pixel_values"][0]


def restored(image, **kwargs) -> np.ndarray:
    """What the tower sees, in 0-255, (height, width, 3)."""
    values = PROCESSOR(image, do_normalize=False, return_tensors="np", **kwargs)["pixel_values"][0]
    return values.transpose(1, 2, 0) * 255


@pytest.mark.parametrize("size", [(100, 60), (61, 100), (7, 5), (128, 128), (1, 40), (300, 299)])
def test_pixels_equal_clips_processor_after_padding(size):
    """The original pads by hand and leaves the rest to CLIP's image processor, which serves as the peer."""
    image = make_image(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in PROCESSOR.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    options = {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}, "resample": 3}
    try:
        from transformers import CLIPImageProcessorPil as Peer
    except ImportError:
        Peer = CLIPImageProcessor
    expected = Peer(**options)(square, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels(image), expected, atol=1e-6)


def test_golden_pixels(golden):
    figures = np.load(golden / "inference.npz")
    names = {"one-image": "wide.png", "tiny": "tiny.png"}
    for case, name in names.items():
        ours = ConvLlavaImageProcessor(size=320)(golden / "images" / name, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(ours, figures[f"{case}.pixel_values"], atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "YCbCr"])
def test_every_mode_is_seen_in_its_own_colours(mode):
    image = make_image().convert(mode)
    np.testing.assert_array_equal(pixels(image), pixels(image.convert("RGB")))


@pytest.mark.parametrize("dtype, mode", [(np.uint16, "I;16"), (np.int32, "I")])
def test_sixteen_bit_gray_is_scaled_not_cut_off(dtype, mode):
    gray = np.asarray(make_image(mode="L"))
    deep = Image.fromarray((gray.astype(np.uint32) * 257).astype(dtype))
    assert deep.mode == mode
    np.testing.assert_allclose(restored(deep), restored(Image.fromarray(gray)), atol=1)


def test_dark_sixteen_bit_gray_stays_dark():
    dark = np.full((64, 64), 200, dtype=np.uint16)
    assert restored(Image.fromarray(dark)).max() < 2 and restored(dark).max() < 2


def test_floats_of_pil_are_read_as_arrays_are():
    values = np.asarray(make_image(mode="L")).astype(np.float32)
    np.testing.assert_allclose(restored(Image.fromarray(values / 255)), restored(Image.fromarray(values)), atol=1)


def test_sixteen_bit_png_from_its_path(tmp_path):
    gray = np.asarray(make_image(mode="L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_allclose(restored(tmp_path / "deep.png"), restored(Image.fromarray(gray)), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = make_image(40, 90)
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "turned.png"), pixels(upright))
    np.testing.assert_array_equal(pixels(Image.open(tmp_path / "turned.png")), pixels(upright))


def test_paths_base64_arrays_and_tensors_are_the_same_image(tmp_path):
    image = make_image()
    expected = pixels(image)
    path = tmp_path / "image.png"
    image.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    array = np.asarray(image)
    for given in (
        str(path),
        path,
        encoded,
        f"data:image/png;base64,{encoded}",
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
        array,
        array.transpose(2, 0, 1),
        array.astype(np.float32) / 255,
        torch.tensor(array).permute(2, 0, 1),
        [[image]],
        array[None],
    ):
        np.testing.assert_allclose(pixels(given), expected, atol=1e-6)


def test_channels_can_be_named_where_the_shape_is_ambiguous():
    array = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    last = pixels(array, input_data_format="channels_last")
    np.testing.assert_allclose(last, pixels(Image.fromarray(array)), atol=1e-6)
    first = pixels(array, input_data_format="channels_first")
    np.testing.assert_allclose(first, pixels(Image.fromarray(array.transpose(1, 2, 0))), atol=1e-6)


def test_gray_array_is_an_image():
    gray = np.asarray(make_image(mode="L"))
    np.testing.assert_allclose(pixels(gray), pixels(Image.fromarray(gray)), atol=1e-6)


def test_sizes_are_returned_and_can_be_chosen_per_call():
    output = PROCESSOR([make_image(), make_image(30, 90)], size=192, return_tensors="pt")
    assert output["pixel_values"].shape == (2, 3, 192, 192)
    assert output["image_sizes"].tolist() == [[192, 192]] * 2
    assert PROCESSOR.get_image_size(30, 90) == (128, 128)
    assert PROCESSOR.get_image_size(30, 90, size=192) == (192, 192)


def test_images_left_unresized_are_padded_at_the_right_and_bottom():
    output = PROCESSOR([make_image(64, 64), make_image(128, 128)], do_resize=False, return_tensors="np")
    assert output["image_sizes"].tolist() == [[64, 64], [128, 128]]
    alone = PROCESSOR(make_image(64, 64), do_resize=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(output["pixel_values"][0, :, :64, :64], alone)
    assert not output["pixel_values"][0, :, 64:].any() and not output["pixel_values"][0, :, :, 64:].any()


def test_steps_can_be_turned_off():
    image = make_image(128, 128)
    raw = PROCESSOR(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(raw, np.asarray(image).transpose(2, 0, 1))


def test_survives_saving(tmp_path):
    processor = ConvLlavaImageProcessor(size=256, stride=32, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is ConvLlavaImageProcessor
    image = make_image()
    np.testing.assert_array_equal(
        again(image, return_tensors="np")["pixel_values"], processor(image, return_tensors="np")["pixel_values"]
    )


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    make_image(200, 200).save(buffer, "JPEG")
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize(
    "name, content, error, message",
    [
        ("missing.png", None, FileNotFoundError, "no image at .*missing.png"),
        ("notes.txt", b"not an image", ValueError, "notes.txt.* is not an image"),
        ("empty.png", b"", ValueError, "empty.png.* is not an image"),
        ("cut.jpg", truncated_jpeg(), ValueError, "cut.jpg.* cannot be decoded"),
    ],
)
def test_bad_files_are_named(name, content, error, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        PROCESSOR(str(tmp_path / name))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/image.png", "http://[image.png"])
def test_a_url_that_does_not_answer_is_named(url):
    with pytest.raises(ValueError, match="Cannot read an image from 'http://"):
        PROCESSOR(url)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ValueError, match="is not an image but a folder"):
        PROCESSOR(tmp_path)


def test_an_image_that_pil_decodes_late_is_named(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(truncated_jpeg())
    with pytest.raises(ValueError, match="cannot be decoded"):
        PROCESSOR(Image.open(tmp_path / "cut.jpg"))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    make_image(200, 200).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb.png.*cannot be decoded.*smaller.*MAX_IMAGE_PIXELS"):
        PROCESSOR(tmp_path / "bomb.png")


@pytest.mark.parametrize("image", [3, None, {"a": 1}, np.zeros((2, 2, 2, 2, 2)), np.zeros((0, 5, 3))])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="is no image"):
        PROCESSOR(image)


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="No images were given"):
        PROCESSOR([])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 100}, "100 x 100.*stride of 64"),
        ({"size": {"height": 128, "width": 192}}, "square images"),
        ({"image_aspect_ratio": "stretch"}, "image_aspect_ratio is 'stretch'"),
    ],
)
def test_options_that_cannot_work_are_refused_at_construction_and_at_a_call(options, message):
    with pytest.raises(ValueError, match=message):
        ConvLlavaImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        PROCESSOR(make_image(), **options)


def test_colours_are_not_guessed_when_conversion_is_off():
    with pytest.raises(ValueError, match="mode 'L'.*do_convert_rgb"):
        PROCESSOR(make_image(mode="L"), do_convert_rgb=False)
