"""A model and its processor, loaded and asked: `load`, and the `Assistant` that it returns."""

import inspect
import math
import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.processing_utils import ProcessorMixin

from ..errors import ConvLlavaError, first_line
from ..modeling.modeling_convllava import ConvLlavaForConditionalGeneration
from ..modeling.processing_convllava import ConvLlavaProcessor
from ..options import with_image_options
from ..utils.device_memory import explain_out_of_memory
from .checkpoint_errors import check_generation_config, wrap_checkpoint_errors
from .loading import (
    ORIGINAL,
    check_checkpoint,
    choose_device,
    choose_dtype,
    kind_of_checkpoint,
    load_processor,
    quantization_config,
)
from .messages import user_turn
from .prompt_cache import CachedPrompt, PromptCache
from .trust import from_checkpoint, pickled_code
from .vision_backends import choose_vision_backend, has_unmodified_linears, optimize_vision_tower


# transformers 5 takes the processor's arguments in a separate dict, and warns about others; 4 has no such dict.
_PROCESSOR_KWARGS = "processor_kwargs" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
# Remedies where a device's memory does not suffice.
SMALLER_MODEL = (
    "Load the language model in 4 bits (--quantization 4bit), or in a dtype of two bytes (--dtype bfloat16), or close "
    "other programs that use the device."
)
LESS_MEMORY = (
    "Load the language model in 4 bits (--quantization 4bit), let images be smaller (--size or --preset), or ask "
    "about fewer of them."
)


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it cost.

    `text`: the answer without special tokens. `token_ids`: the generated ids, special tokens included.
    `visual_tokens` are counted in `prompt_tokens`, and so are `reused_tokens`, whose keys and values an earlier turn
    left (see `Assistant.with_prompt_cache`). `first_token_seconds` and `seconds` count from the call, so they
    include the work on the images and the prompt, and not the loading of the model.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    visual_tokens: int
    first_token_seconds: float
    seconds: float
    reused_tokens: int = 0


