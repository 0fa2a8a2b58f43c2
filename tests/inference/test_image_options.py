"""How images are looked at, said to commands: the same words and the same numbers everywhere."""

import argparse
import io
import json
from dataclasses import dataclass, replace

import pytest
from helpers.tiny_models import make_image, make_model, make_processor

from convllava_hf import cli, options
from convllava_hf.boxes import frame_of_mode
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import Assistant, user_turn
from convllava_hf.modeling.configuration_convllava import IMAGE_ASPECT_RATIOS, PRESETS, ImageSizing
from convllava_hf.modeling.image_processing_convllava import IMAGE_ARGUMENTS, ConvLlavaImagesKwargs
from convllava_hf.modeling.modeling_convllava import ConvLlavaForConditionalGeneration
from convllava_hf.options import IMAGE_OPTIONS, with_image_options


EXACT = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "4"]
# An image of 100 x 300 pixels (height x width), and what it costs: 2 x 5, 2 x 6, 1 x 3 tokens and so on.
WAYS = {
    "--image-aspect-ratio native --max-pixels 90000": 10,
    "--image-aspect-ratio shortest_edge --size 128": 12,
    "--image-aspect-ratio native --size 128": 3,
    "--size 192": 9,
    "--preset tiny": 16,
    "--preset large --min-pixels 80000": 24,
    "": 4,
}


@pytest.fixture
def image(tmp_path):
    make_image(100, 300).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def data(image):
    """Three samples, two of them about the image."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    text = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    samples = [{"image": image.name, "conversations": turns}] * 2 + [{"conversations": text}]
    (image.parent / "data.json").write_text(json.dumps(samples))
    return image.parent / "data.json"


def test_commands_offer_what_there_is():
    assert tuple(options.IMAGE_MODES) == IMAGE_ASPECT_RATIOS
    assert options.PRESETS == {name: pixels // 64**2 for name, pixels in PRESETS.items()}
    assert set(IMAGE_OPTIONS) == set(IMAGE_ARGUMENTS) <= set(ConvLlavaImagesKwargs.__annotations__)


def test_a_mode_added_to_the_definition_is_offered_and_described_everywhere(monkeypatch):
    """In commands, recipes, records of runs, the page and the card; what it does is the image processor's business."""
    from convllava_hf.demo.presets import presets
    from convllava_hf.evaluation.evaluation_record import images_text
    from convllava_hf.publish.metadata import _sees

    monkeypatch.setattr("convllava_hf.modeling.configuration_convllava.IMAGE_ASPECT_RATIOS", ("pad", "stretch"))
    stretch = replace(
        options.IMAGE_MODES["pad"],
        square=False,
        record_text="stretched to {size} px",
        page_text="stretched · {tokens}",
        card_text="stretched to {size} pixels",
    )
    monkeypatch.setitem(options.IMAGE_MODES, "stretch", stretch)
    sizes = ImageSizing("stretch", 128, 64)
    assert images_text(options.sizing_record(sizes)) == "stretched to 128 px"
    assert _sees(sizes) == "stretched to 128 pixels"
    assert frame_of_mode("stretch") == "image"
    processor = with_image_options(make_processor(), {"image_aspect_ratio": "stretch"}).image_processor
    assert next(iter(presets(processor))) == "stretched · 4 visual tokens"


def test_an_option_is_one_field(monkeypatch):
    """Of a dataclass; its flag is offered, its value reaches `generate`, and what is not given is not handed on."""

    @dataclass
    class More(options.GenerationOptions):
        top_p: float | None = options._option(None, "draw from the likeliest tokens", type=float)

    parser = argparse.ArgumentParser()
    options.add_options(parser, More)
    args = parser.parse_args(["--top-p", "0.5"])
    assert options.options_from(args, More) == {"max_new_tokens": 512, "temperature": 0.0, "top_p": 0.5}
    assert "top_p" not in options.options_from(parser.parse_args([]), More)
    seen = {}
    assistant = Assistant(make_model(), make_processor())
    generate = assistant.model.generate
    monkeypatch.setattr(assistant.model, "generate", lambda **given: seen.update(given) or generate(**given))
    assistant.answer([user_turn("What?")], max_new_tokens=1, temperature=1.0, top_p=0.5)
    assert seen["top_p"] == 0.5 and seen["temperature"] == 1.0


@pytest.mark.parametrize("way, tokens", WAYS.items())
def test_every_command_counts_the_same(way, tokens, checkpoint, image, data, capsys):
    assert cli.main(["ask", str(checkpoint), str(image), "What?", "--json", *way.split(), *EXACT]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == tokens
    assert cli.main(["data", "check", str(data), "--model", str(checkpoint), "--json", *way.split()]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]["visual"] == 2 * tokens
    argv = ["data", "inspect", str(data), "--index", "0", "--model", str(checkpoint), *way.split()]
    assert cli.main(argv) == 0
    assert f": {tokens} visual tokens" in capsys.readouterr().out


def test_a_chat_looks_at_all_its_images_alike(checkpoint, image, capsys, monkeypatch):
    from convllava_hf.inference import Assistant

    answer, answers = Assistant.answer, []

    def noted(self, messages, **kwargs):
        answers.append(answer(self, messages, **kwargs))
        return answers[-1]

    monkeypatch.setattr(Assistant, "answer", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"What?\n/image {image}\nAnd this?\n"))
    argv = ["chat", str(checkpoint), "--image", str(image), "--preset", "tiny", *EXACT]
    assert cli.main(argv) == 0, capsys.readouterr().err
    assert [one.visual_tokens for one in answers] == [16, 32]


@pytest.mark.parametrize(
    "way, message",
    [
        ("--max-pixels 90000", "no meaning with image_aspect_ratio='pad'"),
        ("--preset tiny --max-pixels 90000", "leave one of them out"),
        ("--size 100", "stride of 64"),
        ("--image-aspect-ratio native --max-pixels 9", "at least 4096"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_is_loaded(
    way, message, checkpoint, image, data, capsys, monkeypatch
):
    monkeypatch.setattr(
        ConvLlavaForConditionalGeneration, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read")
    )
    for argv in (
        ["ask", str(checkpoint), str(image), "What?"],
        ["chat", str(checkpoint)],
        ["data", "check", str(data), "--model", str(checkpoint)],
        ["data", "inspect", str(data), "--model", str(checkpoint), "--index", "0"],
    ):
        assert cli.main([*argv, *way.split()]) == 2
        error = capsys.readouterr().err
        assert error.startswith("convllava: error: These image options cannot be used: ") and message in error


def test_without_a_model_there_is_nothing_to_look(data, capsys):
    assert cli.main(["data", "check", str(data), "--preset", "tiny"]) == 2
    assert "preset set how a model sees images: name a model" in capsys.readouterr().err


def test_a_processor_is_not_changed_but_made_anew():
    processor = make_processor()
    native = with_image_options(processor, {"preset": "tiny", "max_pixels": None, "size": None})
    assert native.image_processor.get_image_size(900, 900) == (512, 512)
    assert processor.image_processor.get_image_size(900, 900) == (128, 128)
    assert native.tokenizer is processor.tokenizer
    assert with_image_options(processor, {"preset": None}) is processor
    again = with_image_options(native, {"image_aspect_ratio": "pad", "size": 192})
    assert again.image_processor.get_image_size(10, 900) == (192, 192)
    smaller = with_image_options(native, {"size": 128})
    assert smaller.image_processor.get_image_size(900, 900) == (128, 128)
    with pytest.raises(ConvLlavaError, match="preset is 'huge'"):
        with_image_options(processor, {"preset": "huge"})
