"""Converting and assembling from ids on the Hub, as the released checkpoints lie there."""

import json
from pathlib import Path

import pytest
import torch
from fresh_process import run_fresh
from hub_double import serve_hub
from parts import make_language_model, make_tower, randomised


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as hub:
        yield hub


def publish(hub, repository: str, folder: Path) -> None:
    hub.create(repository)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.commit(repository, "main", files, [])


def run(hub, script: str, **values):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return run_fresh(script, package=True, env=environment, **values)


def test_tower_in_a_repository_of_its_own(hub, golden, tmp_path):
    source = golden / "checkpoint-stage3"
    publish(hub, "example/convllava-tiny", source)
    files = {path: content for path, content in hub.files("example/convllava-tiny").items() if "vision_tower/" in path}
    hub.commit("example/convllava-tiny", "main", {}, list(files))
    publish(hub, "example/convnext-tiny-320", source / "vision_tower")
    result = run(
        hub,
        """
        from safetensors.torch import load_file
        from convllava_hf.convert import convert_checkpoint
        convert_checkpoint("example/convllava-tiny", values["out"] + "/remote", progress=False)
        convert_checkpoint(values["source"], values["out"] + "/local", progress=False)
        remote, local = (load_file(values["out"] + f"/{name}/model.safetensors") for name in ("remote", "local"))
        same = remote.keys() == local.keys() and all((remote[name] == local[name]).all().item() for name in local)
        from convllava_hf.record import read_record
        result = same, read_record(values["out"] + "/remote")["origin"]
        """,
        source=source,
        out=tmp_path,
    )
    assert result == [True, {"checkpoint": "example/convllava-tiny", "vision_tower": "example/convnext-tiny-320"}]


def test_parts_by_id(hub, tmp_path):
    make_tower(tmp_path / "tower")
    make_language_model(tmp_path / "language")
    publish(hub, "example/tower", tmp_path / "tower")
    publish(hub, "example/language", tmp_path / "language")
    result = run(
        hub,
        """
        from convllava_hf import ConvLlavaForConditionalGeneration
        from convllava_hf.convert import assemble
        from convllava_hf.errors import ConvLlavaError
        parts = {"vision": "example/tower", "text": "example/language", "resolution": 128, "extra_stage_width": 32}
        assemble(values["out"], **parts, progress=False)
        model = ConvLlavaForConditionalGeneration.from_pretrained(values["out"])
        try:
            assemble(values["out"] + "2", **{**parts, "text": "example/nothing"}, progress=False)
        except ConvLlavaError as error:
            result = [model.config.vision_config.depths, str(error)]
        """,
        out=tmp_path / "out",
    )
    assert result[0] == [1, 1, 2, 1, 6] and "'example/nothing'" in result[1]


def test_timm_by_id(hub, tmp_path):
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)))
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=arguments)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["architecture"] == "convnext_atto"
    publish(hub, "timm/convnext_atto.tiny", tmp_path / "timm")
    result = run(
        hub,
        """
        from convllava_hf.convert.towers import read_tower
        tower = read_tower("timm/convnext_atto.tiny")
        result = [tower.config.hidden_sizes, tower.weights.state_dict["stem.0.weight"].tolist()]
        """,
    )
    assert result[0] == [8, 16, 24, 32]
    torch.testing.assert_close(torch.tensor(result[1]), model.state_dict()["stem.0.weight"])
