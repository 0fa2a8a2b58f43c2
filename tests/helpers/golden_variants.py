"""The golden checkpoint in the other layouts that the original's checkpoints come in, and broken."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


PREFIX = "model.vision_tower.vision_tower."
RELEASED_TOWER = "ConvLLaVA/ConvLLaVA-ConvNeXt-320"


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


def another_tower_in_the_main_shards(source: Path):
    """One that was trained on, say, and that the original does not run."""
    tower_in_the_main_shards(source)
    weights = load_file(source / "model.safetensors")
    other = {name: tensor + 1 if name.startswith(PREFIX) else tensor for name, tensor in weights.items()}
    save_file(other, source / "model.safetensors")


def tower_named_relatively(source: Path):
    (source / "vision_tower").rename(source.parent / "tower")
    edit_json(source / "config.json", mm_vision_tower="../tower")


def tower_named_absolutely(source: Path):
    (source / "vision_tower").rename(source.parent / "tower")
    edit_json(source / "config.json", mm_vision_tower=str(source.parent / "tower"))


def as_released(source: Path, tower: Path):
    """The layout of the released checkpoints: `pytorch_model-0000{1,2}-of-00002.bin` and their index with a tower in
    them that is not the one which config.json names by an id, the pooling norm included; no folder `vision_tower/`;
    transformers 4.33's configuration and its slow tokenizer's files. The named tower's repository becomes `tower`.
    """
    another_tower_in_the_main_shards(source)
    (source / "vision_tower").rename(tower)
    weights = load_file(source / "model.safetensors")
    weights[PREFIX + "layernorm.bias"] = torch.zeros(48)
    save_file(weights, source / "model.safetensors")
    as_sharded_bin(source)
    edit_json(
        source / "config.json",
        model_type="llava",
        mm_vision_tower=RELEASED_TOWER,
        tune_vision_tower=True,
        transformers_version="4.33.2",
        mm_patch_merge_type=None,
        mm_vision_resolution=None,
        attention_bias=None,
        attention_dropout=None,
    )
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps({**generation, "transformers_version": "4.33.2"}))
    with_tokenizer_files_of_4_33(source)


def with_tokenizer_files_of_4_33(source: Path):
    """As the slow LlamaTokenizer of transformers 4.33 saved Vicuna's: tokens are tables, and there is no decoder."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    texts = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = {key: {"__type": "AddedToken", "content": text, **flags} for key, text in texts.items()}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, **tokens}))
    special = {key: {"content": text, **flags} for key, text in texts.items()}
    (source / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "<unk>"}))
    for name in ("added_tokens.json", "tokenizer.json"):
        (source / name).unlink(missing_ok=True)


def with_timm_names_in_the_shards(source: Path):
    """As derivatives have it: the tower in the shards in timm's naming, and no other one."""
    tower = torch.load(source / "vision_tower" / "pytorch_model.bin", weights_only=True)
    words = {
        "embeddings.patch_embeddings": "stem.0",
        "embeddings.layernorm": "stem.1",
        "encoder.stages": "stages",
        "downsampling_layer": "downsample",
        "layers": "blocks",
        "dwconv": "conv_dw",
        "layernorm": "norm",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
        "layer_scale_parameter": "gamma",
    }
    weights = load_file(source / "model.safetensors")
    for name, tensor in tower.items():
        for ours, theirs in words.items():
            name = name.replace(ours, theirs)
        weights[PREFIX + name] = tensor
    save_file(weights, source / "model.safetensors")
    shutil.rmtree(source / "vision_tower")
    edit_json(source / "config.json", mm_vision_resolution=320)


def into_hub_cache(cache: Path, repository: str, folder: Path) -> str:
    """Puts a folder into a cache of huggingface_hub, as a download leaves it; returns the commit."""
    commit = hashlib.sha1(repository.encode()).hexdigest()
    home = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(commit)
    return commit


def with_odd_settings(source: Path):
    """Another model_type, sampling settings that transformers refuses to save, an old buffer."""
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


def name_in_the_index(file):
    """An index that names `file` as the second shard."""

    def change(source: Path):
        as_sharded_bin(source)
        path = source / "pytorch_model.bin.index.json"
        weight_map = json.loads(path.read_text())["weight_map"]
        second = "pytorch_model-00002-of-00002.bin"
        weight_map = {name: file if shard == second else shard for name, shard in weight_map.items()}
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def swap_tower(source: Path):
    edit_json(source / "vision_tower" / "config.json", model_type="clip_vision_model")
