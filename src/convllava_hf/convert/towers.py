"""ConvNeXt towers from timm and from transformers."""

import difflib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import ConvNextConfig
from transformers.activations import ACT2FN
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)

from ..errors import ConvLlavaError, first_line
from ..utils.json_files import read_json_object
from .checkpoint_files import Weights, locate
from .keys import CONVNEXT_TABLE, TIMM_TABLE, Table, rename_key
from .original import tower_config_of
from .writing import WeightSource


logger = logging.getLogger(__name__)

_WHAT = "The vision tower"
_TRUNK = "visual.trunk."
NORM_EPS = 1e-6  # of every norm in transformers' ConvNeXt blocks


@dataclass
class Tower:
    """A ConvNeXt to build on: its config, its weights with the table that reads them, and how it sees images."""

    config: ConvNextConfig
    weights: WeightSource
    table: Table
    image_settings: dict = field(default_factory=dict)

    def log_unused(self) -> None:
        unused = [name for name in self.weights if _is_unused(name, self.table)]
        if unused:
            logger.info("Not used of the vision tower: %s.", ", ".join(unused))


class StateDict:
    """Weights in memory, read as `Weights` are."""

    def __init__(self, state_dict: dict[str, torch.Tensor]):
        self.state_dict = state_dict
        self.dtypes = {name: tensor.dtype for name, tensor in state_dict.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.state_dict)

    def shape(self, name: str) -> torch.Size:
        return self.state_dict[name].shape

    def tensors(self, wanted) -> Iterator[tuple[str, torch.Tensor]]:
        wanted = set(wanted)
        return ((name, tensor) for name, tensor in self.state_dict.items() if name in wanted)


