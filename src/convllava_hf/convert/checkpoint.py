"""`convert_checkpoint`: a checkpoint of the original code into transformers' layout."""

import logging
from pathlib import Path

import torch

from ..record import write_record
from . import layout
from .keys import CONVNEXT_TABLE, ORIGINAL_TABLE
from .original import (
    find_tower,
    image_settings_of,
    read_original_config,
    text_config_of,
    tower_config_of,
    tower_weights_folder,
)
from .reading import Weights, locate
from .templates import vicuna_template
from .tokenizers import IMAGE_TOKEN, load_original_tokenizer, prefix_after
from .writing import check_output, new_checkpoint_folder, parse_size


logger = logging.getLogger(__name__)

# The two sources of weights, as messages call them.
_MAIN, _TOWER = "the language model's files", "the vision tower's files"
_EMBEDDINGS = "model.embed_tokens.weight"


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "2GB",
    progress: bool = True,
) -> Path:
    """Converts a checkpoint of the original ConvLLaVA code (github.com/alibaba/conv-llava).

    Weights are read and written one tensor at a time; the model is never built in memory.

    Args:
        source: the checkpoint's folder, or its id on the Hub.
        output: the folder to make. It appears only when it is complete.
        vision_tower: folder or Hub id of the tower. Default: weights in the checkpoint's own shards, its folder
            `vision_tower/`, or what `mm_vision_tower` in its config.json names.
        dtype: of the written weights, such as `"bfloat16"`. Default: what config.json says.
        overwrite: replace `output` if it is a checkpoint already.
        max_shard_size: bytes of an output file, or a size such as `"2GB"`.
        progress: show a bar.

    Returns:
        The folder made.

    Raises:
        ConvLlavaError: the source cannot be read, is no ConvLLaVA, or its weights do not fit; `output` exists.
    """
    shard_bytes = parse_size(max_shard_size)
    check_output(output, overwrite)
    origin = {"checkpoint": source}
    source = locate(source, "The checkpoint")
    config = read_original_config(source)
    tower = find_tower(source, config, vision_tower)
    language_model = Weights(source, "The checkpoint")
    weights, tables = {_MAIN: language_model}, {_MAIN: ORIGINAL_TABLE}
    _add_tower(weights, tables, tower, explicit=vision_tower is not None)
    if _TOWER in weights and not tower.is_relative_to(source):
        origin["vision_tower"] = vision_tower or config["mm_vision_tower"]

    tower_config = tower_config_of(tower)
    image_settings = image_settings_of(tower, config, tower_config)
    tower_config.image_size = image_settings.pop("side")
    tokenizer = load_original_tokenizer(source)
    text_config = text_config_of(config)
    rows = language_model.shape(_EMBEDDINGS)[0] if _EMBEDDINGS in language_model else text_config.vocab_size
    text_config.vocab_size = layout.padded_vocabulary_size(rows, len(tokenizer))
    new = layout.new_config(
        tower_config,
        text_config,
        tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        layout.parse_dtype(dtype or config.get("torch_dtype"), default=next(iter(language_model.dtypes.values()))),
    )
    model = layout.empty_model(new)
    plan = layout.plan_weights(model, weights, tables)
    suffix = prefix_after(tokenizer, IMAGE_TOKEN)
    template = vicuna_template(after_bos=prefix_after(tokenizer, tokenizer.bos_token))
    processor = layout.new_processor(new, tokenizer, template, suffix, image_settings)
    generation_config = layout.new_generation_config(source, text_config, tokenizer, text_config.vocab_size)

    with new_checkpoint_folder(output, overwrite, inputs=(source, tower)) as folder:
        layout.save_all_but_weights(folder, model, processor, generation_config)
        layout.write_weights(folder, model, plan, weights, shard_bytes, progress)
        write_record(folder, origin=origin)
    return Path(output)


def _add_tower(weights: dict, tables: dict, tower: Path, explicit: bool) -> None:
    """Adds the tower's own files to the sources, unless the checkpoint's shards hold its weights already.

    Those in the shards were trained together with the rest; only a tower that the caller names goes before them.
    """
    inside = [name for name in weights[_MAIN] if name.startswith("model.vision_tower.")]
    if inside and not explicit:
        logger.info("Taking the vision tower from %s.", _MAIN)
        return
    if inside:
        logger.warning("%s hold a vision tower too; taking the one in %s, as asked for.", _MAIN.capitalize(), tower)
        tables[_MAIN] = ((r"^model\.vision_tower\.", None), *ORIGINAL_TABLE)
    weights[_TOWER] = Weights(tower_weights_folder(tower), "The vision tower")
    tables[_TOWER] = CONVNEXT_TABLE
