# SPDX-License-Identifier: Apache-2.0
"""ConvLLaVA's configuration, and the one place where strides, sizes and visual tokens are computed."""

import importlib
import math
import sys
from dataclasses import dataclass

import transformers
from transformers import AutoConfig, ConvNextConfig, PretrainedConfig
from transformers.models.auto import modeling_auto


_TRANSFORMERS_4 = transformers.__version__.startswith("4.")

# ConvNeXt-L with the paper's fifth stage (arXiv 2405.15738, section 3.3): output stride 64, 669 M parameters.
_DEFAULT_VISION = {
    "depths": [3, 3, 27, 3, 6],
    "hidden_sizes": [192, 384, 768, 1536, 3072],
    "image_size": 1536,
}
# How an image comes to the tower's shape; `ImageSizing` says what each does.
IMAGE_ASPECT_RATIOS = ("pad", "native", "shortest_edge")
# Native images for people who do not count pixels: the most that are seen, the area of 512, 768, 1024, 1536 and 3072
# squared. At stride 64 these are 64, 144, 256, 576 and 2304 visual tokens; the last shows a page of A4 at 300 dots an
# inch and a screen of 3840 x 2160 as they are.
PRESETS = {"tiny": 512**2, "small": 768**2, "base": 1024**2, "large": 1536**2, "full": 3072**2}
# ConvNeXt's resolution at pretraining: smaller images are enlarged to its area, where nobody says another.
_LEAST_PIXELS = 256**2
# Where the short side is fixed, the area is that of a ratio of 1:8 at most, unless somebody says another.
_LONGEST_RATIO = 8
# Vicuna's 32000 tokens and the image's placeholder, padded to a multiple of 64.
_DEFAULT_IMAGE_TOKEN_ID = 32000
_DEFAULT_VOCAB_SIZE = 32064


def tower_stride(vision_config) -> int:
    """Side in pixels of the square that one visual token stands for.

    ConvNeXt's stem divides the side by `patch_size`, every stage after the first by 2 (arXiv 2405.15738, section 3.3:
    four stages give 32, five give 64).
    """
    return vision_config.patch_size * 2 ** (len(vision_config.hidden_sizes) - 1)


def visual_token_grid(height: int, width: int, stride: int) -> tuple[int, int]:
    """Rows and columns of visual tokens of an image of `height` x `width` pixels.

    Raises:
        ValueError: a side is not a positive multiple of `stride`; the tower would drop the pixels left over.
    """
    if height <= 0 or width <= 0 or height % stride or width % stride:
        nearest = [max(1, round(side / stride)) * stride for side in (height, width)]
        raise ValueError(
            f"An image of {height} x {width} pixels (height x width) cannot be divided into visual tokens: both "
            f"sides must be positive multiples of the vision tower's stride of {stride} pixels. The nearest such "
            f"size is {nearest[0]} x {nearest[1]}."
        )
    return height // stride, width // stride


