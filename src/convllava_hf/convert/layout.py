"""The new checkpoint: its configuration, its vocabulary, and its files."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from ..errors import ConvLlavaError
from ..modeling.modeling_convllava import AUTO_MAP

# Registered, since their code is saved with a checkpoint only then.
from ..registration import (
    ConvLlavaConfig,
    ConvLlavaForConditionalGeneration,
    ConvLlavaImageProcessor,
    ConvLlavaProcessor,
)
from ..utils.json_files import read_json_object
from .keys import HEAD, Table, plan_renaming
from .tokenizers import IMAGE_TOKEN, make_portable
from .writing import ShardWriter, WeightSource


logger = logging.getLogger(__name__)

_VOCABULARY_MULTIPLE = 64
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def parse_dtype(dtype: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype of that name, `default` for `None` and `"auto"`.

    Raises:
        ConvLlavaError: there is no such dtype, or models are not saved in it.
    """
    if dtype in (None, "auto"):
        return default
    parsed = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if parsed not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConvLlavaError(f"The dtype is {dtype!r}; expected float32, float16 or bfloat16.")
    return parsed


def padded_vocabulary_size(rows: int, tokens: int) -> int:
    """Rows of the embedding matrix: enough for `tokens`, no fewer than `rows`, and a multiple of 64."""
    return -(-max(rows, tokens) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def new_config(vision_config, text_config, image_token_id: int, dtype: torch.dtype) -> ConvLlavaConfig:
    """The configuration of the new model.

    Raises:
        ConvLlavaError: the parts do not fit together.
    """
    try:
        config = ConvLlavaConfig(vision_config=vision_config, text_config=text_config, image_token_id=image_token_id)
    except ValueError as error:
        raise ConvLlavaError(str(error)) from error
    config.architectures = [ConvLlavaForConditionalGeneration.__name__]
    config.auto_map = dict(AUTO_MAP)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = dtype
    return config


def empty_model(config: ConvLlavaConfig) -> ConvLlavaForConditionalGeneration:
    """The model without memory for its weights: it knows their names and shapes."""
    with torch.device("meta"):
        return ConvLlavaForConditionalGeneration(config)


def expected_shapes(model: ConvLlavaForConditionalGeneration) -> dict[str, torch.Size]:
    """Names and shapes of the weights that a saved model has: all but a head that is the embedding matrix."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    return shapes


def new_processor(
    config: ConvLlavaConfig, tokenizer, chat_template: str, image_suffix: str, image_settings: dict
) -> ConvLlavaProcessor:
    """The processor of the new model; `image_settings` are arguments of `ConvLlavaImageProcessor`."""
    side = config.vision_config.image_size
    image_processor = ConvLlavaImageProcessor(
        size={"height": side, "width": side}, stride=config.stride, **image_settings
    )
    # One template, wherever a reader looks for it.
    tokenizer.chat_template = chat_template
    return ConvLlavaProcessor(
        image_processor, tokenizer, chat_template=chat_template, image_token=IMAGE_TOKEN, image_suffix=image_suffix
    )


def new_generation_config(folder: Path, text_config, tokenizer, vocab_size: int) -> GenerationConfig:
    """How the new model generates: as the source in `folder` does, but never `<image>` or padding rows.

    Rows that pad the vocabulary, and the image's, are never trained towards, so generation must not choose them.
    """
    path = folder / "generation_config.json"
    values = read_json_object(path, "The checkpoint") if path.is_file() else {}
    values = {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}
    if not values.get("do_sample"):
        # Vicuna's file has settings for sampling without sampling, which transformers refuses to save.
        values = {key: value for key, value in values.items() if key not in _SAMPLING}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for default in (getattr(text_config, key, None), getattr(tokenizer, key, None)):
            if values.get(key) is None and default is not None:
                values[key] = default
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    suppressed = {*(values.get("suppress_tokens") or ()), image_token_id, *range(len(tokenizer), vocab_size)}
    values["suppress_tokens"] = sorted(suppressed)
    return GenerationConfig(**values)


def save_all_but_weights(
    folder: Path,
    model: ConvLlavaForConditionalGeneration,
    processor: ConvLlavaProcessor,
    generation_config: GenerationConfig,
) -> None:
    """Configuration, processor, chat template, generation config and the code that loads them."""
    custom_object_save(model, folder)
    model.config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    make_portable(folder)


def plan_weights(
    model: ConvLlavaForConditionalGeneration, sources: Mapping[str, WeightSource], tables: Mapping[str, Table]
) -> dict[str, tuple[str, str]]:
    """`{name here: (source, name there)}` for all weights, after checking names and shapes.

    Args:
        sources: things with the names of their weights as elements, `shape(name)` and `tensors(names)`.
        tables: how each source's names are read.

    Raises:
        ConvLlavaError: weights left over, missing, or of another shape than the configuration says.
    """
    expected = expected_shapes(model)
    plan = plan_renaming({source: (sources[source], tables[source]) for source in sources}, expected)
    vocabulary = _vocabulary_weights(model)
    wrong = []
    for name, (source, there) in plan.items():
        found, wanted = sources[source].shape(there), expected[name]
        grows = name in vocabulary and found[0] <= wanted[0] and found[1:] == wanted[1:]
        if not grows and found != wanted and found != (*wanted, 1, 1):
            wrong.append(f"{there} ({source}) is {tuple(found)}, expected {tuple(wanted)}")
    if wrong:
        raise ConvLlavaError(
            f"{len(wrong)} weights have another shape than the configuration says: {'; '.join(wrong)}. Check that the "
            "configuration files belong to these weights."
        )
    return plan


def write_weights(
    folder: Path,
    model: ConvLlavaForConditionalGeneration,
    plan: dict[str, tuple[str, str]],
    sources: Mapping[str, WeightSource],
    max_shard_size: int,
    progress: bool,
) -> None:
    """Writes all weights in the dtype of the configuration, one at a time."""
    expected = expected_shapes(model)
    dtype = model.config.dtype
    vocabulary = _vocabulary_weights(model)
    writer = ShardWriter(folder, {name: (expected[name], dtype) for name in plan}, max_shard_size)
    with tqdm(total=len(plan), desc="Writing weights", unit="tensor", disable=not progress) as bar:
        try:
            for name, tensor in _planned_tensors(plan, sources):
                if name in vocabulary:
                    tensor = grow_vocabulary(tensor, expected[name][0])
                writer.write(name, tensor.reshape(expected[name]))
                bar.update()
                del tensor
            writer.finish()
        finally:
            writer.close()


def grow_vocabulary(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`weight` (tokens, hidden size) with `rows` rows; new rows are the mean of the old ones.

    The mean is what a token of no meaning looks like. In the head it also bounds what padding costs: a new token's
    logit is the mean of the logits, so by Jensen's inequality k new rows for V tokens take less than k/V of the old
    tokens' probability, and the loss in training grows by less than log(1 + k/V), 0.002 for Vicuna. Zero rows have no
    such bound, since their logit of 0 may lie far above all others.
    """
    new = rows - len(weight)
    if new <= 0:
        return weight
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(new, -1)])


def _planned_tensors(plan, sources) -> Iterator[tuple[str, torch.Tensor]]:
    for source, weights in sources.items():
        names = {there: name for name, (origin, there) in plan.items() if origin == source}
        for there, tensor in weights.tensors(names):
            yield names[there], tensor


def _vocabulary_weights(model: ConvLlavaForConditionalGeneration) -> set[str]:
    """Names of the weights with one row for each token."""
    embeddings = model.get_input_embeddings()
    return {HEAD, *(f"{name}.weight" for name, module in model.named_modules() if module is embeddings)}
