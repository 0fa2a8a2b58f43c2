"""`convert_checkpoint`: a checkpoint of the original code into transformers' layout."""

from pathlib import Path

import torch

from ..errors import ConvLlavaError
from ..training_record import write_record
from . import layout
from .checkpoint_files import Weights, locate
from .original import configuration_errors, read_original_config, text_config_of
from .templates import vicuna_template
from .tokenizers import IMAGE_TOKEN, load_original_tokenizer, prefix_after
from .tower_choice import ChosenTower, choose_tower, find_tower
from .writing import check_output, new_checkpoint_folder, parse_size


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

    Weights are read and written one tensor at a time; the model is never built in memory. Which vision tower is taken,
    and whether it equals the other one where there are two, is logged and recorded in the new training_record.json.

    Args:
        source: the checkpoint's folder, or its id on the Hub.
        output: the folder to make. It appears only when it is complete.
        vision_tower: folder or Hub id of the tower, or `"shards"` for the one in the checkpoint's shards. Default: the
            tower that the original runs, which is in the checkpoint's folder `vision_tower/` or where
            `mm_vision_tower` in its config.json says; the shards' only where that one has no weights or is not
            available.
        dtype: of the written weights, such as `"bfloat16"`. Default: what config.json says.
        overwrite: replace `output` if it is a checkpoint already.
        max_shard_size: bytes of an output file, or a size such as `"2GB"`.
        progress: show a bar.

    Returns:
        The folder made.

    Raises:
        ConvLlavaError: the source or its tower cannot be read, is no ConvLLaVA, or its weights do not fit; `output`
            exists.
    """
    shard_bytes = parse_size(max_shard_size)
    check_output(output, overwrite)
    # What is small is read and checked first, then the tower is downloaded, then the rest.
    folder = locate(source, "The checkpoint", weights=())
    config = read_original_config(folder)
    text_config = text_config_of(config)
    tokenizer = load_original_tokenizer(folder)
    found = find_tower(source, folder, config, vision_tower)
    language_model = Weights(locate(source, "The checkpoint"), "The checkpoint")
    tower = choose_tower(found, folder, config, language_model, vision_tower)
    weights, tables = {_MAIN: language_model}, {_MAIN: tower.main_table}
    if tower.weights is not None:
        weights[_TOWER], tables[_TOWER] = tower.weights, tower.table

    rows = language_model.shape(_EMBEDDINGS)[0] if _EMBEDDINGS in language_model else text_config.vocab_size
    text_config.vocab_size = layout.padded_vocabulary_size(rows, len(tokenizer))
    dtype = layout.parse_dtype(
        dtype or config.get("torch_dtype"), default=next(iter(language_model.dtypes.values()), torch.float32)
    )
    with configuration_errors(f"The configuration of {folder} or of its vision tower"):
        _check_size(tower.config, text_config, sum(map(len, (each.dtypes for each in weights.values()))))
        model, processor = _new_model(tower, text_config, tokenizer, dtype)
        generation_config = layout.new_generation_config(folder, text_config, tokenizer, text_config.vocab_size)
    plan = layout.plan_weights(model, weights, tables)

    inputs = (folder, *([found.folder] if found.folder is not None else []))
    with new_checkpoint_folder(output, overwrite, inputs=inputs) as new_folder:
        with configuration_errors(f"The configuration of {folder}"):
            layout.save_all_but_weights(new_folder, model, processor, generation_config)
        layout.write_weights(new_folder, model, plan, weights, shard_bytes, progress)
        write_record(new_folder, origin={"checkpoint": source, **tower.origin})
    return Path(output)


def _new_model(tower: ChosenTower, text_config, tokenizer, dtype: torch.dtype):
    """The model without its weights, and its processor."""
    suffix = prefix_after(tokenizer, IMAGE_TOKEN)
    template = vicuna_template(prefix_after(tokenizer, tokenizer.bos_token), after_image=suffix)
    config = layout.new_config(tower.config, text_config, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), dtype)
    processor = layout.new_processor(config, tokenizer, template, suffix, tower.image_settings)
    return layout.empty_model(config), processor


def _check_size(tower_config, text_config, weights: int) -> None:
    """Refuses more layers than there are weights before they are built one by one."""
    layers = text_config.num_hidden_layers + sum(tower_config.depths)
    if layers > weights:
        raise ConvLlavaError(
            f"The configuration describes {layers} layers, and there are {weights} weights. Check that the "
            "configuration files belong to these weights."
        )
