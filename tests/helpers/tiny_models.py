"""Tiny models, processors, tokenizers and images, and tiny parts to assemble models from. Nothing is downloaded."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    PreTrainedTokenizerFast,
)

from convllava_hf import (
    ConvLlavaConfig,
    ConvLlavaForConditionalGeneration,
    ConvLlavaImageProcessor,
    ConvLlavaProcessor,
)
from helpers.paths import MODELING


TEMPLATE = MODELING / "chat_template.jinja"
SIDE = 128  # pixels; two by two visual tokens at stride 64
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
IMAGE = 305  # the first id after those of `plain_tokenizer`
SMALL = {"resolution": 128, "extra_stage_depth": 2, "extra_stage_width": 40, "progress": False}
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


def make_language_model(folder: Path, model_type: str = "llama", template: str | None = CHATML, **changes) -> Path:
    config = AutoConfig.for_model(model_type, **{**TEXT_SHAPE, "vocab_size": 324, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def plain_tokenizer():
    """A byte-level tokenizer of 305 tokens that has never heard of images."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["A chat between a curious user and an assistant. USER: ASSISTANT:"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=1000,
    )


def make_tower(folder: Path, depths=(1, 1, 2, 1), widths=(8, 12, 16, 24), classifier: bool = False) -> Path:
    config = ConvNextConfig(
        depths=list(depths), hidden_sizes=list(widths), num_stages=len(depths), initializer_range=0.2,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    (ConvNextForImageClassification if classifier else ConvNextModel)(config).save_pretrained(folder)
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "crop_size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def load_fully(folder: Path) -> ConvLlavaForConditionalGeneration:
    model, info = ConvLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def randomized(model):
    """Weights of a size at which every part counts; timm's own leave the blocks nearly without effect."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (1.0 if name.endswith(("norm.weight", "gamma")) else 0.0)
    return model.eval()
