# SPDX-License-Identifier: Apache-2.0
"""From conversations and images to the model's inputs."""

import json
import os
import re
import threading

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin

from .configuration_convllava import set_in_package, visual_token_grid
from .image_processing_convllava import IMAGE_ARGUMENTS, ConvLlavaImagesKwargs

# transformers 4 copies only what the file of a class imports itself, not what those files import in turn.
from .image_utils_convllava import ImageError  # noqa: F401


IMAGE_TOKEN = "<image>"
# transformers' `sanitize_control_tokens` puts this character before a token that a user typed: it is text then.
_TYPED_BY_USER = "\U000f0000"
# Padding and truncation are settings of a fast tokenizer, which each call changes for all threads. One lock for all
# processors is enough, and it is no part of what is copied or pickled.
_TOKENIZING = threading.Lock()


class ConvLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: ConvLlavaImagesKwargs
    _defaults = {"text_kwargs": {"padding": False, "return_token_type_ids": False}}


class ConvLlavaProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: puts a placeholder into the text for every visual token of an image.

    Args:
        image_processor (`ConvLlavaImageProcessor`).
        tokenizer (`PreTrainedTokenizerFast`): knows `image_token` as a token of its own. Its padding side becomes
            left, which generating in batches needs; pass `padding_side="right"` to a call for training.
        chat_template (`str`, *optional*): Jinja template that writes `image_token` once for each image.
        image_token (`str`, defaults to `"<image>"`): where an image goes.
        image_suffix (`str`, defaults to `""`): put between an image's placeholders and ordinary text after them. A
            blank gives tokenizers made from SentencePiece (`legacy: false`) the dummy prefix that the original code
            produces by tokenizing the text after an image as a text of its own. Chat templates write it themselves,
            since servers such as vLLM replace placeholders in their own way. So in a prompt that a template wrote,
            which is one that begins with the token for the beginning of a sequence, it goes only where none follows.

    Raises:
        ValueError: the tokenizer does not know `image_token`.
    """

    valid_processor_kwargs = ConvLlavaProcessorKwargs
    if not hasattr(ProcessorMixin, "get_attributes"):  # transformers 4 reads these, 5 reads the signature of __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        image_suffix: str = "",
    ):
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer does not know {image_token!r}, the place of an image: add it with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})."
            )
        self.image_suffix = image_suffix
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.tokenizer.padding_side = "left"
        # `from_pretrained` hands all it is given to the tokenizer as well, whose arguments are those of every call.
        for name in IMAGE_ARGUMENTS:
            self.tokenizer.init_kwargs.pop(name, None)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        """
        Args:
            images: one image or a (nested) list in the order of the placeholders; see `ConvLlavaImageProcessor`.
            text: one prompt or a list, with one `<image>` for each image. One that begins with the token for the
                beginning of a sequence, as chat templates write it, gets no second one.
            return_mm_token_type_ids (`bool`): also return `mm_token_type_ids`, 1 where a placeholder is, else 0.
            return_text_replacement_offsets (`bool`): also return what each `<image>` was replaced by and where, and
                let `offset_mapping` refer to the text after it; otherwise it refers to `text` as passed.
            **kwargs: of the tokenizer and of `ConvLlavaImageProcessor`; `text_kwargs`, `images_kwargs` as dicts.

        Returns:
            `input_ids`, `attention_mask` (batch, positions); for images `pixel_values` (N, 3, H, W), `image_sizes`
            (N, 2).

        Raises:
            ValueError: the numbers of images and of `<image>` differ, or truncation would cut an image.
        """
        if videos is not None or audio is not None:
            raise ValueError("ConvLLaVA sees images and reads text; it takes neither videos nor audio.")
        if images is None and text is None:
            raise ValueError("Pass text, images or both.")
        if kwargs.get("return_overflowing_tokens"):
            raise ValueError("return_overflowing_tokens would part texts from their images: leave it out.")
        # transformers 4 takes out of the caller's own dicts what it finds in them.
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        return_types = _pop(kwargs, "return_mm_token_type_ids")
        return_replacements = _pop(kwargs, "return_text_replacement_offsets")
        merged = self._merge_kwargs(
            ConvLlavaProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        # 5.23 keeps them in the text's arguments too, whether asked for or not.
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):
            text_kwargs.pop(name, None)
        return_tensors = text_kwargs.pop("return_tensors", None)
        images_kwargs.pop("return_tensors", None)

        texts = _as_texts(text)
        if texts is not None:
            self._check_image_count(texts, images)
        data = {}
        replacements = []
        if images is not None and _count(images):
            data = dict(self.image_processor(images, **images_kwargs))
            replacements = [self.replace_image_token(data, index) for index in range(len(data["image_sizes"]))]
        if texts is not None:
            expanded, spans = self.get_text_with_replacements(texts, replacements)
            with _TOKENIZING:
                encoding = self._tokenize(expanded, text_kwargs)
                self._check_truncation(expanded, encoding["input_ids"], text_kwargs)
            if return_types:
                encoding["mm_token_type_ids"] = self.create_mm_token_type_ids(encoding["input_ids"])
            if return_replacements:
                encoding["text_replacement_offsets"] = spans
            elif "offset_mapping" in encoding:
                encoding["offset_mapping"] = [
                    _offsets_before_replacement(offsets, row, len(original))
                    for offsets, row, original in zip(encoding["offset_mapping"], spans, texts, strict=True)
                ]
            data = {**encoding, **data}
        # Whoever wants to know what was replaced goes through the offsets one by one (transformers, for the mask of
        # what the assistant says), and elements of a tensor come many times slower than those of a list.
        walked = ("text_replacement_offsets", "offset_mapping") if return_replacements else ()
        lists = {name: data.pop(name) for name in walked if name in data}
        features = BatchFeature(data, tensor_type=return_tensors)
        features.update(lists)
        return features

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As in transformers; a message's content may be a string or hold `image_url` parts, also on 4.x."""
        if isinstance(conversation, (list, tuple)) and conversation:
            if isinstance(conversation[0], dict):
                conversation = _with_content_parts(conversation)
            elif isinstance(conversation[0], (list, tuple)):
                conversation = [_with_content_parts(messages) for messages in conversation]
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers; what is written can be read by both of its majors, whichever wrote it."""
        files = super().save_pretrained(save_directory, **kwargs)
        # transformers 4 looks for the image processor in preprocessor_config.json.
        self.image_processor.save_pretrained(save_directory)
        _complete_tokenizer_config(os.path.join(save_directory, "tokenizer_config.json"))
        if push_to_hub:
            repository = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repository, **kwargs)
        return files

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    @property
    def image_token_ids(self) -> list[int]:
        return [self.image_token_id]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image, one for each visual token."""
        height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        rows, columns = visual_token_grid(height, width, self.image_processor.stride)
        return self.image_token * (rows * columns)

    def get_text_with_replacements(self, text: list[str], images_replacements=(), *args, **kwargs):
        """Replaces each `<image>` by its image's placeholders and what must follow them.

        Returns:
            The new texts, and for each text a list of dicts: `type`, `text` and its `span` of characters before,
            `replacement` and its `new_span` after.
        """
        if not images_replacements:
            return list(text), [[] for _ in text]
        remaining = iter(images_replacements)
        expanded, spans = [], []
        for sample in text:
            pieces, row, last, length = [], [], 0, 0
            rendered = self._may_be_rendered(sample)
            for match in self._placeholder.finditer(sample):
                start, end = match.span()
                replacement = next(remaining) + self._suffix(sample[end:], rendered)
                pieces += [sample[last:start], replacement]
                length += start - last
                row.append(
                    {
                        "type": "image",
                        "span": (start, end),
                        "new_span": (length, length + len(replacement)),
                        "text": self.image_token,
                        "replacement": replacement,
                    }
                )
                length += len(replacement)
                last = end
            expanded.append("".join([*pieces, sample[last:]]))
            spans.append(row)
        return expanded, spans

    def create_mm_token_type_ids(self, input_ids) -> list[list[int]]:
        """1 where an image's placeholder is, 0 elsewhere, in the shape of `input_ids`."""
        return [[int(token == self.image_token_id) for token in row] for row in input_ids]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Visual tokens of images of these sizes, (height, width) in pixels, before anything is preprocessed."""
        if image_sizes is None:
            return MultiModalData()
        kwargs = {**kwargs, **kwargs.pop("images_kwargs", {})}
        counts = []
        for height, width in image_sizes:
            seen = self.image_processor.get_image_size(height, width, **kwargs)
            rows, columns = visual_token_grid(*seen, self.image_processor.stride)
            counts.append(rows * columns)
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def _tokenize(self, texts: list[str], text_kwargs: dict) -> dict:
        """The tokenizer's output as lists, with one token for the beginning of a sequence where there is any."""
        adds = text_kwargs.get("add_special_tokens", True)
        added = [bool(adds) and not self._begins_sequence(text) for text in texts]
        if len(set(added)) == 1:
            return dict(self.tokenizer(texts, **{**text_kwargs, "add_special_tokens": added[0]}))
        return self._tokenize_each(texts, added, text_kwargs)

    def _tokenize_each(self, texts: list[str], added: list[bool], text_kwargs: dict) -> dict:
        """As `_tokenize`, for texts of which only some are given special tokens."""
        unpadded = {**text_kwargs, "padding": False, "pad_to_multiple_of": None}
        rows = [
            self.tokenizer(text, **{**unpadded, "add_special_tokens": special})
            for text, special in zip(texts, added, strict=True)
        ]
        encoding = {name: [row[name] for row in rows] for name in rows[0]}
        names = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
        padding = {name: text_kwargs[name] for name in names if text_kwargs.get(name) is not None}
        # By hand, since `pad` of a tokenizer leaves offsets as they are.
        lengths = [len(row) for row in encoding["input_ids"]]
        padded = self.tokenizer.pad({"input_ids": encoding["input_ids"]}, return_attention_mask=False, **padding)
        missing = [len(row) - length for row, length in zip(padded["input_ids"], lengths, strict=True)]
        left = padding.get("padding_side", self.tokenizer.padding_side) == "left"
        fillers = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "special_tokens_mask": 1,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "offset_mapping": (0, 0),
        }
        for name, filler in fillers.items():
            if name in encoding:
                encoding[name] = [
                    [filler] * count + row if left else row + [filler] * count
                    for row, count in zip(encoding[name], missing, strict=True)
                ]
        if "length" in encoding:
            encoding["length"] = [len(row) for row in encoding["input_ids"]]
        return encoding

    def _begins_sequence(self, text: str) -> bool:
        return bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)

    @property
    def _placeholder(self) -> re.Pattern:
        return re.compile(f"(?<!{_TYPED_BY_USER}){re.escape(self.image_token)}")

    def _may_be_rendered(self, text: str) -> bool:
        """Whether the chat template may have written the text, and so the suffixes in it: not if it begins a sequence
        and the text does not."""
        bos_token, template = self.tokenizer.bos_token, str(self.chat_template or "")
        if not template:
            return False
        begins = bool(bos_token) and (bos_token in template or "bos_token" in template)
        return self._begins_sequence(text) or not begins

    def _suffix(self, following: str, rendered: bool) -> str:
        """What goes between an image and `following`: nothing before the end, before another special token, and where
        the template wrote it."""
        done = (self.image_token, *self.tokenizer.all_special_tokens, *([self.image_suffix] if rendered else []))
        return "" if not following or following.startswith(done) else self.image_suffix

    def _check_image_count(self, texts: list[str], images) -> None:
        places = [len(self._placeholder.findall(text)) for text in texts]
        nested = isinstance(images, (list, tuple)) and any(isinstance(image, (list, tuple)) for image in images)
        if nested and len(images) == len(texts):
            for index, (expected, given) in enumerate(zip(places, images, strict=True)):
                if expected != _count(given):
                    raise ValueError(
                        f"Prompt {index} has {expected} {self.image_token} but {_count(given)} images. Write one "
                        f"{self.image_token} for each image."
                    )
        elif sum(places) != _count(images):
            raise ValueError(
                f"The text has {sum(places)} {self.image_token} but {_count(images)} images were passed. Write one "
                f"{self.image_token} for each image."
            )

    def _check_truncation(self, expanded: list[str], input_ids, text_kwargs: dict) -> None:
        for index, (sample, row) in enumerate(zip(expanded, input_ids, strict=True)):
            needed = len(self._placeholder.findall(sample))
            kept = sum(token == self.image_token_id for token in row)
            if kept != needed:
                whole = {"add_special_tokens": text_kwargs.get("add_special_tokens", True)}
                total = len(self._tokenize([sample], whole)["input_ids"][0])
                limit = text_kwargs.get("max_length") or self.tokenizer.model_max_length
                raise ValueError(
                    f"Prompt {index} is {total} tokens long, {needed} of them visual tokens, and truncation to "
                    f"{limit} tokens would keep only {kept} visual tokens. Raise max_length, use smaller or fewer "
                    "images, or turn truncation off; only text can be cut."
                )


