import copy

import pytest
import torch
from helpers.tiny_models import make_config, make_model
from transformers import ConvNextModel

from convllava_hf.modeling.modeling_convllava import ConvLlavaVisionTower


def make_tower(seed=0, **kwargs) -> ConvLlavaVisionTower:
    torch.manual_seed(seed)
    return ConvLlavaVisionTower(make_config(**kwargs).vision_config).eval()


@pytest.mark.parametrize("stages", [2, 4, 5, 6])
def test_features_and_names_are_those_of_convnext(stages):
    config = make_config(depths=(1, 2, 1, 2, 1)[:stages]) if stages < 6 else make_config()
    if stages == 6:
        config.vision_config.update({"depths": [1] * 6, "hidden_sizes": [4, 8, 8, 8, 8, 8], "num_stages": 6})
    peer = ConvNextModel(copy.deepcopy(config.vision_config)).eval()
    tower = ConvLlavaVisionTower(config.vision_config).eval()
    missing, unexpected = peer.load_state_dict(tower.state_dict(), strict=False)
    assert set(missing) == {"layernorm.weight", "layernorm.bias"} and not unexpected
    pixels = torch.randn(2, 3, 256, 128)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels).last_hidden_state, peer(pixels).last_hidden_state)


@pytest.mark.parametrize("stages", [4, 5])
def test_images_of_different_sizes_get_the_features_they_get_alone(stages):
    tower = make_tower(depths=(1, 1, 2, 1, 2)[:stages])
    stride = tower.stride
    sizes = [(3 * stride, stride), (stride, 4 * stride), (2 * stride, 2 * stride), (3 * stride, 4 * stride)]
    images = [torch.randn(3, *size) for size in sizes]
    batch = 7 * torch.randn(4, 3, 3 * stride, 4 * stride)  # whatever lies in the padding must not matter
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        together = tower(batch, image_sizes=torch.tensor(sizes)).last_hidden_state
        for features, image, (height, width) in zip(together, images, sizes, strict=True):
            alone = tower(image[None]).last_hidden_state[0]
            ours = features[:, : height // stride, : width // stride]
            torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)
        plain = tower(batch).last_hidden_state[0, :, :3, :1]
    # Without the masks the padding leaks in, so the comparison above can fail.
    assert (plain - together[0, :, :3, :1]).abs().max() > 1e-3


def test_mixed_batch_runs_the_tower_once(monkeypatch):
    model = make_model()
    calls = []
    monkeypatch.setattr(
        model.vision_tower.embeddings,
        "forward",
        lambda pixels, forward=model.vision_tower.embeddings.forward: calls.append(pixels.shape) or forward(pixels),
    )
    model.get_image_features(torch.randn(3, 3, 128, 192), torch.tensor([[64, 192], [128, 128], [128, 192]]))
    assert calls == [(3, 3, 128, 192)]


def test_projected_tokens_of_a_mixed_batch_are_those_of_each_image():
    model = make_model()
    sizes = [(64, 192), (128, 64)]
    images = [torch.randn(1, 3, *size) for size in sizes]
    batch = torch.zeros(2, 3, 128, 192)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[2], : image.shape[3]] = image[0]
    with torch.no_grad():
        together = model.get_image_features(batch, torch.tensor(sizes)).pooler_output
        assert [tuple(tokens.shape) for tokens in together] == [(3, 32), (2, 32)]
        for tokens, image in zip(together, images, strict=True):
            torch.testing.assert_close(tokens, model.get_image_features(image).pooler_output[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    def gradients(checkpointing):
        model = make_model()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        stages = model.vision_tower.encoder.stages
        assert all(stage.gradient_checkpointing is checkpointing for stage in stages)
        pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
        sizes = torch.tensor([[128, 64], [128, 128]])
        torch.cat(model.get_image_features(pixels, sizes).pooler_output).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and any("stages.0.layers.0" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_checkpointing_recomputes_every_block_that_trains_and_no_other():
    model = make_model()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.requires_grad_(False)
    # Blocks alone train: none of what feeds them requires a gradient, which the reentrant kind would not survive.
    model.vision_tower.encoder.stages[3].layers.requires_grad_(True)
    runs = dict.fromkeys(range(5), 0)
    for index, stage in enumerate(model.vision_tower.encoder.stages):
        stage.layers[0].register_forward_hook(
            lambda *_, index=index: runs.__setitem__(index, runs[index] + 1), always_call=True
        )
    features = model.vision_tower(torch.randn(1, 3, 64, 64)).last_hidden_state
    features.sum().backward()
    assert runs == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}
    assert all(parameter.grad is not None for parameter in model.vision_tower.encoder.stages[3].layers.parameters())


def test_stochastic_depth_grows_with_the_depth():
    config = make_config().vision_config
    config.drop_path_rate = 0.5
    tower = ConvLlavaVisionTower(config)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for stage in tower.encoder.stages for layer in stage.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    "shape, sizes, message",
    [
        ((1, 3, 100, 128), None, "100 x 128.*stride of 64"),
        ((1, 3, 128, 128), [[100, 128]], "100 x 128.*stride of 64"),
        ((1, 3, 128, 128), [[192, 128]], "image_sizes names an image of 192 x 128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shape, sizes, message):
    with pytest.raises(ValueError, match=message):
        make_tower()(torch.zeros(shape), image_sizes=sizes)
