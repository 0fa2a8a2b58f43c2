"""Images in their own aspect ratio, from the file to the logits: pixels, counts, mixed batches, every way in."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import ask, make_image, make_model, make_processor
from PIL import Image
from transformers import AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from convllava_hf import ConvLlavaImageProcessor
from convllava_hf.modeling.configuration_convllava import PRESETS


IMAGE = 3  # the placeholder's id in the tiny tokenizer
NATIVE = {"image_aspect_ratio": "native", "min_pixels": 2 * 64**2, "max_pixels": 12 * 64**2}
# (height, width) -> what is seen of it, between 2 and 12 tokens: 2 x 4, 3 x 1, 2 x 2, 1 x 12, 3 x 3, 3 x 4.
SEEN = {
    (130, 250): (128, 256),
    (200, 60): (192, 64),
    (3, 3): (128, 128),
    (20, 1000): (64, 768),
    (192, 192): (192, 192),
    (600, 800): (192, 256),
}
IMAGES = [make_image(*shape, seed=index) for index, shape in enumerate(SEEN)]
TOKENS = [height * width // 64**2 for height, width in SEEN.values()]


@pytest.fixture(scope="module")
def native():
    return make_processor(**NATIVE)


def processor_kwargs(**kwargs) -> dict:
    """transformers 5 takes the processor's arguments in a dict of their own."""
    return kwargs if transformers.__version__.startswith("4.") else {"processor_kwargs": kwargs}


# --- pixels


def test_pixels_are_those_of_the_image_resized():
    processor = ConvLlavaImageProcessor(**NATIVE)
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    for image, (height, width) in zip(IMAGES, SEEN.values(), strict=True):
        output = processor(image, return_tensors="np")
        assert output["image_sizes"].tolist() == [[height, width]]
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / 255
        np.testing.assert_allclose(output["pixel_values"][0], (resized.transpose(2, 0, 1) - mean) / std, atol=1e-6)


def test_an_image_that_fits_is_left_as_it_is():
    image = make_image(192, 256)
    output = ConvLlavaImageProcessor(**NATIVE)(image, do_rescale=False, do_normalize=False, return_tensors="np")
    np.testing.assert_array_equal(output["pixel_values"][0], np.asarray(image).transpose(2, 0, 1))


def test_images_of_a_call_are_padded_with_zeros_to_a_common_size():
    output = ConvLlavaImageProcessor(**NATIVE)(IMAGES, return_tensors="np")
    assert output["pixel_values"].shape == (6, 3, 192, 768)
    assert [tuple(size) for size in output["image_sizes"]] == list(SEEN.values())
    for row, image, (height, width) in zip(output["pixel_values"], IMAGES, SEEN.values(), strict=True):
        alone = ConvLlavaImageProcessor(**NATIVE)(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(row[:, :height, :width], alone)
        assert not row[:, height:].any() and not row[:, :, width:].any()


def test_the_shorter_side_may_be_fixed():
    processor = ConvLlavaImageProcessor(image_aspect_ratio="shortest_edge", size={"shortest_edge": 128})
    output = processor([make_image(100, 200), make_image(300, 60)], return_tensors="np")
    assert output["image_sizes"].tolist() == [[128, 256], [640, 128]]
    assert processor(make_image(100, 200), size=192)["image_sizes"] == [[192, 384]]


def test_photographs_are_turned_before_they_are_measured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(60, 200).save(tmp_path / "turned.png", exif=exif)
    assert ConvLlavaImageProcessor(**NATIVE)(tmp_path / "turned.png")["image_sizes"] == [[192, 64]]


# --- the extremes


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (40, 2000), (2000, 40), (1, 5000), (3000, 3)])
@pytest.mark.parametrize("mode", ["pad", "native", "shortest_edge"])
def test_extreme_images_are_seen(shape, mode):
    processor = ConvLlavaImageProcessor(image_aspect_ratio=mode, size=256)
    image = Image.new("RGB", shape[::-1], (200, 100, 50))
    output = processor(image, return_tensors="np")
    height, width = output["image_sizes"][0]
    assert (height, width) == processor.get_image_size(*shape)
    assert height * width <= 8 * 256**2
    assert np.isfinite(output["pixel_values"]).all()


@pytest.mark.parametrize("mode", ["pad", "native", "shortest_edge"])
def test_images_beyond_pil_s_limit_are_seen_if_they_are_images_already(mode, monkeypatch):
    """Files are refused at twice the limit, in `test_image_processing.py`; here the square is, which padding makes."""
    image = make_image(50, 2000)
    processor = ConvLlavaImageProcessor(image_aspect_ratio=mode, size=128)
    before = processor(image, return_tensors="np")["pixel_values"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    made = []
    new = Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: made.append(size) or new(mode, size, *rest))
    output = processor(image, return_tensors="np")["pixel_values"]
    assert all(width * height <= 2_000_000 for width, height in made)
    assert bool(made) is (mode == "pad")
    assert np.abs(output - before).mean() < 0.01


