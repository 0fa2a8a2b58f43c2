"""Many conversations at once: their answers, and how likely given answers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConvLlavaError
from ..inference import GREEDY, LESS_MEMORY, Assistant, prompt_inputs
from ..utils.device_memory import explain_out_of_memory


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds an answer, the token that ends it included.

    `loss`: minus the logarithm of the answer's probability, by token: the mean over its `tokens`. `greedy`: whether
    the model would give just this answer, taking the likeliest token each time.
    """

    loss: float
    tokens: int
    greedy: bool

    @property
    def log_probability(self) -> float:
        """The natural logarithm of the answer's probability."""
        return -self.loss * self.tokens


@torch.inference_mode()
def answer_batch(
    assistant: Assistant,
    conversations: Sequence[list[dict[str, Any]]],
    *,
    max_new_tokens: int,
    **sampling: Any,
) -> list[list[int]]:
    """Continue every conversation by one answer, the likeliest token each time unless `sampling` says otherwise.

    Args:
        conversations: as chat templates take them; best of like length, for they are padded on the left to the
            longest one.
        max_new_tokens: an answer ends there, or where the model's context does, if the model has not ended it before.
        **sampling: of `generate`: `do_sample`, `temperature`, `num_beams`, ...

    Returns:
        The answers' token ids in the order of the conversations, up to the token that ends a turn.

    Raises:
        ConvLlavaError: a conversation fills the model's context, or the device's memory does not hold the batch.
    """
    inputs = _inputs(assistant, conversations)
    length = inputs["input_ids"].shape[1]
    room = _room(assistant, length)
    if room is not None and room < max_new_tokens and len(conversations) > 1:
        # Alone, the shorter ones have more room than beside the longest one.
        options = {"max_new_tokens": max_new_tokens, **sampling}
        return [answer_batch(assistant, [one], **options)[0] for one in conversations]
    if room is not None:
        max_new_tokens = min(max_new_tokens, room)
    what = f"{len(conversations)} conversations of {length} tokens beside the model in {assistant.dtype}"
    with explain_out_of_memory(what, assistant.device, f"Choose a smaller batch. {LESS_MEMORY}"):
        return generate(assistant.model, inputs, max_new_tokens, **sampling)


@torch.inference_mode()
def generate(model, inputs: Mapping[str, torch.Tensor], max_new_tokens: int, **sampling: Any) -> list[list[int]]:
    """The new tokens of each of a batch of prompts, up to its end; greedy unless `sampling` says otherwise.

    Args:
        inputs: of prompts padded on the left.
    """
    output = model.generate(**inputs, **{**GREEDY, "num_beams": 1, **sampling}, max_new_tokens=max_new_tokens)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    rows = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:length])
    return rows


def decode_answers(assistant: Assistant, token_ids: Sequence[list[int]]) -> list[str]:
    """Answers as texts, without special tokens and the blanks around them."""
    tokenizer = assistant.processor.tokenizer
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return [tokenizer.decode(ids, **options).strip() for ids in token_ids]


@torch.inference_mode()
def likelihoods(
    assistant: Assistant,
    conversations: Sequence[list[dict[str, Any]]],
    answers: Sequence[str],
) -> list[Likelihood]:
    """How likely each answer is after its conversation, as the chat template writes it with what ends a turn.

    Raises:
        ConvLlavaError: a conversation and its answer do not fit into the model's context.
    """
    whole = [[*turns, _answered(text)] for turns, text in zip(conversations, answers, strict=True)]
    counts = [_answer_tokens(assistant, *pair) for pair in zip(conversations, whole, strict=True)]
    inputs = _inputs(assistant, whole, answered=True)
    _room(assistant, inputs["input_ids"].shape[1] - 1)  # nothing is generated after the last token
    longest = max(counts)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # generate() counts them so, too
    output = assistant.model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=longest + 1)
    logits = output.logits[:, :-1]  # (batch, longest, vocabulary)
    targets = inputs["input_ids"][:, -longest:]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    greedy = logits.argmax(-1) == targets
    return [
        Likelihood(losses[row, -count:].mean().item(), count, bool(greedy[row, -count:].all()))
        for row, count in enumerate(counts)
    ]


def _inputs(assistant: Assistant, conversations, answered: bool = False):
    inputs = prompt_inputs(assistant.processor, list(conversations), add_generation_prompt=not answered)
    return inputs.to(assistant.device, assistant.dtype)


def _room(assistant: Assistant, tokens: int) -> int | None:
    """Tokens left for an answer; `None` where the language model's config names no limit."""
    if (context := assistant.context) is None:
        return None
    if tokens >= context:
        raise ConvLlavaError(
            f"A question has {tokens} tokens, and the model's context holds {context}, the answer included. Ask about "
            "fewer images, or at a lower resolution."
        )
    return context - tokens


def _answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _answer_tokens(assistant: Assistant, asked: list[dict[str, Any]], answered: list[dict[str, Any]]) -> int:
    """Of how many tokens the answer consists: those from the first on in which the two differ.

    Counted in the text, where an image is one token.
    """
    ids = []
    for turns, prompt in ((asked, True), (answered, False)):
        text = assistant.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        ids.append(assistant.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    same = 0
    while same < len(ids[0]) and ids[0][same] == ids[1][same]:
        same += 1
    return len(ids[1]) - same
