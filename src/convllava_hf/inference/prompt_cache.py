"""What earlier turns of a conversation computed, kept so that later turns need not compute it again."""

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

from ..modeling.modeling_convllava import _CACHE, ConvLlavaForConditionalGeneration
from ..modeling.processing_convllava import ConvLlavaProcessor


_IMAGES = 16  # whose visual tokens are kept; those of a 7B model are 4.7 MB for an image of 1536 x 1536


@dataclass(frozen=True)
class EncodedImage:
    """An image as the language model sees it. `size`: height and width in pixels that the tower saw. `tokens`:
    (visual tokens, hidden size)."""

    size: tuple[int, int]
    tokens: torch.Tensor


@dataclass
class PromptCache:
    """Visual tokens of the latest images, and keys and values of the latest conversation.

    Images are identified by their pixels. Keys and values are reused for the longest prefix that a new prompt shares
    with the latest one and its answer, so conversations may branch, start over or alternate: the answers are those
    of a model without a prompt cache. Layers that keep only a window of the latest tokens, or states
    of another kind, cannot be cropped to an earlier token; models with such layers keep the visual tokens only.

    A prompt cache belongs to one model with fixed weights, and to one thread at a time.
    """

    images: OrderedDict[str, EncodedImage] = field(default_factory=OrderedDict)
    _cache: Cache | None = None
    _token_keys: list = field(default_factory=list)  # what the cache holds, one entry a token: see `_token_keys_of`

    def forget(self) -> None:
        """Frees all that is kept."""
        self.images.clear()
        self._cache, self._token_keys = None, []


class CachedPrompt:
    """One prompt's use of a prompt cache: prepares the images that are new, then says what is left to compute."""

    def __init__(self, prompt_cache: PromptCache, processor: ConvLlavaProcessor):
        self.prompt_cache = prompt_cache
        self._image_processor = processor.image_processor
        self.processor = copy.copy(processor)
        self.processor.image_processor = self  # which asks it for the sizes of images, and may go without pixels
        self.keys: list[str] = []  # of the prompt's images, in order
        self._new: dict[str, tuple[torch.Tensor, tuple[int, int]]] = {}  # pixels and size
        self._token_keys: list = []

    def __getattr__(self, name: str):
        return getattr(self._image_processor, name)

    def __call__(self, images, **kwargs) -> dict[str, list[tuple[int, int]]]:
        """`image_sizes` of all images; those not seen before are prepared as the image processor does it."""
        opened = _flat(self._image_processor.fetch_images(images))
        ways = (self._image_processor.image_sizing(), sorted(kwargs.items()))
        self.keys = [_key(image, ways) for image in opened]
        for key, image in zip(self.keys, opened, strict=True):
            if key not in self.prompt_cache.images and key not in self._new:
                prepared = self._image_processor(image, **{**kwargs, "return_tensors": "pt"})
                height, width = prepared["image_sizes"][0].tolist()
                self._new[key] = (prepared["pixel_values"], (height, width))
        return {
            "image_sizes": [
                self._new[key][1] if key in self._new else self.prompt_cache.images[key].size for key in self.keys
            ]
        }

    def left_to_compute(self, model: ConvLlavaForConditionalGeneration, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` takes: the prompt, the cache of its beginning, and visual tokens of images beyond it.

        Args:
            inputs: what the processor made of the prompt, (1, positions).
        """
        prompt_cache = self.prompt_cache
        for key in self.keys:
            if key in self._new:
                pixels, size = self._new.pop(key)
                pixels = pixels.to(model.device, model.dtype)
                features: Any = model.get_image_features(pixels)
                prompt_cache.images[key] = EncodedImage(size, features.pooler_output[0])
            prompt_cache.images.move_to_end(key)
        while len(prompt_cache.images) > max(_IMAGES, len(set(self.keys))):
            prompt_cache.images.popitem(last=False)

        self._token_keys = _token_keys_of(
            inputs["input_ids"][0].tolist(), model.config.image_token_id, self.keys, prompt_cache
        )
        # The last token's logits are needed, so it is always computed.
        kept = _common_beginning(prompt_cache._token_keys, self._token_keys[:-1])
        # The old cache is dropped first: a generation that is interrupted leaves the cache in an unknown state.
        cache, prompt_cache._cache = prompt_cache._cache, None
        self.reused = kept if cache is not None else 0
        left = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if cache is not None and self.reused:
            if len(prompt_cache._token_keys) > kept:
                cache.crop(kept - len(prompt_cache._token_keys))  # negative: the number of tokens to remove
            left[_CACHE] = cache
        passed = sum(isinstance(token_key, tuple) for token_key in self._token_keys[: self.reused])
        tokens = [prompt_cache.images[key].tokens for key in self.keys]
        if tokens and (beyond := torch.cat(tokens)[passed:]).numel():
            left["image_hidden_states"] = beyond
        return left

    def keep(self, output) -> None:
        """Keeps what `generate` returned, if it can be cropped to an earlier token later."""
        cache = getattr(output, _CACHE)
        if cache is None or not all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None])):
            return
        prompt = len(self._token_keys)
        token_keys = [*self._token_keys, *output.sequences[0, prompt:].tolist()]
        self.prompt_cache._cache, self.prompt_cache._token_keys = cache, token_keys[: cache.get_seq_length()]


def _token_keys_of(
    token_ids: Sequence[int], image_token_id: int, keys: Sequence[str], prompt_cache: PromptCache
) -> list:
    """What is at each position: a token's id, or for a visual token its image and its place in it."""
    visual = [(key, place) for key in keys for place in range(len(prompt_cache.images[key].tokens))]
    waiting = iter(visual)
    return [next(waiting, token) if token == image_token_id else token for token in token_ids]


def _common_beginning(one: Sequence, other: Sequence) -> int:
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def _flat(images) -> list:
    if isinstance(images, (list, tuple)):
        return [image for nested in images for image in _flat(nested)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _key(image, ways: tuple) -> str:
    """Identifies an image and how it is prepared, by everything that decides what the tower sees."""
    digest = hashlib.sha256(repr(ways).encode())
    if isinstance(image, Image.Image):
        facts = {name: value for name, value in image.info.items() if isinstance(value, (str, bytes, int, tuple))}
        palette = image.getpalette() if image.mode in ("P", "PA") else None
        digest.update(repr((image.mode, image.size, palette, sorted(facts.items(), key=str))).encode())
        digest.update(image.tobytes())
    else:
        if hasattr(image, "detach"):
            tensor = image.detach().cpu()
            image = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # which NumPy does not have
        array = np.ascontiguousarray(image)
        digest.update(repr((array.dtype, array.shape)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