@dataclass(frozen=True)
class ImageSizing:
    """How large images come to the vision tower, and how many visual tokens they have there.

    Args:
        mode: `"pad"`: a square of `size`, whatever the image. `"native"`: the image's own size as long as its area
            is within the bounds, else enlarged or made smaller to them; each side the nearest multiple of the stride,
            and one stride at least. `"shortest_edge"`: the shorter side is `size`, the longer one the nearest multiple
            of the stride; the paper's protocol for table 7 (arXiv 2405.15738).
        size: side in pixels.
        stride: side in pixels of the square that one visual token stands for.
        min_pixels: of native images (height times width as the tower sees them). Default: 256 x 256, or a quarter of
            `max_pixels` if that is less.
        max_pixels: of native images; default: `size` squared. With `"shortest_edge"`, larger images are made
            smaller; default: 8 times `size` squared, a ratio of 1:8.

    Native images keep their ratio within half a stride: at some scale of the image, both sides are that near, but
    for a side shorter than half a stride. Both bounds hold wherever `max_pixels` is four times `min_pixels` or more;
    nearer ones may have no such size between them, and then `max_pixels` holds.

    Raises:
        ValueError: an unknown mode, a size that the stride does not divide, bounds that no image could meet.
    """

    mode: str
    size: int
    stride: int
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self):
        if self.mode not in IMAGE_ASPECT_RATIOS:
            raise ValueError(f"image_aspect_ratio is {self.mode!r}, expected one of {', '.join(IMAGE_ASPECT_RATIOS)}.")
        visual_token_grid(self.size, self.size, self.stride)
        for name, refused in (("min_pixels", self.mode != "native"), ("max_pixels", self.mode == "pad")):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive number of pixels (height times width).")
            if refused:
                raise ValueError(
                    f"{name}={value} has no meaning with image_aspect_ratio={self.mode!r}: pass "
                    "image_aspect_ratio='native' as well, or size instead."
                )
        if self.most_pixels < self.stride**2:
            raise ValueError(
                f"max_pixels={self.max_pixels} is less than one visual token, {self.stride} x {self.stride} pixels. "
                f"Pass at least {self.stride**2}."
            )
        if self.least_pixels > self.most_pixels:
            raise ValueError(
                f"min_pixels={self.least_pixels} is more than max_pixels={self.most_pixels}: lower the one or raise "
                "the other."
            )

    @property
    def most_pixels(self) -> int:
        """Height times width that the tower sees at most."""
        ratio = _LONGEST_RATIO if self.mode == "shortest_edge" else 1
        return self.max_pixels or ratio * self.size**2

    @property
    def least_pixels(self) -> int:
        """Height times width that the tower sees at least."""
        return self.min_pixels or (min(_LEAST_PIXELS, self.most_pixels // 4) if self.mode == "native" else 1)

    @property
    def most_tokens(self) -> int:
        """Visual tokens of an image at most."""
        return self.most_pixels // self.stride**2

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that the tower sees of an image of `height` x `width` pixels."""
        if self.mode == "pad":
            return self.size, self.size
        if height < 1 or width < 1:
            raise ValueError(f"An image of {height} x {width} pixels (height x width) has nothing to see.")
        if self.mode == "native":
            rows, columns = (max(1, (2 * side + self.stride) // (2 * self.stride)) for side in (height, width))
            rows, columns = self._enlarged(rows, columns, height, width)
        else:
            short, scale = min(height, width), self.size // self.stride
            rows, columns = ((2 * side * scale + short) // (2 * short) for side in (height, width))
        rows, columns = self._reduced(rows, columns, height, width)
        return rows * self.stride, columns * self.stride

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of an image of `height` x `width` pixels."""
        return math.prod(visual_token_grid(*self.seen(height, width), self.stride))

    def _enlarged(self, rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
        """The grid of the smallest image of this ratio that is enough, `rows` x `columns` or larger."""
        enough = -(-self.least_pixels // self.stride**2)
        if rows * columns >= enough:
            return rows, columns
        area = self._grid_of(self.least_pixels, height, width)
        rows, columns = max(rows, area[0]), max(columns, area[1])
        while rows * columns < enough:
            # Of an image that grows, a side of n tokens has n + 1 once it comes to n + 1/2 strides; of sides that
            # come there together, the longer one is first, and those of a square stay together.
            of_rows, of_columns = ((2 * rows + 1) * width, -height), ((2 * columns + 1) * height, -width)
            rows, columns = rows + (of_rows <= of_columns), columns + (of_columns <= of_rows)
        return rows, columns

    def _reduced(self, rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
        """The grid of the largest image of this ratio that is not too much, `rows` x `columns` or smaller."""
        most = self.most_tokens
        if rows * columns <= most:
            return rows, columns
        area = self._grid_of(self.most_pixels, height, width)
        rows, columns = min(rows, area[0], most), min(columns, area[1], most)
        while rows * columns > most:
            # Of an image that shrinks, a side of n tokens has n - 1 once it falls below n - 1/2 strides.
            of_rows = ((2 * rows - 1) * width if rows > 1 else 0, height)
            of_columns = ((2 * columns - 1) * height if columns > 1 else 0, width)
            rows, columns = rows - (of_rows >= of_columns), columns - (of_columns >= of_rows)
        return rows, columns

    def _grid_of(self, pixels: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of an image of this ratio and that area, each to the nearest, in whole numbers alone."""
        rows, columns = (
            max(1, (math.isqrt(4 * pixels * side // (other * self.stride**2)) + 1) // 2)
            for side, other in ((height, width), (width, height))
        )
        return rows, columns


class ConvLlavaConfig(PretrainedConfig):
    """Configuration of a ConvLLaVA: a ConvNeXt vision tower, a projector and a causal language model.

    Args:
        vision_config (`ConvNextConfig` or `dict`, *optional*): the tower, with any number of stages. Its `image_size`
            is the side in pixels of the images that the model was trained with. Default: ConvNeXt-L with a fifth
            stage at 1536 pixels.
        text_config (`PretrainedConfig` or `dict`, *optional*): any causal language model of transformers; a dict is
            read by its `model_type`, `llama` when it names none. Default: the shape of Vicuna-7B v1.5.
        image_token_id (`int`, defaults to 32000): the token that holds a visual token's place in `input_ids`.
        projector_hidden_act (`str`, defaults to `"gelu"`): activation between the projector's two linear layers.
        tie_word_embeddings (`bool`, *optional*): whether the language model's head is its embedding matrix. Default:
            what `text_config` says.

    Raises:
        ValueError: a model with this configuration could not work; the message names the value and the remedy.
    """

    model_type = "convllava"
    sub_configs = {"vision_config": ConvNextConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        image_token_id: int = _DEFAULT_IMAGE_TOKEN_ID,
        projector_hidden_act: str = "gelu",
        tie_word_embeddings: bool | None = None,
        **kwargs,
    ):
        self.vision_config = _as_vision_config(vision_config)
        self.text_config = _as_text_config(text_config)
        self.image_token_id = image_token_id
        self.projector_hidden_act = projector_hidden_act
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.text_config.tie_word_embeddings = tie_word_embeddings
        self._check()
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def stride(self) -> int:
        """Side in pixels of the square that one visual token stands for."""
        return tower_stride(self.vision_config)

    def num_visual_tokens(self, height: int, width: int) -> int:
        """Visual tokens of an image of `height` x `width` pixels; `ValueError` if the stride does not divide them."""
        rows, columns = visual_token_grid(height, width, self.stride)
        return rows * columns

    def _check(self) -> None:
        vision = self.vision_config
        if vision.model_type != "convnext":
            raise ValueError(
                f"vision_config is of the model type {vision.model_type!r}, but ConvLLaVA's vision tower is a "
                "ConvNeXt: pass a ConvNextConfig."
            )
        lengths = {
            "num_stages": vision.num_stages,
            "depths": len(vision.depths),
            "hidden_sizes": len(vision.hidden_sizes),
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"vision_config speaks of different numbers of stages: num_stages={vision.num_stages}, "
                f"depths={list(vision.depths)}, hidden_sizes={list(vision.hidden_sizes)}. Give one depth and one "
                "hidden size for each stage, and their number as num_stages."
            )
        try:
            visual_token_grid(vision.image_size, vision.image_size, self.stride)
        except ValueError as error:
            raise ValueError(f"vision_config.image_size does not fit the tower. {error}") from None
        if getattr(self.text_config, "num_attention_heads", None) is None:
            raise ValueError(
                f"text_config is of the model type {self.text_config.model_type!r}, which has no attention heads: "
                "choose a language model with attention."
            )
        vocab_size = self.text_config.vocab_size
        if not isinstance(self.image_token_id, int) or not 0 <= self.image_token_id < vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id!r}, outside the language model's vocabulary of {vocab_size} "
                "tokens. Add the image's placeholder to the tokenizer, set text_config.vocab_size to cover it, and "
                "pass its id."
            )


def _as_vision_config(config):
    if config is None:
        config = _DEFAULT_VISION
    if isinstance(config, dict):
        if config.get("model_type", "convnext") != "convnext":
            return AutoConfig.for_model(**config)  # refused by ConvLlavaConfig, which names the type
        config = {key: value for key, value in config.items() if key != "model_type"}
        config.setdefault("num_stages", len(config.get("hidden_sizes", config.get("depths", [0] * 4))))
        config = ConvNextConfig(**config)
    return config


def set_in_package(name: str) -> None:
    """Sets the module of this name, and those beside it, as attributes of their package, as importing them does.

    transformers leaves that out for a checkpoint's code, which it loads by file. dill, with which `datasets` sends
    objects to other processes, looks there, and takes classes that it does not find apart; it cannot put those for
    typed arguments (`TypedDict`) together again.
    """
    package = name.rpartition(".")[0]
    try:
        importlib.import_module(package or name)
    except ImportError:
        return  # loaded from its file, under a name that leads nowhere
    for other, module in list(sys.modules.items()):
        parent, _, child = other.rpartition(".")
        if parent == package and parent in sys.modules:
            setattr(sys.modules[parent], child, module)


def _as_text_config(config):
    if config is None:
        config = {"vocab_size": _DEFAULT_VOCAB_SIZE}
    if isinstance(config, dict):
        config = {"model_type": "llama", **config}
        if "rope_parameters" in config and _TRANSFORMERS_4:
            config = _with_rope_of_transformers_4(config)
        config = AutoConfig.for_model(**config)
    return config


def _with_rope_of_transformers_4(config: dict) -> dict:
    """transformers 5 writes `rope_parameters`, of which 4 would silently take no notice: the same under 4's names."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"text_config.rope_parameters differs between layer types ({', '.join(rope)}), which transformers "
            f"{transformers.__version__} cannot be told of a {config['model_type']}: install transformers 5."
        )
    config.update({name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope})
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    return config


# `transformers serve` finds a model's class by name in transformers' own table of multimodal models, which
# transformers 4 does not have. The entry lets it take the class that this checkpoint's `auto_map` names.
if hasattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("convllava", "ConvLlavaForConditionalGeneration")

set_in_package(__name__)
