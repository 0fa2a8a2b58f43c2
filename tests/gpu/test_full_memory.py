"""A GPU whose memory runs out: one line says so, and what follows works."""

import contextlib
import gc

import pytest
import torch
from helpers.tiny_models import TEXT_SHAPE, make_config, make_image, make_model, make_processor
from transformers import AutoConfig

from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import load, user_turn

from .devices import needs_cuda


pytestmark = [pytest.mark.gpu, needs_cuda]

NEEDED = r"[\d.]+ [KMG]iB more were needed, and [\d.]+ [KMG]iB of [\d.]+ [KMG]iB are free"


@contextlib.contextmanager
def little_memory(more: int):
    """This process may take `more` bytes above what it has now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + more) / total, 0)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of about 34 MB in float32: 17 MB are embeddings, and as many the head."""
    shape = {**TEXT_SHAPE, "vocab_size": 32768, "hidden_size": 128, "max_position_embeddings": 8192}
    config = make_config()
    config = type(config)(
        vision_config=config.vision_config, text_config=AutoConfig.for_model("llama", **shape), image_token_id=3
    )
    folder = tmp_path_factory.mktemp("large") / "model"
    make_model(config).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def test_loading(large):
    with little_memory(2**20), pytest.raises(ConvLlavaError, match=f"does not hold the model in .*: {NEEDED}"):
        load(large, device="cuda", dtype="float32")
    assert load(large, device="cuda", dtype="float32").device.type == "cuda"


@pytest.mark.parametrize("remembering", [False, True])
def test_answering(remembering, large):
    assistant = load(large, device="cuda", dtype="float32")
    if remembering:
        assistant = assistant.with_prompt_cache()
    turn = [user_turn("What?", [make_image()])]
    expected = assistant.answer(turn, max_new_tokens=4)
    with little_memory(2**20), pytest.raises(ConvLlavaError, match=f"cuda:0 does not hold .*: {NEEDED}.*--size"):
        assistant.with_image_options(size=4096).answer(turn, max_new_tokens=4)
    assert assistant.answer(turn, max_new_tokens=4).token_ids == expected.token_ids


def test_training(large, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from helpers.training_runs import RECIPES, STAGES, run

    options = {"max_steps": 1, "per_device_train_batch_size": 8, "use_cpu": "false", "save_strategy": "no"}
    recipe = RECIPES / f"{STAGES[3]}.yaml"
    with little_memory(2**20), pytest.raises(ConvLlavaError, match=f"does not hold the model .*: {NEEDED}"):
        run(recipe, large, tmp_path / "model", **options)
    gc.collect()
    expected = f"does not hold a training step with 8 samples at once: {NEEDED}.*per_device_train_batch_size"
    with little_memory(60 * 2**20), pytest.raises(ConvLlavaError, match=expected):
        run(recipe, large, tmp_path / "step", **options)
