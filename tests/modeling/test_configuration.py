import pytest
from helpers.tiny_models import make_config
from transformers import AutoConfig, ConvNextConfig, LlamaConfig

from convllava_hf import ConvLlavaConfig
from convllava_hf.modeling.configuration_convllava import tower_stride, visual_token_grid


@pytest.mark.parametrize("pixels, tokens", [(768, 144), (1024, 256), (1536, 576)])
def test_visual_tokens_are_those_of_the_paper(pixels, tokens):
    assert ConvLlavaConfig().num_visual_tokens(pixels, pixels) == tokens


def test_stride_follows_the_number_of_stages():
    strides = [tower_stride(make_config(depths=(1,) * stages).vision_config) for stages in (2, 3, 4, 5)]
    assert strides == [8, 16, 32, 64]


@pytest.mark.parametrize("text", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_any_causal_language_model_survives_the_round_trip(text, tmp_path):
    config = make_config(text)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ConvLlavaConfig
    assert again.text_config.model_type == text
    assert again.to_dict()["vision_config"] == config.to_dict()["vision_config"]
    assert again.to_dict()["text_config"] == config.to_dict()["text_config"]
    assert again.get_text_config() is again.text_config


def test_tied_embeddings_follow_the_text_config_and_can_be_overruled():
    assert make_config().tie_word_embeddings is False
    tied = ConvLlavaConfig(text_config=LlamaConfig(vocab_size=100, tie_word_embeddings=True), image_token_id=5)
    assert tied.tie_word_embeddings and tied.text_config.tie_word_embeddings
    untied = ConvLlavaConfig(
        text_config=LlamaConfig(vocab_size=100, tie_word_embeddings=True), image_token_id=5, tie_word_embeddings=False
    )
    assert not untied.tie_word_embeddings and not untied.text_config.tie_word_embeddings


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"vision_config": {"depths": [1, 1, 1]}}, "numbers of stages: num_stages=3.*depths=\\[1, 1, 1\\]"),
        ({"vision_config": ConvNextConfig(num_stages=5)}, "numbers of stages: num_stages=5"),
        ({"vision_config": {"image_size": 800 + 1}}, "image_size does not fit.*801 x 801.*32 pixels.*800 x 800"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model'.*ConvNextConfig"),
        ({"text_config": {"model_type": "mamba"}}, "'mamba', which has no attention heads"),
        ({"image_token_id": 32064}, "image_token_id is 32064, outside.*32064 tokens"),
        ({"image_token_id": -200}, "image_token_id is -200, outside"),
        ({"image_token_id": None}, "image_token_id is None, outside"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvLlavaConfig(**arguments)


@pytest.mark.parametrize("size", [(0, 64), (64, -64), (100, 64), (64, 96)])
def test_sizes_that_lose_pixels_are_refused(size):
    with pytest.raises(ValueError, match="multiples of the vision tower's stride of 64"):
        visual_token_grid(*size, 64)
