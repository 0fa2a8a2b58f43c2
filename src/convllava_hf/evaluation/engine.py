"""The engine that asks a model a batch of questions: for its answers, or how likely it finds given answers.

`convllava eval`, the models for lmms-eval and VLMEvalKit and the miniature's scores all ask through it.
`Assistant.answer` is for one conversation whose text is shown as it comes.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import ConvLlavaError, first_line
from ..inference import GREEDY, LESS_MEMORY, Assistant, assistant_turn, prompt_inputs
from ..utils.device_memory import is_out_of_memory, needed_and_free


logger = logging.getLogger(__name__)

Conversation = list[dict[str, Any]]
Item = TypeVar("Item")
Result = TypeVar("Result")
# What the processor raises when it cannot decode an image or cannot put images into one batch.
INPUT_ERRORS = (OSError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds an answer, including the token that ends it.

    `log_likelihood`: in nats, the mean over the answer's tokens. `greedy`: whether the model would generate exactly
    this answer, taking the likeliest token each time.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Reply:
    """What a model replied to one question.

    `text`: the answer without special tokens and surrounding whitespace. `token_ids`: the generated ids, up to the one
    that ends the turn. `likelihoods`: of the given options; empty where the model was asked to answer.
    """

    text: str
    prompt_tokens: int
    visual_tokens: int
    token_ids: list[int] = field(default_factory=list)
    likelihoods: list[Likelihood] = field(default_factory=list)


def answer_batch(
    assistant: Assistant,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int,
    **sampling: Any,
) -> list[Reply]:
    """Continue every conversation by one answer, the likeliest token each time unless `sampling` says otherwise.

    Args:
        conversations: as chat templates take them; best of similar length, since they are padded to the longest one.
        max_new_tokens: an answer ends there, or where the model's context does, if the model has not ended it before.
        **sampling: of `generate`: `do_sample`, `temperature`, `num_beams`, ...

    Raises:
        ConvLlavaError: an image cannot be read, a conversation fills the model's context, or the device's memory does
            not hold a single conversation.
    """

    def ask(part: Sequence[Conversation]) -> list[Reply] | None:
        inputs = _encode(assistant, part)
        if inputs is None:
            return None
        room = _room_for_answer(assistant, inputs["input_ids"].shape[1], max_new_tokens)
        if room < max_new_tokens and len(part) > 1:  # separately, the shorter ones have more room
            return [reply for one in part for reply in ask([one]) or ()]
        return generate_replies(assistant, inputs, room, **sampling)

    return ask_in_parts(assistant, conversations, ask)


def score_batch(
    assistant: Assistant, conversations: Sequence[Conversation], options: Sequence[Sequence[str]]
) -> list[Reply]:
    """How likely each option is as the answer to its conversation, as the chat template writes it.

    Args:
        options: for each conversation, the answers; at least one.

    Raises:
        ConvLlavaError: as of `answer_batch`.
    """

    def ask(part: Sequence[tuple[Conversation, Sequence[str]]]) -> list[Reply] | None:
        inputs = _encode(assistant, [conversation for conversation, _ in part])
        if inputs is None:
            return None
        tokens = [option_token_ids(assistant.processor, *pair) for pair in part]
        for length, several in zip(inputs["attention_mask"].sum(1).tolist(), tokens, strict=True):
            # The last token is only predicted, and nothing follows it.
            _room_for_answer(assistant, length + max(map(len, several)) - 1)
        return score_options(assistant, inputs, tokens)

    return ask_in_parts(assistant, list(zip(conversations, options, strict=True)), ask)


def ask_in_parts(
    assistant: Assistant, items: Sequence[Item], ask: Callable[[Sequence[Item]], list[Result] | None]
) -> list[Result]:
    """Asks about items at once, or in halves where the device's memory or one batch does not hold them.

    Args:
        ask: returns `None` where its items do not fit into one batch, and raises torch's error where the memory is
            too small.

    Raises:
        ConvLlavaError: the memory does not hold a single item.
    """
    try:
        results = ask(items) if items else []
        if results is not None:
            return results
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            raise ConvLlavaError(
                f"The memory of {assistant.device} does not hold one question next to the model in "
                f"{assistant.dtype}: {needed_and_free(error)}. {LESS_MEMORY}"
            ) from error
        logger.warning("A batch of %d does not fit into memory; asking in halves.", len(items))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    middle = len(items) // 2
    return [result for half in (items[:middle], items[middle:]) for result in ask_in_parts(assistant, half, ask)]


@torch.inference_mode()
def generate_replies(
    assistant: Assistant, inputs: Mapping[str, torch.Tensor], max_new_tokens: int, **sampling: Any
) -> list[Reply]:
    """The answers to a batch of prompts, greedy unless `sampling` says otherwise.

    Args:
        inputs: the model's, of prompts padded on the left, on its device.
    """
    model: Any = assistant.model
    tokenizer = assistant.processor.tokenizer
    output = model.generate(**inputs, **{**GREEDY, "num_beams": 1, **sampling}, max_new_tokens=max_new_tokens)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    replies = []
    for row, counts in zip(output[:, inputs["input_ids"].shape[1] :].tolist(), _counts(model, inputs), strict=True):
        ids = row[: next((index + 1 for index, token in enumerate(row) if token in ends), len(row))]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        replies.append(Reply(text.strip(), *counts, token_ids=ids))
    return replies


@torch.inference_mode()
def score_options(
    assistant: Assistant, inputs: Mapping[str, torch.Tensor], options: Sequence[Sequence[Sequence[int]]]
) -> list[Reply]:
    """How likely each option is as the answer to its prompt; the mean over tokens is what lmms-eval chooses by.

    Prompts and images pass through the model once, whatever the number of options.

    Args:
        inputs: the model's, of a batch of prompts padded on the left, on its device.
        options: for each prompt, the tokens of each option; at least one token.
    """
    model, mask = assistant.model, inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    found: list[list[Likelihood]] = [[] for _ in options]
    last = max(map(len, options)) - 1
    for number in range(last + 1):
        rows = [list(row[number]) if number < len(row) else list(row[-1]) for row in options]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=mask.device)
        logits = out.logits[:, -1:]  # (batch, 1, vocabulary)
        if longest > 1:
            following = model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([mask, torch.ones_like(ids[:, :-1])], dim=1),
                position_ids=positions[:, -1:] + 1 + torch.arange(longest - 1, device=mask.device),
                # The model writes into the cache that it is given.
                past_key_values=out.past_key_values if number == last else copy.deepcopy(out.past_key_values),
                use_cache=True,
            )
            logits = torch.cat([logits, following.logits], dim=1)  # (batch, longest, vocabulary)
        scores = logits.float().log_softmax(-1).gather(2, ids[..., None])[..., 0].tolist()
        greedy = logits.argmax(-1) == ids
        for index, row in enumerate(options):
            if number < len(row):
                length = len(row[number])
                mean = sum(scores[index][:length]) / length
                found[index].append(Likelihood(mean, bool(greedy[index, :length].all())))
    counts = _counts(model, inputs)
    return [Reply("", *pair, likelihoods=one) for pair, one in zip(counts, found, strict=True)]


def option_token_ids(processor, conversation: Conversation, options: Sequence[str]) -> list[list[int]]:
    """The tokens of each option as the answer to a conversation, including what ends the turn.

    Args:
        conversation: its images may be missing, if their places are kept.
    """
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    texts = [processor.apply_chat_template([*conversation, assistant_turn(option)]) for option in options]
    return [continuation_ids(processor.tokenizer, prompt, text) for text in texts]


def continuation_ids(tokenizer, prompt: str, text: str) -> list[int]:
    """The tokens by which `text` goes on after `prompt`, which it begins with."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(text, add_special_tokens=False)["input_ids"]
    if after[: len(before)] == before and len(after) > len(before):
        return after[len(before) :]
    # A token spans the prompt's end and the answer's beginning; the answer is then tokenized by itself.
    return tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]


def _encode(assistant: Assistant, conversations: Sequence[Conversation]):
    """The model's inputs; `None` where several conversations cannot be encoded together."""
    try:
        inputs: Any = prompt_inputs(assistant.processor, list(conversations))
    except INPUT_ERRORS as error:
        if len(conversations) > 1:
            return None  # each is asked about separately, and the one at fault raises
        raise ConvLlavaError(first_line(error)) from error
    return inputs.to(assistant.device, assistant.dtype)


def _room_for_answer(assistant: Assistant, tokens: int, most: int = 1) -> int:
    """Tokens that an answer may have after so many in the prompt: `most`, or what the context leaves."""
    if (context := assistant.context) is None:
        return most
    if tokens >= context:
        raise ConvLlavaError(
            f"A question has {tokens} tokens, and the model's context holds {context}, the answer included. Ask about "
            "fewer images, or at a lower resolution."
        )
    return min(most, context - tokens)


def _counts(model, inputs: Mapping[str, torch.Tensor]) -> list[tuple[int, int]]:
    """Each prompt's number of tokens, and how many of them are visual."""
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    return list(zip(inputs["attention_mask"].sum(1).tolist(), visual, strict=True))