def _complete_tokenizer_config(path: str) -> None:
    """Makes a saved tokenizer's configuration what both majors of transformers read alike.

    Names that only transformers 5 knows become those of 4, which 5 still reads. The padding side that generating needs
    is written, which transformers leaves out unless the tokenizer was loaded with it.
    """
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["padding_side"] = "left"
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _pop(kwargs: dict, name: str):
    """A processor's own argument, given directly or among the tokenizer's."""
    nested = kwargs.get("text_kwargs") or {}
    if name in nested:
        kwargs["text_kwargs"] = {key: value for key, value in nested.items() if key != name}
    return kwargs.pop(name, nested.get(name, False))


def _as_texts(text) -> list[str] | None:
    if text is None or isinstance(text, str):
        return text if text is None else [text]
    if not isinstance(text, (list, tuple)) or not text or not all(isinstance(sample, str) for sample in text):
        raise ValueError(f"text must be a string or a list of strings with at least one, not {text!r:.100}.")
    return list(text)


def _count(images) -> int:
    """Images in an image, a batch array, a (nested) list or nothing."""
    if images is None:
        return 0
    if isinstance(images, (list, tuple)):
        return sum(_count(image) for image in images)
    return len(images) if getattr(images, "ndim", 0) == 4 else 1


def _with_content_parts(messages: list[dict]) -> list[dict]:
    """Messages whose content is a list of `text` and `image` parts, whatever way it was written."""
    normalized = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        elif isinstance(content, (list, tuple)):
            content = [_as_image_part(part) for part in content]
        normalized.append({**message, "content": content or []})
    return normalized


def _as_image_part(part: dict) -> dict:
    if part.get("type") != "image_url" or "image_url" not in part:
        return part
    url = part["image_url"]
    return {"type": "image", "url": url["url"] if isinstance(url, dict) else url}


def _offsets_before_replacement(offsets, replacements: list[dict], length: int) -> list[tuple[int, int]]:
    """Character offsets in a text of `length` characters, from those in the text after its replacements.

    A token of a replacement gets the span of what was replaced; padding on the right stands behind the text, so that
    the offsets never fall.
    """
    mapped = []
    for start, end in offsets:
        if start == end == 0 and mapped and mapped[-1][1] > 0:
            mapped.append((length, length))
            continue
        for replacement in reversed(replacements):
            (old_start, old_end), (new_start, new_end) = replacement["span"], replacement["new_span"]
            if start >= new_end:
                start, end = start - new_end + old_end, end - new_end + old_end
                break
            if start >= new_start:
                start, end = old_start, max(old_end, end - new_end + old_end)
                break
        mapped.append((start, end))
    return mapped


set_in_package(__name__)