def test_shapes_that_would_need_gigabytes_together_are_refused():
    processor = ConvLlavaImageProcessor(preset="large")
    images = [Image.new("L", (30000, 20)), Image.new("L", (20, 30000))]
    message = "64 x 30016 and 30016 x 64 pixels .* padded to 30016 x 30016 each, 20 GiB .* calls of their own"
    with pytest.raises(ValueError, match=message):
        processor(images)
    for image in images:
        assert processor(image)["pixel_values"][0].size == 3 * 64 * 30016


# --- every way to say it


def test_bounds_may_be_chosen_per_call():
    processor = ConvLlavaImageProcessor(size=128)
    image = make_image(600, 800)
    assert processor(image)["image_sizes"] == [[128, 128]]
    for kwargs, seen in (
        ({"image_aspect_ratio": "native"}, [128, 128]),  # the area of its own square: 1.7 x 2.3 tokens
        ({"image_aspect_ratio": "native", "max_pixels": 12 * 64**2}, [192, 256]),
        ({"image_aspect_ratio": "native", "size": 256}, [192, 320]),  # at most 16 tokens: 3.5 x 4.6
        ({"image_aspect_ratio": "shortest_edge", "size": 192}, [192, 256]),
        ({"preset": "tiny"}, [448, 576]),
        ({"preset": "large"}, [576, 832]),
        ({"preset": "large", "min_pixels": 1000**2}, [896, 1152]),
    ):
        assert processor(image, **kwargs)["image_sizes"] == [seen], kwargs
        assert processor.get_image_size(600, 800, **kwargs) == tuple(seen)


def test_a_checkpoints_own_bounds_give_way_to_those_of_a_call():
    processor = ConvLlavaImageProcessor(image_aspect_ratio="native", min_pixels=9 * 64**2, max_pixels=64 * 64**2)
    small, large = make_image(64, 64), make_image(1000, 1000)
    assert processor([small, large])["image_sizes"] == [[192, 192], [512, 512]]
    assert processor([small, large], max_pixels=4 * 64**2)["image_sizes"] == [[64, 64], [128, 128]]
    assert processor([small, large], size=128)["image_sizes"] == [[64, 64], [128, 128]]
    assert processor([small, large], min_pixels=4 * 64**2)["image_sizes"] == [[128, 128], [512, 512]]
    assert processor([small, large], preset="tiny")["image_sizes"] == [[192, 192], [512, 512]]
    assert processor(large, image_aspect_ratio="pad", size=128)["image_sizes"] == [[128, 128]]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_names_for_native_bounds(name):
    processor = ConvLlavaImageProcessor(preset=name)
    assert (processor.image_aspect_ratio, processor.max_pixels) == ("native", PRESETS[name])
    side = int(PRESETS[name] ** 0.5)
    assert processor.get_image_size(20000, 20000) == (side, side)
    assert "preset" not in processor.to_dict()  # numbers, which mean the same for ever


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "huge"}, "preset is 'huge', expected one of tiny, small, base, large, full"),
        ({"preset": "tiny", "max_pixels": 5000}, "preset='tiny' stands for.*max_pixels=5000 is given as well"),
        ({"preset": "tiny", "image_aspect_ratio": "pad"}, "image_aspect_ratio='pad' is given as well"),
        ({"max_pixels": 5000}, "max_pixels=5000 has no meaning with image_aspect_ratio='pad'.*'native' as well"),
        ({"image_aspect_ratio": "native", "max_pixels": 100}, "less than one visual token"),
        ({"image_aspect_ratio": "native", "size": {"height": 128, "width": 64}}, "The shape of native images"),
    ],
)
def test_what_cannot_work_is_refused_at_construction_and_at_a_call(options, message):
    with pytest.raises(ValueError, match=message):
        ConvLlavaImageProcessor(**options)
    with pytest.raises(ValueError, match=message):
        ConvLlavaImageProcessor()(make_image(), **options)
    with pytest.raises(ValueError, match=message):
        ConvLlavaImageProcessor().get_image_size(10, 10, **options)


def test_bounds_survive_saving(native, tmp_path):
    native.save_pretrained(tmp_path)
    for again in (
        AutoImageProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path).image_processor,
    ):
        assert again(IMAGES)["image_sizes"] == [list(size) for size in SEEN.values()]
        assert {name: getattr(again, name) for name in NATIVE} == NATIVE


