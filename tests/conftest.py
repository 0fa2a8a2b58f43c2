"""Fixtures that every folder's tests share."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.paths import GOLDEN  # noqa: E402
from helpers.tiny_models import SIDE, TEXT_SHAPE, make_model, make_processor  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaProcessor  # noqa: E402


torch.set_num_threads(1)  # more only get in each other's way on models this small


def pytest_collection_finish() -> None:
    """What is imported by now stays, so looking for garbage need not go over its millions of objects."""
    gc.collect()
    gc.freeze()


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