def read_tower(reference: str | Path) -> Tower:
    """The tower that `reference` names.

    Args:
        reference: a timm model name, a Hub id of a timm or transformers ConvNeXt, a checkpoint file in timm's naming,
            or a folder that timm or transformers saved.

    Raises:
        ConvLlavaError: there is no such thing, or it is no ConvNeXt that transformers' blocks can express.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return _read_timm_file(path)
    if path.is_dir():
        if "architecture" in read_json_object(path / "config.json", _WHAT):
            return _read_timm_model(f"local-dir:{path}")
        return _read_transformers_folder(path)
    name = str(reference)
    if name.startswith(("hf-hub:", "hf_hub:")):
        return _read_timm_model(name)
    if "/" not in name:
        return _read_timm_model(_known_timm_name(name, path))
    if not path.is_absolute() and name.count("/") == 1 and not name.startswith("."):
        try:
            config = read_json_object(Path(hf_hub_download(name, "config.json")), _WHAT)
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ConvLlavaError(
                f"{_WHAT}: there is no file or folder {name!r}, and as an id on the Hub its config.json cannot be "
                f"downloaded: {first_line(error)}"
            ) from error
        if "architecture" in config:
            return _read_timm_model(f"hf-hub:{name}")
    return _read_transformers_folder(locate(name, _WHAT))


def timm_tower_config(shapes: dict[str, torch.Size], what: str = _WHAT) -> ConvNextConfig:
    """The configuration of a ConvNeXt in timm's naming, from its parameters' names and shapes.

    Raises:
        ConvLlavaError: it is no ConvNeXt, or a variant that transformers' blocks cannot express.
    """
    shapes = {name.removeprefix(_TRUNK): shape for name, shape in shapes.items()}
    blocks: dict[int, int] = {}
    for name in shapes:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            stage, block = int(match[1]), int(match[2])
            blocks[stage] = max(blocks.get(stage, 0), block + 1)
    stem = shapes.get("stem.0.weight")
    if not blocks or stem is None or len(stem) != 4 or sorted(blocks) != list(range(len(blocks))):
        raise ConvLlavaError(
            f"{what} is no ConvNeXt in timm's naming: it has no stem.0 and stages.N.blocks.M, but names such as "
            f"{', '.join(list(shapes)[:3])}."
        )
    refused = {
        "ConvNeXt V2, whose blocks have global response normalization": any(".mlp.grn." in name for name in shapes),
        "a ConvNeXt with an overlapping stem": any(re.match(r"stem\.[23]\.", name) for name in shapes),
        "a ConvNeXt with RMS norms": "stem.1.weight" in shapes and "stem.1.bias" not in shapes,
        "a ConvNeXt without biases": "stem.0.bias" not in shapes,
    }
    for variant, found in refused.items():
        if found:
            raise ConvLlavaError(f"{what} is {variant}; transformers' ConvNeXt is not. Choose another tower.")
    widths = [shapes[f"stages.{stage}.blocks.0.conv_dw.weight"][0] for stage in range(len(blocks))]
    has_scale = any(name.endswith(".gamma") for name in shapes)
    return ConvNextConfig(
        num_channels=stem[1],
        patch_size=stem[2],
        num_stages=len(blocks),
        depths=[blocks[stage] for stage in range(len(blocks))],
        hidden_sizes=widths,
        layer_scale_init_value=1e-6 if has_scale else 0.0,
    )


def _read_transformers_folder(folder: Path) -> Tower:
    config = tower_config_of(folder, _WHAT)
    path = folder / "preprocessor_config.json"
    preprocessor = read_json_object(path, _WHAT) if path.is_file() else {}
    settings = {key: preprocessor[key] for key in ("image_mean", "image_std", "resample") if preprocessor.get(key)}
    if "image_mean" not in settings or "image_std" not in settings:
        logger.warning("%s names no mean and std; taking ImageNet's, with which most ConvNeXts are trained.", path)
        settings |= {"image_mean": list(IMAGENET_DEFAULT_MEAN), "image_std": list(IMAGENET_DEFAULT_STD)}
    return Tower(config, Weights(folder, _WHAT), CONVNEXT_TABLE, settings)


def _read_timm_file(path: Path) -> Tower:
    weights = Weights(path, _WHAT)
    names = list(weights)
    if any(re.match(r"(?:convnext\.)?encoder\.stages\.", name) for name in names):
        raise ConvLlavaError(f"{path} is in transformers' naming; give its folder, which has the config.json too.")
    config = timm_tower_config({name: weights.shape(name) for name in names}, str(path))
    return Tower(config, weights, TIMM_TABLE, _timm_image_settings(_pretrained_cfg_beside(path), str(path)))


def _read_timm_model(name: str) -> Tower:
    timm = _import_timm()
    try:
        model = cast(Any, timm.create_model(name, pretrained=True).eval())
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        raise ConvLlavaError(f"{_WHAT}: timm cannot load {name!r}: {first_line(error)}") from error
    if type(model).__name__ != "ConvNeXt":
        raise ConvLlavaError(
            f"{_WHAT}: {name!r} is a {type(model).__name__}, but ConvLLaVA's vision tower is a ConvNeXt. Choose one, "
            "such as convnext_large_mlp.clip_laion2b_ft_soup_320."
        )
    state_dict = model.state_dict()
    config = timm_tower_config({key: tensor.shape for key, tensor in state_dict.items()}, name)
    config.hidden_act = _activation_name(model.stages[0].blocks[0].mlp.act, name)
    eps = {module.eps for module in model.stages.modules() if hasattr(module, "eps")} - {NORM_EPS}
    if eps:
        config.norm_eps = max(eps)
    return Tower(config, StateDict(state_dict), TIMM_TABLE, _timm_image_settings(model.pretrained_cfg, name))


def _known_timm_name(name: str, path: Path) -> str:
    timm = _import_timm()
    if timm.is_model(name.split(".")[0]):
        return name
    close = difflib.get_close_matches(name, timm.list_models("convnext*"), n=3)
    hint = f" timm has {', '.join(close)}." if close else ""
    raise ConvLlavaError(
        f"{_WHAT}: {name!r} is no file or folder ({path.resolve()}) and no model of timm.{hint} Give a timm model "
        "name, a Hub id with its owner, a checkpoint file or a folder."
    )


def _import_timm():
    try:
        import timm
    except ImportError:
        raise ConvLlavaError(
            "A tower by timm's name needs timm: pip install 'convllava-hf[timm]'. A timm checkpoint file or a "
            "transformers ConvNeXt folder does not."
        ) from None
    return timm


def _activation_name(activation: torch.nn.Module, name: str) -> str:
    """transformers' name of a function, found by what it computes: libraries name it differently."""
    probe = torch.linspace(-4, 4, 101, dtype=torch.float64)
    for candidate in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu"):
        if torch.allclose(ACT2FN[candidate](probe), activation(probe.clone()), rtol=0, atol=1e-9):
            return candidate
    raise ConvLlavaError(f"{_WHAT}: {name} has the activation {activation}, which transformers does not have.")


def _pretrained_cfg_beside(path: Path) -> dict:
    config = read_json_object(path.parent / "config.json", _WHAT) if (path.parent / "config.json").is_file() else {}
    return config.get("pretrained_cfg") or {}


def _timm_image_settings(pretrained_cfg: dict, what: str) -> dict:
    mean, std = pretrained_cfg.get("mean"), pretrained_cfg.get("std")
    if not mean or not std:
        logger.warning("%s names no mean and std; taking CLIP's, which ConvLLaVA's tower is trained with.", what)
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    resample = getattr(PILImageResampling, str(pretrained_cfg.get("interpolation") or "bicubic").upper(), None)
    settings = {"image_mean": list(mean), "image_std": list(std)}
    return settings | ({"resample": int(resample)} if resample is not None else {})


def _is_unused(name: str, table: Table) -> bool:
    try:
        return rename_key(name, table) is None
    except KeyError:
        return False
