"""Assembling on timm's ConvNeXts: by name, from files and folders; features equal timm's own."""

import pytest
import torch
from helpers.tiny_models import SMALL, load_fully, make_language_model, randomized
from safetensors.torch import save_file

from convllava_hf import ConvLlavaProcessor
from convllava_hf.convert import assemble
from convllava_hf.convert.towers import read_tower
from convllava_hf.errors import ConvLlavaError


timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return make_language_model(tmp_path_factory.mktemp("language"))


TIMM = {
    "linear": {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)},
    "convolutions": {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "conv_mlp": True},
    "norm before the head": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "head_norm_first": True},
    "clip head": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "head_hidden_size": 20},
    "no layer scale": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "ls_init_value": None},
}


@pytest.mark.parametrize("variant", TIMM)
@pytest.mark.parametrize("kind", ["pth", "safetensors", "folder"])
def test_features_equal_timms(language_model, tmp_path, variant, kind):
    if kind == "folder" and variant == "no layer scale":
        pytest.skip("timm leaves arguments that are None out of its config.json")
    model = randomized(timm.create_model("convnext_atto", pretrained=False, **{"conv_mlp": False, **TIMM[variant]}))
    if kind == "pth":
        source = tmp_path / "tower.pth"
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, source)
    elif kind == "safetensors":
        source = tmp_path / "tower.safetensors"
        save_file(model.state_dict(), source)
    else:
        source = tmp_path / "tower"
        arguments = {**TIMM[variant], "conv_mlp": TIMM[variant].get("conv_mlp", False)}
        timm.models.save_for_hf(model, source, model_args=arguments)
    loaded = load_fully(assemble(tmp_path / "out", vision=source, text=language_model, **SMALL))
    pixels = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(pixels, intermediates_only=True)
        features = loaded.model.vision_tower.embeddings(pixels)
        for stage, wanted in zip(loaded.model.vision_tower.encoder.stages, expected, strict=False):
            features = stage(features)
            torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-5)


def test_timm_names(language_model, tmp_path, monkeypatch, caplog):
    """By a model's name, with its own mean and std; only the download is replaced."""
    create = timm.create_model
    made = {}

    def without_download(name, pretrained):
        assert pretrained
        made[name] = randomized(create(name, pretrained=False))
        return made[name]

    monkeypatch.setattr(timm, "create_model", without_download)
    with caplog.at_level("INFO", logger="convllava_hf"):
        out = assemble(tmp_path / "out", vision="convnext_atto", text=language_model, **SMALL)
    assert "Not used of the vision tower: head.norm.weight" in caplog.text
    model, image_processor = load_fully(out), ConvLlavaProcessor.from_pretrained(out).image_processor
    original = made["convnext_atto"]
    assert image_processor.image_mean == pytest.approx(original.pretrained_cfg["mean"])
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.model.vision_tower.embeddings(pixels)
        for stage in model.model.vision_tower.encoder.stages[:4]:
            features = stage(features)
        torch.testing.assert_close(features, original.forward_features(pixels), atol=1e-5, rtol=1e-5)
    assert model.config.vision_config.hidden_act == "gelu"


def test_norms_of_another_eps(language_model, tmp_path, monkeypatch):
    """ConvNeXt-XXL's 1e-5, and a GELU by its tanh formula."""
    original = randomized(timm.create_model("test_convnext", pretrained=False))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: original)
    model = load_fully(assemble(tmp_path / "out", vision="test_convnext", text=language_model, **SMALL))
    assert model.config.vision_config.hidden_act == "gelu_pytorch_tanh"
    assert model.config.vision_config.norm_eps == 1e-5
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.model.vision_tower.embeddings(pixels)
        for stage in model.model.vision_tower.encoder.stages[:4]:
            features = stage(features)
        torch.testing.assert_close(features, original.forward_features(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_papers_tower(monkeypatch):
    """The shape of convnext_large_mlp.clip_laion2b_ft_soup_320, without its weights."""
    name = "convnext_large_mlp.clip_laion2b_ft_soup_320"
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    found = read_tower(name)
    assert (found.config.depths, found.config.hidden_sizes) == ([3, 3, 27, 3], [192, 384, 768, 1536])
    assert found.config.hidden_act == "gelu" and found.config.layer_scale_init_value == 1e-6
    assert found.image_settings["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_open_clip_file(language_model, tmp_path):
    model = randomized(timm.create_model("convnext_atto", conv_mlp=False, **TIMM["linear"]))
    weights = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items() if "head" not in name}
    weights |= {"visual.head.proj.weight": torch.ones(2), "text.token_embedding.weight": torch.ones(3)}
    save_file(weights | {"logit_scale": torch.ones(())}, tmp_path / "open_clip_model.safetensors")
    source = tmp_path / "open_clip_model.safetensors"
    load_fully(assemble(tmp_path / "out", vision=source, text=language_model, **SMALL))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnextv2_atto", "is ConvNeXt V2"),
        ("convnext_atto_ols", "overlapping stem"),
        ("convnext_atto_rms", "RMS norms"),
        ("resnet18", "no ConvNeXt in timm's naming"),
    ],
)
def test_other_timm_files(language_model, tmp_path, name, message):
    save_file(timm.create_model(name, pretrained=False).state_dict(), tmp_path / "tower.safetensors")
    with pytest.raises(ConvLlavaError, match=message):
        assemble(tmp_path / "out", vision=tmp_path / "tower.safetensors", text=language_model, **SMALL)


def test_other_timm_models(language_model, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=False))
    with pytest.raises(ConvLlavaError, match="'resnet18' is a ResNet"):
        assemble(tmp_path / "out", vision="resnet18", text=language_model, **SMALL)
    with pytest.raises(ConvLlavaError, match="timm has .*convnext_tiny"):
        assemble(tmp_path / "out", vision="convnext_tinny", text=language_model, **SMALL)
