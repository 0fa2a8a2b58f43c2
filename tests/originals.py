"""The golden checkpoint in the other layouts that the original's checkpoints come in, and broken."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


PREFIX = "model.vision_tower.vision_tower."


def edit_json(path: Path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def as_sharded_bin(source: Path):
    weights = load_file(source / "model.safetensors")
    names = list(weights)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, source / file)
        weight_map |= dict.fromkeys(part, file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "model.safetensors").unlink()


def as_sharded_safetensors(source: Path):
    weights = load_file(source / "model.safetensors")
    names = list(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, source / file)
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (source / "model.safetensors").unlink()


def as_old_pickle(source: Path):
    path = source / "vision_tower" / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def with_pooling_norm_and_prefix(source: Path):
    path = source / "vision_tower" / "pytorch_model.bin"
    weights = {f"convnext.{name}": tensor for name, tensor in torch.load(path, weights_only=True).items()}
    weights |= {"convnext.layernorm.weight": torch.ones(48), "convnext.layernorm.bias": torch.zeros(48)}
    torch.save(weights, path)


def tower_as_safetensors(source: Path):
    path = source / "vision_tower" / "pytorch_model.bin"
    save_file(torch.load(path, weights_only=True), source / "vision_tower" / "model.safetensors")
    path.unlink()


def tower_in_the_main_shards(source: Path):
    path = source / "vision_tower" / "pytorch_model.bin"
    tower = torch.load(path, weights_only=True)
    weights = load_file(source / "model.safetensors") | {PREFIX + name: tensor for name, tensor in tower.items()}
    weights[PREFIX + "layernorm.weight"] = torch.ones(48)
    save_file(weights, source / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in tower.items()}, path)  # an older tower, not to be taken


def tower_named_relatively(source: Path):
    (source / "vision_tower").rename(source.parent / "tower")
    edit_json(source / "config.json", mm_vision_tower="../tower")


def tower_named_absolutely(source: Path):
    (source / "vision_tower").rename(source.parent / "tower")
    edit_json(source / "config.json", mm_vision_tower=str(source.parent / "tower"))


def as_released(source: Path):
    """As on the Hub: another model_type, sampling settings that transformers refuses to save, an old buffer."""
    edit_json(source / "config.json", model_type="llava", mm_vision_resolution=320)
    edit_json(source / "generation_config.json", temperature=0.9, top_p=0.6, max_length=4096)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, source / "model.safetensors")


def drop_weight(source: Path):
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"], weights["model.mm_projector.2.bias"]
    save_file(weights, source / "model.safetensors")


def add_weight(source: Path):
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"model.image_newline": torch.ones(64), "extra": torch.ones(2)}, source / "model.safetensors")


def misshape(source: Path):
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.ones(63)}, source / "model.safetensors")


def lose_shard(source: Path):
    as_sharded_bin(source)
    (source / "pytorch_model-00002-of-00002.bin").unlink()


def evil_pickle(source: Path):
    torch.save({"path": Path("a")}, source / "vision_tower" / "pytorch_model.bin")


def swap_tower(source: Path):
    edit_json(source / "vision_tower" / "config.json", model_type="clip_vision_model")
