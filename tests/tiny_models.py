"""Tiny towers and language models to assemble models from."""

import json
from pathlib import Path

import torch
from conftest import TEXT_SHAPE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    PreTrainedTokenizerFast,
)

from convllava_hf import ConvLlavaForConditionalGeneration


CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
IMAGE = 305  # the first id after those of `plain_tokenizer`
SMALL = {"resolution": 128, "extra_stage_depth": 2, "extra_stage_width": 40, "progress": False}


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
