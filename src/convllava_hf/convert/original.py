"""Reading a checkpoint of the original code base: what its configuration files say, and where its tower is."""

import logging
import re
from pathlib import Path

from transformers import ConvNextConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ConvLlavaError
from .reading import has_weights, locate, read_json


logger = logging.getLogger(__name__)

# The original's own keys in config.json that decide what the model computes, with the only values that ConvLLaVA has.
_REQUIRED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_layer": (-1, None),
    "mm_patch_merge_type": ("flat", None),
    "mm_use_im_start_end": (False, None),
}
_TOWER_FIELDS = (
    "num_channels",
    "patch_size",
    "num_stages",
    "hidden_sizes",
    "depths",
    "hidden_act",
    "initializer_range",
    "layer_norm_eps",
    "layer_scale_init_value",
    "drop_path_rate",
    "image_size",
)
# Base configs of transformers 4 have generation's settings too, which have no place in a text config.
_NOT_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def read_original_config(folder: Path) -> dict:
    """config.json of an original checkpoint.

    Raises:
        ConvLlavaError: it is another kind of checkpoint, or a LLaVA that ConvLLaVA cannot express.
    """
    path = folder / "config.json"
    config = read_json(path, "The checkpoint")
    model_type = config.get("model_type")
    if model_type == "convllava":
        raise ConvLlavaError(f"{folder} is in transformers' layout already; there is nothing to convert.")
    if not re.fullmatch(r"llava(_\w+)?", str(model_type)) or "mm_vision_tower" not in config:
        raise ConvLlavaError(
            f"{folder} is no checkpoint of the original ConvLLaVA code: its config.json has the model_type "
            f"{model_type!r} and {'a' if 'mm_vision_tower' in config else 'no'} mm_vision_tower; expected llava or "
            "llava_llama, with a mm_vision_tower."
        )
    for key, allowed in _REQUIRED.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise ConvLlavaError(
                f"{path} has {key}={value!r}, but ConvLLaVA's architecture has {key}={allowed[0]!r}. This LLaVA "
                "cannot be converted."
            )
    if config.get("image_aspect_ratio") != "pad":
        logger.warning(
            "config.json has image_aspect_ratio=%r; the converted model pads pictures to a square, which is how "
            "ConvLLaVA was trained.",
            config.get("image_aspect_ratio"),
        )
    return config


def text_config_of(config: dict):
    """The language model's own configuration in the original's, without the original's additions."""
    match = re.fullmatch(r"Llava(\w+)ForCausalLM", (config.get("architectures") or ["LlavaLlamaForCausalLM"])[0])
    model_type = match[1].lower() if match else ""
    if model_type not in CONFIG_MAPPING:
        raise ConvLlavaError(
            f"config.json names the architecture {config['architectures'][0]!r}; expected one like "
            "'LlavaLlamaForCausalLM', with a language model that transformers knows."
        )
    config_class = CONFIG_MAPPING[model_type]
    # `rope_theta` and `rope_scaling` are what transformers 5 calls `rope_parameters`; it still reads them.
    known = (set(config_class().to_dict()) | {"rope_theta", "rope_scaling"}) - _NOT_ARCHITECTURE
    return config_class(**{key: value for key, value in config.items() if key in known})


def find_tower(folder: Path, config: dict, vision_tower: str | Path | None) -> Path:
    """The folder with the tower's configuration, and its weights unless the checkpoint's shards hold them.

    Looked for in this order: `vision_tower`, the checkpoint's own folder `vision_tower/`, and what `mm_vision_tower`
    names, as a path (absolute or from the checkpoint) or as an id on the Hub.
    """
    if vision_tower is not None:
        return locate(vision_tower, "The vision tower")
    if (folder / "vision_tower" / "config.json").is_file():
        return folder / "vision_tower"
    named = str(config["mm_vision_tower"])
    if (folder / named).is_dir():
        return folder / named
    try:
        return locate(named, "The vision tower")
    except ConvLlavaError as error:
        raise ConvLlavaError(
            f"The checkpoint has no folder vision_tower/, and the tower that its mm_vision_tower names was not found. "
            f"{error} Pass the tower's folder or id with --vision-tower."
        ) from error


def tower_config_of(folder: Path, what: str = "The vision tower") -> ConvNextConfig:
    """The configuration of a ConvNeXt that transformers saved.

    Raises:
        ConvLlavaError: it is no ConvNeXt.
    """
    config = read_json(folder / "config.json", what)
    model_type = config.get("model_type")
    if model_type != "convnext":
        hint = " (ConvNeXt V2 has another block)" if model_type == "convnextv2" else ""
        raise ConvLlavaError(
            f"{what}: {folder} holds a {model_type!r}, but ConvLLaVA's vision tower is a ConvNeXt of the model_type "
            f"'convnext'{hint}. Choose a ConvNeXt."
        )
    fields = {key: config[key] for key in _TOWER_FIELDS if config.get(key) is not None}
    # Its classes use one eps for all norms that ConvLLaVA keeps; `layer_norm_eps` is the pooling norm's alone.
    fields.setdefault("num_stages", len(fields.get("depths", [0] * 4)))
    return ConvNextConfig(**fields)


def image_settings_of(tower: Path, config: dict, tower_config: ConvNextConfig) -> dict:
    """How pictures are prepared: `side` in pixels, `image_mean`, `image_std`, and what else the processor takes.

    Args:
        tower: the tower's folder, with the preprocessor_config.json of a CLIPImageProcessor.
        config: the original's configuration, whose `mm_vision_resolution` overrides the preprocessor as it does there.
    """
    path = tower / "preprocessor_config.json"
    if path.is_file():
        preprocessor = read_json(path, "The vision tower")
    else:
        logger.warning(
            "%s is missing: taking CLIP's mean and std, and image_size=%s of the tower's config.json.",
            path,
            tower_config.image_size,
        )
        preprocessor = {"crop_size": tower_config.image_size}
    crop, resize = _square_side(preprocessor.get("crop_size"), path), _square_side(preprocessor.get("size"), path)
    side = crop or resize or tower_config.image_size
    if crop and resize and crop != resize:
        logger.warning(
            "%s resizes to %s pixels and then crops to %s; the converted model resizes to %s and crops nothing.",
            path,
            resize,
            crop,
            side,
        )
    override = config.get("mm_vision_resolution") or 0
    if override > 256:  # as the original has it
        side = override
    keys = ("image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb")
    return {"side": side, **{key: preprocessor[key] for key in keys if preprocessor.get(key) is not None}}


def tower_weights_folder(tower: Path) -> Path:
    """`tower`, if there are weights in it.

    Raises:
        ConvLlavaError: there are none; the checkpoint's own shards held none either.
    """
    if not has_weights(tower):
        raise ConvLlavaError(
            f"No weights of the vision tower: neither the checkpoint's own files nor {tower} hold any. Pass the "
            "tower's folder or id with --vision-tower."
        )
    return tower


def _square_side(size, path: Path) -> int | None:
    if size is None or isinstance(size, int):
        return size
    sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
    if len(sides) != 1:
        raise ConvLlavaError(f"{path} has the size {size}; expected a square, since ConvLLaVA pads to one.")
    return sides.pop()
