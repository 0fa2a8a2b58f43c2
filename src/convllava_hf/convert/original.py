"""Reading a checkpoint of the original code base: what its configuration files say."""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import ConvNextConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ConvLlavaError
from ..utils.json_files import read_json_object


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
_CONFIGURATION_ERRORS = (
    ArithmeticError,
    AssertionError,  # torch's embeddings
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
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
    config = read_json_object(path, "The checkpoint")
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
            "config.json has image_aspect_ratio=%r; the converted model pads images to a square, which is how "
            "ConvLLaVA was trained.",
            config.get("image_aspect_ratio"),
        )
    return config


def text_config_of(config: dict):
    """The language model's own configuration in the original's, without the original's additions."""
    architectures = config.get("architectures") or ["LlavaLlamaForCausalLM"]
    name = architectures[0] if isinstance(architectures, list) else architectures
    match = re.fullmatch(r"Llava(\w+)ForCausalLM", str(name))
    model_type = match[1].lower() if match else ""
    if model_type not in CONFIG_MAPPING:
        raise ConvLlavaError(
            f"config.json names the architecture {name!r}; expected one like "
            "'LlavaLlamaForCausalLM', with a language model that transformers knows."
        )
    config_class = CONFIG_MAPPING[model_type]
    # `rope_theta` and `rope_scaling` are what transformers 5 calls `rope_parameters`; it still reads them.
    known = (set(config_class().to_dict()) | {"rope_theta", "rope_scaling"}) - _NOT_ARCHITECTURE
    with configuration_errors("The checkpoint's config.json"):
        return config_class(**{key: value for key, value in config.items() if key in known})


def tower_config_of(folder: Path, what: str = "The vision tower") -> ConvNextConfig:
    """The configuration of a ConvNeXt that transformers saved.

    Raises:
        ConvLlavaError: it is no ConvNeXt.
    """
    config = read_json_object(folder / "config.json", what)
    model_type = config.get("model_type")
    if model_type != "convnext":
        hint = " (ConvNeXt V2 has another block)" if model_type == "convnextv2" else ""
        raise ConvLlavaError(
            f"{what}: {folder} holds a {model_type!r}, but ConvLLaVA's vision tower is a ConvNeXt of the model_type "
            f"'convnext'{hint}. Choose a ConvNeXt."
        )
    fields = {key: config[key] for key in _TOWER_FIELDS if config.get(key) is not None}
    # Its classes use one eps for all norms that ConvLLaVA keeps; `layer_norm_eps` is the pooling norm's alone.
    with configuration_errors(f"{what}: {folder / 'config.json'}"):
        fields.setdefault("num_stages", len(fields.get("depths", [0] * 4)))
        return ConvNextConfig(**fields)


def deduced_tower_config(shapes: Mapping[str, Sequence[int]], what: str) -> ConvNextConfig:
    """The configuration of a ConvNeXt from the shapes of its weights; `image_size` says nothing then.

    Args:
        shapes: by the weights' names here, without prefix.
        what: what it is, for messages.

    Raises:
        ConvLlavaError: they are not those of a ConvNeXt.
    """
    widths, blocks = {}, {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.weight", name):
            stage = int(match[1])
            widths[stage], blocks[stage] = shape[0], max(blocks.get(stage, 0), int(match[2]) + 1)
    stem = shapes.get("embeddings.patch_embeddings.weight")
    stages = sorted(widths)
    if stem is None or len(stem) != 4 or not stages or stages != list(range(len(stages))):
        raise ConvLlavaError(
            f"{what} is no ConvNeXt: it has no patch embedding and blocks in stages, but weights such as "
            f"{', '.join(list(shapes)[:3])}."
        )
    scaled = any(name.endswith("layer_scale_parameter") for name in shapes)
    return ConvNextConfig(
        num_channels=stem[1],
        patch_size=stem[2],
        num_stages=len(stages),
        depths=[blocks[stage] for stage in stages],
        hidden_sizes=[widths[stage] for stage in stages],
        layer_scale_init_value=1e-6 if scaled else 0.0,
    )


def image_settings_of(tower: Path, config: dict, stated_size: int | None) -> dict:
    """How images are prepared: `side` in pixels, `image_mean`, `image_std`, and what else the processor takes.

    Args:
        tower: the tower's folder, with the preprocessor_config.json of a CLIPImageProcessor.
        config: the original's configuration, whose `mm_vision_resolution` overrides the preprocessor as it does there.
        stated_size: `image_size` of the tower's config.json, in pixels.

    Raises:
        ConvLlavaError: none of the three says what the resolution is.
    """
    path = tower / "preprocessor_config.json"
    preprocessor = read_json_object(path, "The vision tower") if path.is_file() else {}
    crop, resize = _square_side(preprocessor.get("crop_size"), path), _square_side(preprocessor.get("size"), path)
    side = crop or resize or stated_size
    override = config.get("mm_vision_resolution") or 0
    if not all(isinstance(value, int) for value in (override, side or 0)):
        raise ConvLlavaError(
            f"The tower's image_size is {stated_size!r} and config.json's mm_vision_resolution {override!r}; numbers "
            "of pixels are expected."
        )
    if override > 256:  # as the original has it
        side = override
    if side is None:
        raise ConvLlavaError(
            f"The resolution of the vision tower is not known: {path} is missing, no config.json of the tower has an "
            "image_size, and the checkpoint's config.json has no mm_vision_resolution above 256. Put the tower's "
            "config.json and preprocessor_config.json into the checkpoint's folder vision_tower/, or name a folder "
            "with --vision-tower."
        )
    if not preprocessor:
        logger.warning("%s is missing: taking CLIP's mean and std, and images of %s pixels.", path, side)
    if crop and resize and crop != resize:
        logger.warning(
            "%s resizes to %s pixels and then crops to %s; the converted model resizes to %s and crops nothing.",
            path,
            resize,
            crop,
            side,
        )
    keys = ("image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb")
    return {"side": side, **{key: preprocessor[key] for key in keys if preprocessor.get(key) is not None}}


def _square_side(size, path: Path) -> int | None:
    if size is None or isinstance(size, int):
        return size
    keys = ("height", "width", "shortest_edge")
    sides = [size[key] for key in keys if key in size] if isinstance(size, dict) else []
    if not sides or not all(isinstance(side, int) and side == sides[0] for side in sides):
        raise ConvLlavaError(f"{path} has the size {size}; expected a square, since ConvLLaVA pads to one.")
    return sides[0]


@contextlib.contextmanager
def configuration_errors(what: str) -> Iterator[None]:
    """Adds to errors about values that transformers' or our classes cannot work with where they come from.

    Raises:
        ConvLlavaError: the block met such a value.
    """
    try:
        yield
    except ConvLlavaError:
        raise
    except _CONFIGURATION_ERRORS as error:
        message = " ".join(str(error).split())
        raise ConvLlavaError(
            f"{what} has values that describe no model ({type(error).__name__}: {message}). Download it again, or "
            "correct them."
        ) from error
