"""Converting and assembling from ids on the Hub, as the released checkpoints lie there."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import golden_variants
from helpers.fake_hub import serve_hub
from helpers.fresh_process import run_fresh
from helpers.tiny_models import make_language_model, make_tower, randomized
from safetensors.torch import save_file


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
        from convllava_hf.training_record import read_record
        result = same, read_record(values["out"] + "/remote")["origin"]
        """,
        source=source,
        out=tmp_path,
    )
    assert result == [
        True,
        {
            "checkpoint": "example/convllava-tiny",
            "vision_tower": "example/convnext-tiny-320",
            "vision_tower_choice": {"taken": "named", "asked_for": False},
        },
    ]


SMALL = {
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
SHARDS = {"pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"}
RELEASED = SMALL | SHARDS | {"pytorch_model.bin.index.json"}
CONFIGS = {"config.json", "preprocessor_config.json"}


@pytest.fixture
def fetched(hub):
    """What was downloaded of each repository, as the Hub saw it."""
    seen = {}

    def note(method, path):
        if method == "GET" and (match := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path)):
            seen.setdefault(match[1], []).append(match[2])

    hub.fault = note
    yield seen
    hub.fault = lambda method, path: None


def publish_released(hub, golden, folder: Path, name: str, change=lambda source, tower: None) -> None:
    """`org/NAME`, in the layout of the released checkpoints, and its tower `org/NAME-tower`."""
    source, tower = folder / name, folder / f"{name}-tower"
    shutil.copytree(golden / "checkpoint-stage3", source)
    golden_variants.as_released(source, tower)
    golden_variants.edit_json(source / "config.json", mm_vision_tower=f"org/{name}-tower")
    change(source, tower)
    publish(hub, f"org/{name}", source)
    if tower.exists():
        publish(hub, f"org/{name}-tower", tower)


def with_both_formats(source: Path, tower: Path) -> None:
    """safetensors of the same content beside the PyTorch files."""
    weights = {}
    for name in sorted(SHARDS):
        weights |= torch.load(source / name, weights_only=True)
    save_file(weights, source / "model.safetensors")
    save_file(torch.load(tower / "pytorch_model.bin", weights_only=True), tower / "model.safetensors")
    for name in ("tf_model.h5", "optimizer.bin", "mm_projector.bin", "model-extra.safetensors"):
        (source / name).write_bytes(b"not wanted")


def without_a_tower_repository(source: Path, tower: Path) -> None:
    shutil.rmtree(tower)
    golden_variants.edit_json(source / "config.json", mm_vision_resolution=320)


def with_an_unsafe_index(source: Path, tower: Path) -> None:
    index = source / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00002", "../pytorch_model-00002"))


def test_only_what_is_needed_is_downloaded(hub, fetched, golden, tmp_path):
    publish_released(hub, golden, tmp_path, "released")
    publish_released(hub, golden, tmp_path, "shards")
    publish_released(hub, golden, tmp_path, "both", with_both_formats)
    publish_released(hub, golden, tmp_path, "gone", without_a_tower_repository)
    publish_released(hub, golden, tmp_path, "unsafe", with_an_unsafe_index)
    publish(hub, "org/whole", golden / "checkpoint-stage3")
    result = run(
        hub,
        """
        from safetensors.torch import load_file
        from convllava_hf.convert import convert_checkpoint
        from convllava_hf.errors import ConvLlavaError
        from convllava_hf.training_record import read_record

        def converted(name, **options):
            try:
                out = convert_checkpoint(f"org/{name}", f"{values['out']}/{name}", progress=False, **options)
            except ConvLlavaError as error:
                return str(error)
            origin = read_record(out)["origin"]
            bias = load_file(out / "model.safetensors")["model.vision_tower.embeddings.patch_embeddings.bias"]
            return [origin["vision_tower_choice"]["taken"], bias.mean().item()]

        result = {name: converted(name) for name in ("released", "both", "gone", "unsafe", "whole")}
        result["shards"] = converted("shards", vision_tower="shards")
        """,
        out=tmp_path / "out",
    )
    tower = torch.load(golden / "checkpoint-stage3" / "vision_tower" / "pytorch_model.bin", weights_only=True)
    mean = tower["embeddings.patch_embeddings.bias"].mean().item()
    for name, (taken, bias) in {name: told for name, told in result.items() if isinstance(told, list)}.items():
        assert taken == ("shards" if name in ("shards", "gone") else "named"), name
        assert bias == pytest.approx(mean + (taken == "shards"), abs=1e-5), name
    assert "names the file '../pytorch_model-00002-of-00002.bin'" in result["unsafe"]
    found = {name: set(files) for name, files in fetched.items()}
    assert all(len(found[name]) == len(files) for name, files in fetched.items())  # nothing twice
    assert found["org/released"] == RELEASED and found["org/released-tower"] == CONFIGS | {"pytorch_model.bin"}
    assert found["org/shards"] == RELEASED and found["org/shards-tower"] == CONFIGS
    assert found["org/both"] == SMALL | {"pytorch_model.bin.index.json", "model.safetensors"}
    assert found["org/both-tower"] == CONFIGS | {"model.safetensors"}
    assert found["org/gone"] == RELEASED
    assert not found["org/unsafe"] & SHARDS
    inside = {f"vision_tower/{name}" for name in (*CONFIGS, "pytorch_model.bin")}
    assert found["org/whole"] == SMALL | inside | {"model.safetensors"}


def test_asked_by_id_an_original_is_converted_once(hub, golden, golden_cases, tmp_path):
    publish_released(hub, golden, tmp_path, "asked")
    case = golden_cases["one-image"]
    result = run(
        hub,
        """
        from convllava_hf.convert import checkpoint
        from convllava_hf.inference import load, open_image, user_turn
        made, convert = [], checkpoint.convert_checkpoint
        checkpoint.convert_checkpoint = lambda *args, **kwargs: made.append(args[0]) or convert(*args, **kwargs)
        result = []
        for _ in range(2):
            assistant = load("org/asked", device="cpu", dtype="float32")
            turn = user_turn(values["question"], [open_image(values["image"])])
            result.append([assistant.answer([turn], max_new_tokens=24).token_ids, list(made)])
        """,
        image=golden / "images" / case["images"][0],
        question=case["turns"][0][1].removeprefix("<image>\n"),
    )
    assert result == [[case["generated"], ["org/asked"]]] * 2


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
    model = randomized(timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)))
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
