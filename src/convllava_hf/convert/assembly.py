"""`assemble`: a new, untrained ConvLLaVA from a ConvNeXt tower and a causal language model."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from ..errors import ConvLlavaError, first_line
from ..inference.trust import check_code, foreign_code
from ..modeling.configuration_convllava import tower_stride, visual_token_grid
from ..training_record import write_record
from ..utils.json_files import read_json_object
from . import layout
from .checkpoint_files import Weights, locate
from .keys import PROJECTOR, SAME_TABLE, TOWER, Table, language_model_table
from .templates import read_template, template_with_images
from .tokenizers import IMAGE_TOKEN, add_image_token, load_original_tokenizer, prefix_after
from .towers import StateDict, Tower, read_tower
from .writing import check_output, new_checkpoint_folder, parse_size


logger = logging.getLogger(__name__)

_WHAT = "The language model"
_SHARD_SIZE = "2GB"
_NO_CODE = {"trust_remote_code": False}  # said outright: transformers would ask on a terminal
# Settings by which some language models change the logits after their head in ways that ours does not know, with the
# values that change nothing.
_LOGIT_SETTINGS = {"lm_head_multiplier": (None, 1.0)}


def assemble(
    output: str | Path,
    *,
    vision: str | Path,
    text: str | Path,
    resolution: int = 1536,
    extra_stage_depth: int = 6,
    extra_stage_width: int = 3072,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    chat_template: str | Path | None = None,
) -> Path:
    """Makes a ConvLLaVA whose extra stage and projector are fresh, as before the first stage of training.

    Args:
        output: the folder to make. It appears only when it is complete.
        vision: a ConvNeXt: a timm model name or Hub id, a timm checkpoint file, or a transformers folder or id.
        text: a causal language model: a folder or a Hub id.
        resolution: side in pixels of the square that images are brought to; a multiple of the tower's stride.
        extra_stage_depth: blocks of the stage added to the tower, 0 for none (the paper adds 6).
        extra_stage_width: channels of that stage (the paper's has 3072).
        dtype: of the written weights. Default: the language model's.
        seed: of the fresh weights.
        overwrite: replace `output` if it is a checkpoint already.
        progress: show a bar.
        chat_template: a Jinja file, in place of the language model's own template. One without `{% generation %}`
            gets it as the language model's own does.

    Returns:
        The folder made.

    Raises:
        ConvLlavaError: something cannot be read, is of the wrong kind, or does not fit; the chat template cannot be
            trained with; `output` exists.
    """
    check_output(output, overwrite)
    given_template = None if chat_template is None else read_template(chat_template)
    folder = locate(text, _WHAT)
    text_config, language_model, base = _read_config(folder)
    tokenizer = _read_tokenizer(folder)
    image_token_id = add_image_token(tokenizer)
    # Before the weights, which are not needed to find out that a template cannot be trained with.
    after_bos = prefix_after(tokenizer, str(tokenizer.bos_token)) if tokenizer.bos_token else ""
    template = template_with_images(tokenizer, after_bos, given_template)
    tower = read_tower(vision)
    tower.log_unused()
    vision_config = _vision_config(tower, resolution, extra_stage_depth, extra_stage_width)
    weights, table = _read_language_model(folder, text_config, language_model, base)
    text_config.vocab_size = layout.padded_vocabulary_size(text_config.vocab_size, len(tokenizer))
    dtype = layout.parse_dtype(dtype, default=text_config.dtype or next(iter(weights.dtypes.values())))
    config = layout.new_config(vision_config, text_config, image_token_id, dtype)
    model = layout.empty_model(config)
    fresh = FreshWeights(model, len(tower.config.depths or ()), seed)
    sources = {"the vision tower": tower.weights, "fresh weights": fresh, "the language model": weights}
    tables = {"the vision tower": tower.table, "fresh weights": SAME_TABLE, "the language model": table}
    plan = layout.plan_weights(model, sources, tables)
    suffix = prefix_after(tokenizer, IMAGE_TOKEN)
    processor = layout.new_processor(config, tokenizer, template, suffix, tower.image_settings)
    generation_config = layout.new_generation_config(folder, text_config, tokenizer, text_config.vocab_size)
    with new_checkpoint_folder(output, overwrite, inputs=(folder, Path(vision).expanduser())) as new:
        layout.save_all_but_weights(new, model, processor, generation_config)
        layout.write_weights(new, model, plan, sources, parse_size(_SHARD_SIZE), progress)
        write_record(new, origin={"vision_tower": vision, "language_model": text})
    return Path(output)


class FreshWeights:
    """The stages that the tower does not have yet, and the projector, initialized as the model initializes them.

    Made one block at a time, in float32, from `seed`.
    """

    def __init__(self, model, stages_given: int, seed: int):
        self.model = model
        self.seed = seed
        self.modules = [(PROJECTOR, model.model.multi_modal_projector)]
        for index, stage in enumerate(model.model.vision_tower.encoder.stages):
            if index >= stages_given:
                prefix = f"{TOWER}encoder.stages.{index}."
                self.modules.append((f"{prefix}downsampling_layer.", stage.downsampling_layer))
                self.modules += [(f"{prefix}layers.{number}.", block) for number, block in enumerate(stage.layers)]
        self._shapes = {
            prefix + name: tensor.shape
            for prefix, module in self.modules
            for name, tensor in module.state_dict().items()
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def tensors(self, wanted) -> Iterator[tuple[str, torch.Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for prefix, module in self.modules:
                initialize = self.model if prefix == PROJECTOR else self.model.model.vision_tower
                real = copy.deepcopy(module).to(torch.float32).to_empty(device="cpu")
                with torch.no_grad():
                    for parameter in real.parameters():
                        parameter.fill_(float("nan"))
                    real.apply(initialize._init_weights)
                for name, tensor in real.state_dict().items():
                    if not tensor.isfinite().all():
                        raise RuntimeError(f"{prefix}{name} was not initialized by the model's _init_weights.")
                    yield prefix + name, tensor


def _vision_config(tower: Tower, resolution: int, depth: int, width: int):
    """The tower's configuration with the stage added and the new image size."""
    if depth < 0 or (depth and width <= 0):
        raise ConvLlavaError(
            f"An extra stage of {depth} blocks and {width} channels is not possible; give positive numbers, or a "
            "depth of 0 for no extra stage."
        )
    config = copy.deepcopy(tower.config)
    if depth:
        config = type(config)(
            **{
                **{key: getattr(config, key) for key in ("num_channels", "patch_size", "hidden_act")},
                **{key: getattr(config, key) for key in ("layer_scale_init_value", "drop_path_rate")},
                **({"norm_eps": config.norm_eps} if hasattr(config, "norm_eps") else {}),
                "initializer_range": config.initializer_range,
                "depths": [*(config.depths or ()), depth],
                "hidden_sizes": [*(config.hidden_sizes or ()), width],
                "num_stages": config.num_stages + 1,
            }
        )
    stride = tower_stride(config)
    try:
        visual_token_grid(resolution, resolution, stride)
    except ValueError:
        below = max(resolution // stride, 1) * stride
        raise ConvLlavaError(
            f"A resolution of {resolution} pixels is not a multiple of the tower's stride of {stride} pixels with "
            f"{config.num_stages} stages. The nearest possible are {below} and {below + stride}."
        ) from None
    config.image_size = resolution
    return config


def _read_config(folder: Path) -> tuple[PretrainedConfig, PreTrainedModel, PreTrainedModel]:
    """A causal language model's config, and its classes with and without a head, without weights."""
    check_code(str(folder), read_json_object(folder / "config.json", _WHAT), never=True)
    try:
        config = AutoConfig.from_pretrained(folder, **_NO_CODE)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **_NO_CODE)
            base = AutoModel.from_config(config, **_NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ConvLlavaError(
            f"{_WHAT}: {folder} does not hold a causal language model that transformers knows ({_why(error, folder)})."
        ) from error
    for key, neutral in _LOGIT_SETTINGS.items():
        if (value := getattr(config, key, None)) not in neutral:
            raise ConvLlavaError(
                f"{_WHAT}: its config has {key}={value}, which changes the logits after the head. ConvLLaVA "
                "does not; choose another language model."
            )
    return config, model, base


def _read_language_model(
    folder: Path, config: PretrainedConfig, model: PreTrainedModel, base: PreTrainedModel
) -> tuple[Weights | StateDict, Table]:
    """A causal language model's weights, and the table that reads them."""
    head = next((n for n, module in model.named_modules() if module is model.get_output_embeddings()), "lm_head")
    tied = bool(getattr(config, "tie_word_embeddings", False))
    # Some models' `base_model_prefix` names nothing in them (Gemma 3's in transformers 4).
    prefix = next((n for n, module in model.named_modules() if type(module) is type(base)), model.base_model_prefix)
    table = language_model_table(prefix, f"{head}.weight", tied)
    weights = Weights(folder, _WHAT)
    names = set(model.state_dict()) - ({f"{head}.weight"} if tied else set())
    if not names <= set(weights):
        weights = _load_whole(folder, names)
    return weights, table


def _load_whole(folder: Path, names: set[str]) -> StateDict:
    """The weights after transformers has renamed and merged them, where files and model have different layouts.

    Needs memory for all of them, so it is the second choice.
    """
    logger.info("The files in %s are in another layout than the model; loading it as a whole.", folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **_NO_CODE)
    if lacking := sorted(names.intersection(info["missing_keys"])):
        raise ConvLlavaError(f"{_WHAT}: {folder} lacks {len(lacking)} weights: {', '.join(lacking)}.")
    return StateDict(model.state_dict())


def _why(error: Exception, folder: Path) -> str:
    """What went wrong; if the folder has code, also that it is not run, because the new model has none."""
    if "trust_remote_code" in str(error) and (code := foreign_code(folder)):
        return f"it needs code of its own, {'; '.join(code)}, which is not run: choose one that transformers has"
    return first_line(error)


def _read_tokenizer(folder: Path):
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return load_original_tokenizer(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **_NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ConvLlavaError(
            f"{_WHAT}: the tokenizer in {folder} cannot be loaded ({_why(error, folder)})."
        ) from error
    if not tokenizer.is_fast:
        raise ConvLlavaError(f"{_WHAT}: {folder} has only a slow tokenizer; ConvLLaVA needs a tokenizer.json.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
