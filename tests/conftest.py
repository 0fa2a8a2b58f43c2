"""Tiny models, processors and images that every layer's tests share. Nothing is downloaded."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoConfig, PreTrainedTokenizerFast  # noqa: E402

from convllava_hf import (  # noqa: E402
    ConvLlavaConfig,
    ConvLlavaForConditionalGeneration,
    ConvLlavaImageProcessor,
    ConvLlavaProcessor,
)


torch.set_num_threads(1)  # more only get in each other's way on models this small

GOLDEN = Path(__file__).parent / "golden"
TEMPLATE = Path(__file__).parents[1] / "modeling" / "chat_template.jinja"
SIDE = 128  # pixels; two by two visual tokens at stride 64


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of figures computed by the original code; its README says what they are."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden_cases() -> dict:
    """What the original code answered: prompts, ids, generated ids and texts of every case."""
    return json.loads((GOLDEN / "inference.json").read_text())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 324 tokens that knows `<image>` and round-trips every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=324,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ["A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:"] * 4
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_processor(side: int = SIDE, stride: int = 64, **kwargs) -> ConvLlavaProcessor:
    template = TEMPLATE.read_text().replace('set after_bos = " "', 'set after_bos = ""', 1)
    names = ("image_aspect_ratio", "min_pixels", "max_pixels", "preset")
    of_images = {name: kwargs.pop(name) for name in names if name in kwargs}
    image_processor = ConvLlavaImageProcessor(size=side, stride=stride, **of_images)
    return ConvLlavaProcessor(image_processor, make_tokenizer(), chat_template=template, **kwargs)


TEXT_SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_config(text: str = "llama", depths=(1, 1, 2, 1, 1), **kwargs) -> ConvLlavaConfig:
    """A configuration whose random model answers differently to different images (large initial weights)."""
    widths = [8, 12, 16, 24, 32][: len(depths)]
    return ConvLlavaConfig(
        vision_config={
            "depths": list(depths),
            "hidden_sizes": widths,
            "image_size": SIDE,
            "initializer_range": 0.2,
            "layer_scale_init_value": 0.5,
        },
        text_config=AutoConfig.for_model(text, **TEXT_SHAPE),
        image_token_id=3,
        **kwargs,
    )


def make_model(config: ConvLlavaConfig | None = None, seed: int = 0, **kwargs) -> ConvLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    model = ConvLlavaForConditionalGeneration(config or make_config(**kwargs)).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    model.generation_config.suppress_tokens = [3, *range(324, 384)]
    return model


def make_image(height: int = 100, width: int = 60, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """An image with structure at every scale, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def image_with_broken_exif() -> bytes:
    """A JPEG of whole pixels, beside data that PIL reads and stumbles over when it turns the image upright."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010E] = 6, "a text"  # orientation, description
    make_image().save(buffer, format="JPEG", exif=exif)
    return buffer.getvalue().replace(b"\x01\x0e", b"\x01\x00", 1)  # the text becomes that of the width


def ask(question: str, *images) -> list[dict]:
    """A conversation of one user turn with images first."""
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@pytest.fixture(scope="session")
def processor() -> ConvLlavaProcessor:
    return make_processor()


@pytest.fixture(scope="session")
def model() -> ConvLlavaForConditionalGeneration:
    """Read-only: tests that change the model build their own with `make_model`."""
    return make_model()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, model, processor) -> Path:
    """The tiny model and its processor as a folder, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def converted_checkpoint(tmp_path_factory):
    """A function: the folder of a golden checkpoint, by its stage ("init" or "stage1" to "stage3"), converted once."""
    from convllava_hf.convert import convert_checkpoint

    @functools.cache
    def convert(stage: str) -> Path:
        folder = tmp_path_factory.mktemp(f"converted-{stage}") / "model"
        return convert_checkpoint(GOLDEN / f"checkpoint-{stage}", folder, progress=False)

    return convert


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory) -> Path:
    """A model wide enough in all its parts for every quantizer: what stays unquantized does so on purpose."""
    shape = {**TEXT_SHAPE, "hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
    config = ConvLlavaConfig(
        vision_config={
            "depths": [1, 1, 1, 1, 1],
            "hidden_sizes": [64, 64, 64, 64, 128],
            "image_size": SIDE,
            "initializer_range": 0.1,
            "layer_scale_init_value": 0.5,
        },
        text_config=AutoConfig.for_model("llama", **shape),
        image_token_id=3,
    )
    folder = tmp_path_factory.mktemp("wide")
    make_model(config).save_pretrained(folder)
    return folder