@pytest.mark.parametrize("loader", [AutoImageProcessor, AutoProcessor])
def test_a_checkpoint_may_be_loaded_with_other_bounds(loader, native, tmp_path):
    native.save_pretrained(tmp_path)
    for kwargs, seen in (
        ({"max_pixels": 4 * 64**2, "min_pixels": None}, (128, 128)),
        ({"preset": "tiny"}, (448, 576)),
        ({"image_aspect_ratio": "pad"}, (128, 128)),
        ({"image_aspect_ratio": "shortest_edge", "size": 192}, (192, 256)),
    ):
        loaded = loader.from_pretrained(tmp_path, **kwargs)
        if loader is AutoProcessor:  # a call may say otherwise, and what is saved is the image processor's alone
            assert loaded(IMAGES[5], "<image>", preset="tiny")["input_ids"][0].count(IMAGE) == 63
            loaded.save_pretrained(tmp_path / "again")
            told = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
            assert not told.keys() & {"size", "preset", *NATIVE}
            loaded = AutoProcessor.from_pretrained(tmp_path / "again").image_processor
        assert loaded.get_image_size(600, 800) == seen, kwargs
    with pytest.raises(ValueError, match="less than one visual token"):
        loader.from_pretrained(tmp_path, max_pixels=100)


def test_chat_templates_and_pipelines_take_them(model, processor):
    chat = ask("What?", IMAGES[0], IMAGES[5])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat, **options, **processor_kwargs(**NATIVE))
    assert inputs["image_sizes"].tolist() == [[128, 256], [192, 256]]
    assert (inputs["input_ids"] == IMAGE).sum() == 8 + 12
    preset = processor.apply_chat_template(chat, **options, **processor_kwargs(preset="tiny"))
    assert (preset["input_ids"] == IMAGE).sum() == 18 + 63  # 130 x 250 is enlarged to 16 tokens or a few more

    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(generated, skip_special_tokens=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    asked = {"text": chat}
    if transformers.__version__.startswith("4."):  # where a pipeline hands them on for prompts alone, not for chats
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        asked = {"text": prompt.removeprefix("<s>"), "images": [IMAGES[0], IMAGES[5]]}
    options = {"max_new_tokens": 5, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    answers = pipe(**asked, **options, **processor_kwargs(**NATIVE))
    assert answers[0]["generated_text"] == expected


# --- counts


def test_placeholders_are_as_many_as_the_tower_gives_tokens(native, model):
    text = "".join(f"<image> is image {index}. " for index in range(6))
    inputs = native(images=IMAGES, text=text, return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == sum(TOKENS)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert [len(image) for image in features] == TOKENS
    assert native._get_num_multimodal_tokens(image_sizes=list(SEEN)).num_image_tokens == TOKENS
    spans = native(images=IMAGES, text=text, return_text_replacement_offsets=True)["text_replacement_offsets"][0]
    assert [span["replacement"].count("<image>") for span in spans] == TOKENS


@pytest.mark.parametrize(
    "kwargs",
    [
        NATIVE,
        {"preset": "tiny"},
        {"image_aspect_ratio": "native", "size": 192},
        {"image_aspect_ratio": "shortest_edge", "size": 64},
        {"image_aspect_ratio": "shortest_edge", "size": 128, "max_pixels": 5 * 64**2},
        {"size": 192},
    ],
)
def test_counts_before_and_after_agree_for_arguments_of_a_call(processor, kwargs):
    """As servers count: once with `mm_processor_kwargs` from sizes alone, once from the call."""
    counted = processor._get_num_multimodal_tokens(image_sizes=list(SEEN), **kwargs).num_image_tokens
    nested = processor._get_num_multimodal_tokens(image_sizes=list(SEEN), images_kwargs=kwargs).num_image_tokens
    assert counted == nested
    for image, tokens in zip(IMAGES, counted, strict=True):
        for call in (kwargs, {"images_kwargs": kwargs}):
            assert processor(image, "<image>", **call)["input_ids"][0].count(IMAGE) == tokens


def test_images_left_unresized_are_counted_as_they_are(native, processor):
    counted = native._get_num_multimodal_tokens(image_sizes=[(64, 320)], do_resize=False).num_image_tokens
    assert counted == [5] == [native(make_image(64, 320), "<image>", do_resize=False)["input_ids"][0].count(IMAGE)]
    assert processor._get_num_multimodal_tokens(image_sizes=[(64, 320)], do_resize=False).num_image_tokens == [25]


def test_the_largest_image_of_a_server_is_the_most_expensive_of_a_preset(processor):
    """vLLM makes room for the tokens of an image of 10000 x 10000 pixels."""
    for preset, pixels in PRESETS.items():
        sizes = [(10000, 10000), (3000, 5000), (9999, 1234), (100, 9000), (9000, 4001)]
        most, *others = processor._get_num_multimodal_tokens(image_sizes=sizes, preset=preset).num_image_tokens
        assert most == pixels // 64**2 >= max(others)


def test_a_prompt_that_is_too_long_names_the_visual_tokens(native):
    with pytest.raises(ValueError, match="12 of them visual tokens"):
        native(IMAGES[5], "<image>", truncation=True, max_length=8)


# --- a batch equals its parts


PROMPTS = [
    ("<s>USER: <image>\nWhat? ASSISTANT:", [0]),
    ("<s>USER: text alone ASSISTANT:", []),
    ("<s>USER: <image> and <image> and <image> differ? ASSISTANT:", [1, 3, 2]),
    ("<s>USER: Where is <image>? ASSISTANT:", [5]),
]


@functools.cache
def prompt(processor, *indices, **kwargs):
    texts, images = zip(*[PROMPTS[index] for index in indices], strict=True)
    images = [[IMAGES[index] for index in group] for group in images]
    return processor(images=images, text=list(texts), padding=True, return_tensors="pt")


def test_a_batch_of_all_shapes_equals_each_prompt_alone(native, model):
    together = prompt(native, 0, 1, 2, 3)
    with torch.no_grad():
        logits = model(**together).logits
        for row, (index, kept) in enumerate(zip(range(4), together["attention_mask"].bool(), strict=True)):
            alone = prompt(native, index) if PROMPTS[index][1] else native(text=PROMPTS[1][0], return_tensors="pt")
            expected = model(**alone).logits[0]
            torch.testing.assert_close(logits[row][kept], expected, atol=1e-5, rtol=1e-5)
        # Without the sizes the padding of smaller images would be seen, so the comparison can fail.
        sizes = torch.tensor([together["pixel_values"].shape[-2:]] * 5)
        leaking = model.model.vision_tower(together["pixel_values"], sizes).last_hidden_state
        right = model.model.vision_tower(together["pixel_values"], together["image_sizes"]).last_hidden_state
        assert (leaking - right)[0, :, :2, :4].abs().max() > 1e-3


def test_answers_of_a_batch_are_those_of_each_prompt(native, model):
    options = {"max_new_tokens": 8, "do_sample": False}
    inputs = prompt(native, 0, 2, 3)
    answers = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    beams = model.generate(**inputs, **options, num_beams=2)[:, inputs["input_ids"].shape[1] :]
    for row, index in enumerate((0, 2, 3)):
        alone = prompt(native, index)
        length = alone["input_ids"].shape[1]
        expected = model.generate(**alone, **options)[0, length:]
        assert answers[row][: len(expected)].tolist() == expected.tolist()
        of_beams = model.generate(**alone, **options, num_beams=2)[0, length:]
        assert beams[row][: len(of_beams)].tolist() == of_beams.tolist()


def test_images_in_a_list_are_those_in_a_tensor(native, model):
    """vLLM hands on images of several requests so, some of them padded to those of their own prompt."""
    whole = native.image_processor(IMAGES, return_tensors="pt")
    parts = [
        native.image_processor(IMAGES[:2], return_tensors="pt"),
        native.image_processor(IMAGES[2:], return_tensors="pt"),
    ]
    listed = [image for part in parts for image in part["pixel_values"]]
    assert len({image.shape for image in listed}) == 2
    with torch.no_grad():
        expected = model.get_image_features(**whole).pooler_output
        found = model.model.get_image_features(listed, image_sizes=torch.cat([part["image_sizes"] for part in parts]))
        alone = [native.image_processor(image, return_tensors="pt")["pixel_values"][0] for image in IMAGES]
        unsized = model.get_image_features(alone)
    for theirs, ours, own in zip(expected, found.pooler_output, unsized.pooler_output, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_sees_the_same(native, model):
    torch._dynamo.reset()
    compiled = torch.compile(make_model().get_image_features, backend="eager")
    with torch.no_grad():
        for images in (IMAGES[:2], IMAGES[5]):
            inputs = native.image_processor(images, return_tensors="pt")
            found, expected = (features(**inputs).pooler_output for features in (compiled, model.get_image_features))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_gradients_of_a_batch_are_the_sum_of_its_parts(native):
    """What trains must not depend on which images are together."""

    def gradients(*groups):
        model = make_model().train()
        for indices in groups:
            inputs = prompt(native, *indices)
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            model(**inputs, labels=labels.masked_fill(labels == IMAGE, -100), num_items_in_batch=100).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    together, apart = gradients((0, 2, 3)), gradients((0,), (2,), (3,))
    for name, gradient in apart.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(together[name] / scale, gradient / scale, atol=1e-4, rtol=1e-4, msg=name)