@dataclass(frozen=True)
class Assistant:
    """A model and its processor, ready to be asked."""

    model: ConvLlavaForConditionalGeneration
    processor: ConvLlavaProcessor
    prompt_cache: PromptCache | None = None

    def with_prompt_cache(self) -> "Assistant":
        """The same assistant with a prompt cache: it encodes no image twice and continues where the last turn ended.

        Its answers are the same. It keeps memory on its device between calls, and takes one call at a time.
        """
        return replace(self, prompt_cache=PromptCache())

    def with_image_options(self, **image_options: Any) -> "Assistant":
        """The same model, which sees images as these arguments of `ConvLlavaImageProcessor` say: `size=768`, say.

        Raises:
            ConvLlavaError: they do not go together, or with the tower.
        """
        return replace(self, processor=with_image_options(self.processor, image_options))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.inference_mode()
    def answer(
        self,
        messages: list[dict[str, Any]],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **generation: Any,
    ) -> Answer:
        """Answers the last question of a conversation.

        Args:
            messages: the conversation as chat templates take it; `system_turn`, `user_turn` and `assistant_turn` make
                its entries.
            max_new_tokens: the answer ends there if the model has not ended it before.
            temperature: 0 always takes the likeliest token; above 0, tokens are sampled.
            on_text: called with each piece of text as it is generated, in this thread; an exception that it raises
                ends the generation and reaches the caller.
            should_stop: called after every token, in this thread; once it returns `True`, the answer ends there.
            **generation: further arguments of transformers' `generate`, such as `top_p`.

        Raises:
            ConvLlavaError: an image cannot be read or prepared, or the conversation leaves no room for an answer in
                the model's context.
        """
        start = time.perf_counter()
        cached_prompt = None if self.prompt_cache is None else CachedPrompt(self.prompt_cache, self.processor)
        processor = self.processor if cached_prompt is None else cached_prompt.processor
        inputs = self._inputs(processor, messages)
        prompt_tokens = inputs["input_ids"].shape[1]
        room = self._room_for_answer(prompt_tokens)
        stream = _AnswerStream(self.processor.tokenizer, on_text)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else GREEDY
        sampling = {**sampling, **generation}
        try:
            what = f"this conversation of {prompt_tokens} tokens beside the model in {self.dtype}"
            with explain_out_of_memory(what, self.device, LESS_MEMORY):
                output = self.model.generate(
                    **(inputs if cached_prompt is None else cached_prompt.left_to_compute(self.model, inputs)),
                    **sampling,
                    num_beams=1,
                    max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
                    streamer=stream,
                    return_dict_in_generate=True,
                    stopping_criteria=StoppingCriteriaList([] if should_stop is None else [_Stop(should_stop)]),
                )
        except ConvLlavaError:
            if self.prompt_cache is not None:
                self.prompt_cache.forget()
            raise
        if cached_prompt is not None:
            cached_prompt.keep(output)
        token_ids = output.sequences[0, prompt_tokens:].tolist()
        return Answer(
            text=stream.text,
            token_ids=token_ids,
            prompt_tokens=prompt_tokens,
            visual_tokens=int((inputs["input_ids"] == self.model.config.image_token_id).sum()),
            first_token_seconds=stream.first_token_time - start,
            seconds=time.perf_counter() - start,
            reused_tokens=0 if cached_prompt is None else cached_prompt.reused,
        )

    def _inputs(self, processor: ConvLlavaProcessor, messages: list[dict[str, Any]]):
        try:
            inputs = prompt_inputs(processor, [messages])
        except (OSError, ValueError) as error:  # by kind: a processor from a checkpoint has another ImageError class
            raise ConvLlavaError(first_line(error)) from error
        with explain_out_of_memory("the images of this conversation", self.device, LESS_MEMORY):
            return inputs.to(self.device, self.dtype)

    @property
    def context(self) -> int | None:
        """Tokens of a prompt and its answer together at most; `None` where the language model's config names none."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _room_for_answer(self, prompt_tokens: int) -> int | None:
        """Tokens left for the answer; `None` where there is no limit."""
        if (context := self.context) is None:
            return None
        if prompt_tokens >= context:
            raise ConvLlavaError(
                f"The conversation has {prompt_tokens} tokens, and the model's context holds {context}, the answer "
                "included. Start a new conversation, or ask about fewer images."
            )
        return context - prompt_tokens


def prompt_inputs(
    processor: ConvLlavaProcessor,
    conversations: list[list[dict[str, Any]]],
) -> Any:
    """The model's inputs for a batch of conversations that are to be answered, padded on the left.

    Raises:
        ValueError, OSError: an image cannot be decoded, or the numbers of images and their places differ.
    """
    of_processor: dict[str, Any] = {"padding": True}
    if _PROCESSOR_KWARGS:
        of_processor = {"processor_kwargs": of_processor}
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **of_processor,
    )


# Explicit, so that sampling in a checkpoint's generation_config.json neither applies nor causes a warning.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class _Stop(StoppingCriteria):
    """Ends the generation after the token at which the caller says so."""

    def __init__(self, should_stop: Callable[[], bool]):
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        stops = torch.full((input_ids.shape[0],), self.should_stop(), dtype=torch.bool, device=input_ids.device)
        return cast(torch.BoolTensor, stops)


class _AnswerStream(BaseStreamer):
    """Turns tokens into text as they come, and passes each piece on.

    The text of a token depends on its neighbors (SentencePiece's blanks, characters of several byte tokens), so new
    tokens are decoded together with those of the piece before, and text that ends within a character waits for the
    rest. `TextStreamer` of transformers holds text back to the next blank, and loses the blanks that begin a line.
    """

    def __init__(self, tokenizer, on_text: Callable[[str], None] | None):
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.first_token_time = math.nan
        self.text = ""
        self._previous: list[int] = []  # tokens of the piece that was handed on last
        self._new: list[int] = []
        self._prompt_passed = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_passed:  # generate() sends the prompt first
            self._prompt_passed = True
            return
        if math.isnan(self.first_token_time):
            self.first_token_time = time.perf_counter()
        self._new.extend(value.flatten().tolist())
        self._hand_on(self._undecoded())

    def end(self) -> None:
        self._hand_on(self._undecoded(), at_the_end=True)

    def _undecoded(self) -> str:
        return self._decode(self._previous + self._new)[len(self._decode(self._previous)) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _hand_on(self, piece: str, at_the_end: bool = False) -> None:
        if not piece or (piece.endswith("\N{REPLACEMENT CHARACTER}") and not at_the_end):
            return
        self._previous, self._new = self._new, []
        self.text += piece
        if self.on_text is not None:
            self.on_text(piece)


def load(
    source: str | os.PathLike,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    vision_backend: str | None = None,
    trust_remote_code: bool = False,
    image_options: Mapping[str, Any] | None = None,
) -> Assistant:
    """Load a ConvLLaVA checkpoint for inference.

    Args:
        source: folder of a checkpoint, or its id on the Hub. One of the original code is converted once into a cache
            (see `convert.cache`) and taken from there afterwards.
        device: default: CUDA, else Apple's GPU, else the CPU.
        dtype: a torch dtype or its name; default: what `loading.choose_dtype` says of the device.
        quantization: `"4bit"` (NF4) or `"8bit"`, by bitsandbytes; the tower and the projector stay in `dtype`.
        vision_backend: how the vision tower runs, one of `vision_backends.VISION_BACKENDS`; default: what
            `choose_vision_backend` says.
        trust_remote_code: whether Python code that comes with the checkpoint may run where it names classes that are
            not this package's. It can do anything that you can.
        image_options: how large the model sees images, where not as the checkpoint says: arguments of
            `ConvLlavaImageProcessor`, such as `{"preset": "large"}`; see `options.ImageOptions`.

    Raises:
        ConvLlavaError: `source` is not a ConvLLaVA checkpoint, is incomplete or damaged, the device or the
            quantization asked for is not there, or the image options do not go together.
    """
    kind = kind_of_checkpoint(source, trust_remote_code=trust_remote_code)
    device = choose_device(device)
    dtype = choose_dtype(device, dtype)
    chosen = choose_vision_backend(device, dtype, vision_backend)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    if kind == ORIGINAL:
        source = _converted(source)
    processor = load_processor(source, trust_remote_code=trust_remote_code, image_options=image_options)
    with wrap_checkpoint_errors(source):
        # A question shows whether template and image processor work, before the weights are read.
        prompt_inputs(processor, [[user_turn("?", [Image.new("RGB", (64, 64))])]])
    try:
        with explain_out_of_memory(f"the model in {dtype}", device, SMALLER_MODEL), wrap_checkpoint_errors(source):
            model, info = from_checkpoint(
                ConvLlavaForConditionalGeneration,
                AutoModelForImageTextToText,
                source,
                trust_remote_code=trust_remote_code,
                **options,
            )
    except pickle.UnpicklingError as error:
        raise ConvLlavaError(pickled_code(source)) from error
    except ImportError as error:
        raise ConvLlavaError(f"Cannot load the checkpoint {os.fspath(source)!r}: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ConvLlavaError(
            f"The checkpoint {os.fspath(source)!r} lacks {len(missing)} of the model's tensors, the first of them "
            f"{missing[0]}: its files are incomplete, or its config.json is another model's."
        )
    check_generation_config(model.generation_config, model.get_input_embeddings().weight.shape[0], source)
    if vision_backend is not None or has_unmodified_linears(model.vision_tower):
        optimize_vision_tower(model.vision_tower, chosen)
    return Assistant(model.eval(), processor)


def _converted(source: str | os.PathLike) -> str:
    """An original checkpoint's copy in transformers' layout.

    Raises:
        ConvLlavaError: it cannot be converted, or not here: a Space has only the files that its page needs.
    """
    try:
        from ..convert.cache import converted_checkpoint
    except ModuleNotFoundError:
        check_checkpoint(source)
        raise
    return converted_checkpoint(source)
