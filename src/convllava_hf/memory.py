"""What earlier turns of a conversation have worked out, kept so that later turns need not do it again."""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .modeling.modeling_convllava import _CACHE, ConvLlavaForConditionalGeneration
from .modeling.processing_convllava import ConvLlavaProcessor


_PICTURES = 16  # whose visual tokens are kept; those of a 7B model are 4.7 MB for a picture of 1536 x 1536


@dataclass(frozen=True)
class Encoded:
    """A picture as the language model sees it. `size`: height and width in pixels that the tower saw. `tokens`:
    (visual tokens, hidden size)."""

    size: tuple[int, int]
    tokens: torch.Tensor


@dataclass
class Memory:
    """Visual tokens of the latest pictures, and keys and values of the latest conversation.

    Pictures are told apart by their pixels. Of keys and values those are used again that belong to the longest
    beginning which a new prompt has in common with the latest one and its answer, so conversations may branch, begin
    anew or alternate: the answers are those of a model without memory. Layers that keep a window of the latest tokens
    alone, or states of another kind, cannot be set back to an earlier token; models with such layers keep the visual
    tokens only.

    A memory belongs to one model with fixed weights, and to one thread at a time.
    """

    pictures: OrderedDict[str, Encoded] = field(default_factory=OrderedDict)
    _cache: Cache | None = None
    _marks: list = field(default_factory=list)  # what the cache holds, one entry a token: see `_marks_of`

    def forget(self) -> None:
        """Frees all that is kept."""
        self.pictures.clear()
        self._cache, self._marks = None, []


class Glance:
    """One prompt's use of a memory: prepares the pictures that are new, then tells what is left to compute."""

    def __init__(self, memory: Memory, processor: ConvLlavaProcessor):
        self.memory = memory
        self._image_processor = processor.image_processor
        self.processor = copy.copy(processor)
        self.processor.image_processor = self  # which asks it for the sizes of pictures, and may go without pixels
        self.keys: list[str] = []  # of the prompt's pictures, in order
        self._new: dict[str, tuple[torch.Tensor, tuple[int, int]]] = {}  # pixels and size
        self._marks: list = []

    def __getattr__(self, name: str):
        return getattr(self._image_processor, name)

    def __call__(self, images, **kwargs) -> dict[str, list[tuple[int, int]]]:
        """`image_sizes` of all pictures; those not seen before are prepared as the image processor does it."""
        pictures = _flat(self._image_processor.fetch_images(images))
        self.keys = [_key(picture, kwargs) for picture in pictures]
        for key, picture in zip(self.keys, pictures, strict=True):
            if key not in self.memory.pictures and key not in self._new:
                prepared = self._image_processor(picture, **{**kwargs, "return_tensors": "pt"})
                height, width = prepared["image_sizes"][0].tolist()
                self._new[key] = (prepared["pixel_values"], (height, width))
        return {
            "image_sizes": [
                self._new[key][1] if key in self._new else self.memory.pictures[key].size for key in self.keys
            ]
        }

    def left_to_compute(self, model: ConvLlavaForConditionalGeneration, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` takes: the prompt, the cache of its beginning, and visual tokens of pictures beyond it.

        Args:
            inputs: what the processor made of the prompt, (1, positions).
        """
        memory = self.memory
        for key in self.keys:
            if key in self._new:
                pixels, size = self._new.pop(key)
                pixels = pixels.to(model.device, model.dtype)
                memory.pictures[key] = Encoded(size, model.get_image_features(pixels).pooler_output[0])
            memory.pictures.move_to_end(key)
        while len(memory.pictures) > max(_PICTURES, len(set(self.keys))):
            memory.pictures.popitem(last=False)

        self._marks = _marks_of(inputs["input_ids"][0].tolist(), model.config.image_token_id, self.keys, memory)
        kept = _common_beginning(memory._marks, self._marks[:-1])  # the last token's logits are wanted: not kept
        cache, memory._cache = memory._cache, None  # whatever interrupts the generation leaves it in no known state
        self.reused = kept if cache is not None else 0
        left = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if self.reused:
            if len(memory._marks) > kept:
                cache.crop(kept - len(memory._marks))  # negative: so many tokens less
            left[_CACHE] = cache
        passed = sum(isinstance(mark, tuple) for mark in self._marks[: self.reused])
        tokens = [memory.pictures[key].tokens for key in self.keys]
        if tokens and (beyond := torch.cat(tokens)[passed:]).numel():
            left["image_hidden_states"] = beyond
        return left

    def keep(self, output) -> None:
        """Remembers what `generate` returned, where it can be set back to an earlier token later."""
        cache = getattr(output, _CACHE)
        if cache is None or not all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None])):
            return
        prompt = len(self._marks)
        marks = [*self._marks, *output.sequences[0, prompt:].tolist()]
        self.memory._cache, self.memory._marks = cache, marks[: cache.get_seq_length()]


def _marks_of(token_ids: Sequence[int], image_token_id: int, keys: Sequence[str], memory: Memory) -> list:
    """What stands at each position: a token's id, or for a visual token its picture and its place in it."""
    visual = [(key, place) for key in keys for place in range(len(memory.pictures[key].tokens))]
    waiting = iter(visual)
    return [next(waiting, token) if token == image_token_id else token for token in token_ids]


def _common_beginning(one: Sequence, other: Sequence) -> int:
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def _flat(images) -> list:
    if isinstance(images, (list, tuple)):
        return [picture for image in images for picture in _flat(image)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _key(picture, options: Mapping[str, Any]) -> str:
    """Tells pictures, and ways to look at them, apart by all that decides what the tower sees."""
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    if isinstance(picture, Image.Image):
        facts = {name: value for name, value in picture.info.items() if isinstance(value, (str, bytes, int, tuple))}
        palette = picture.getpalette() if picture.mode in ("P", "PA") else None
        digest.update(repr((picture.mode, picture.size, palette, sorted(facts.items(), key=str))).encode())
        digest.update(picture.tobytes())
    else:
        if hasattr(picture, "detach"):
            tensor = picture.detach().cpu()
            picture = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # which NumPy does not have
        array = np.ascontiguousarray(picture)
        digest.update(repr((array.dtype, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
