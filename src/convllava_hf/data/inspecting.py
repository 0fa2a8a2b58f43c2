"""Shows one sample as the model will see it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image

from ..boxes import DEFAULT_FRAME, Box, check_frame, draw_boxes
from ..errors import ConvLlavaError
from .box_frames import boxes_in, in_model_frame, shared_shape
from .conversations import SampleError, identity_of, sample_of
from .dataset_files import RawRows, folder_of_images, open_records
from .paths import located
from .tokens import with_images


@dataclass(frozen=True)
class Token:
    """`text`: its text in the rendered prompt, "" where it shares its characters with the one before."""

    id: int
    text: str
    supervised: bool
    visual: bool


@dataclass(frozen=True)
class InspectedImage:
    """`size`: height and width in pixels of the image; `seen`: of what the tower sees of it. `image`: that, with
    the normalization undone. `tokens`: its visual tokens. `boxes`: that the conversation names, in fractions of it."""

    name: str
    size: tuple[int, int]
    seen: tuple[int, int]
    tokens: int
    image: Image.Image
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """`text`: as the chat template writes it, one `<image>` an image. `tokens`: before any are cut off."""

    index: int
    id: str | None
    text: str
    tokens: list[Token]
    images: list[InspectedImage]

    @property
    def visual(self) -> int:
        return sum(token.visual for token in self.tokens)

    @property
    def supervised(self) -> int:
        return sum(token.supervised for token in self.tokens)


def inspect_sample(
    path: str | os.PathLike,
    image_folder: str | os.PathLike | None,
    index: int,
    model: str | os.PathLike,
    *,
    split: str = "train",
    name: str | None = None,
    image_options: Mapping[str, Any] | None = None,
    boxes: str = DEFAULT_FRAME,
    trust_remote_code: bool = False,
) -> Inspection:
    """Renders, tokenizes and preprocesses one sample as training does, with its boxes in the frame that it trains on.

    Args:
        path, image_folder, split, name: as in `load_training_data`.
        index: of the sample in the file, from 0.
        model: folder or Hub id of a checkpoint.
        image_options: how large the model sees images, where not as `model` says: some of `IMAGE_OPTIONS`.
        boxes: the frame of the data's boxes, as in `load_training_data`.
        trust_remote_code: whether code that comes with `model` may run, see `trust`.

    Raises:
        ConvLlavaError: there is no such data set, sample or model, or the sample is not as it should be.
    """
    from .checking import load_data_processor

    record = _record(path, index, split, name)
    folder = folder_of_images(path, image_folder)
    try:
        sample = sample_of(record)
        references = [located(image, folder) for image in sample["images"]]
    except SampleError as error:
        raise ConvLlavaError(f"Sample {index}: {error}") from error
    processor = load_data_processor(model, image_options, trust_remote_code)
    try:
        opened = [processor.image_processor.fetch_images(reference) for reference in references]
        seen = [_seen(processor, reference, image) for reference, image in zip(references, opened, strict=True)]
    except (OSError, ValueError, RuntimeError) as error:  # the last from PIL's AVIF
        raise ConvLlavaError(f"Sample {index} has an image that cannot be read: {error}") from error
    check_frame(boxes)
    sample = in_model_frame({**sample, "images": opened, "boxes": boxes}, processor.image_processor)
    messages = with_images(sample["messages"], opened)
    named = tuple(dict.fromkeys(box.box for box in boxes_in(sample["messages"]))) if shared_shape(opened) else ()
    seen = [replace(image, boxes=named) for image in seen]
    try:
        text = processor.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise ConvLlavaError(f"Sample {index} is refused by the chat template: {error}") from error
    return Inspection(index, identity_of(record), text, _tokens(processor, text, messages, opened), seen)


def save_images(inspection: Inspection, path: str | os.PathLike) -> list[Path]:
    """Writes the images as the tower sees them, with the boxes that the conversation names drawn on them: the first
    as `path`, others as `name-2.png` and so on."""
    path = Path(path)
    paths = [
        path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        for number in range(1, len(inspection.images) + 1)
    ]
    for target, seen in zip(paths, inspection.images, strict=True):
        try:
            draw_boxes(seen.image, seen.boxes).save(target)
        except ValueError as error:  # PIL knows no format of such a name
            raise ConvLlavaError(f"Cannot write an image to {str(target)!r}: {error}") from error
    return paths


def _record(path: str | os.PathLike, index: int, split: str, name: str | None) -> dict:
    records, _ = open_records(path, split=split, name=name)
    if index < 0:
        raise ConvLlavaError(f"The index is {index}; samples are counted from 0.")
    if isinstance(records, RawRows):
        if index < records.size:
            return records.dataset[index]
        number = records.size
    else:
        number = 0
        for number, record in enumerate(records, start=1):
            if number > index:
                return record
    raise ConvLlavaError(f"There is no sample {index}: {path} has {number}, counted from 0.")


def _tokens(processor: Any, text: str, messages: list[dict], images: list[Image.Image]) -> list[Token]:
    plain = processor(text=text, images=images or None, add_special_tokens=False, return_offsets_mapping=True)
    output = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = (_row(output[key]) for key in ("input_ids", "assistant_masks"))
    tokens, last = [], -1
    for token_id, supervised, (start, end) in zip(ids, mask, _row(plain["offset_mapping"]), strict=True):
        visual = token_id == processor.image_token_id
        piece = text[start:end] if start >= last or visual else ""
        tokens.append(Token(token_id, piece, bool(supervised), visual))
        last = max(last, end)
    return tokens


def _row(rows: Any) -> list:
    """Of one text, where transformers gives a batch of one."""
    first = next(iter(rows), None)
    return list(first) if isinstance(first, list) else list(rows)


def _seen(processor: Any, reference: dict, image: Image.Image) -> InspectedImage:
    image_processor = processor.image_processor
    output = image_processor(image)
    height, width = (int(side) for side in output["image_sizes"][0])
    pixels = np.asarray(output["pixel_values"][0])[:, :height, :width]  # (3, H, W)
    if image_processor.do_normalize:
        mean, std = (
            np.asarray(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
        )
        pixels = pixels * std + mean
    if image_processor.do_rescale:
        pixels = pixels / image_processor.rescale_factor
    shown = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)]).num_image_tokens[0]
    name = reference["path"] or "an image in the data set"
    return InspectedImage(name, (image.height, image.width), (height, width), tokens, shown)
