"""Conversations in batches: the same answers and likelihoods as one at a time."""

import pytest
import torch
from helpers.tiny_models import ask, make_config, make_image, make_model

from convllava_hf.errors import ConvLlavaError
from convllava_hf.evaluation.batches import answer_batch, decode_answers, likelihoods
from convllava_hf.inference import Assistant, load


CONVERSATIONS = [
    ask("What is this?", make_image(seed=1)),
    ask("A longer question about nothing at all, and without an image"),
    ask("Which of the two?", make_image(seed=2), make_image(80, 200, seed=3)),
    ask("Short", make_image(64, 64, seed=4)),
]


@pytest.fixture(scope="module")
def assistant(model, processor) -> Assistant:
    return Assistant(model, processor)


def test_answers_are_those_given_one_at_a_time(assistant):
    alone = [assistant.answer(conversation, max_new_tokens=12) for conversation in CONVERSATIONS]
    ids = answer_batch(assistant, CONVERSATIONS, max_new_tokens=12)
    assert ids == [answer.token_ids for answer in alone]
    assert decode_answers(assistant, ids) == [answer.text.strip() for answer in alone]
    assert len({tuple(row) for row in ids}) == len(ids)


def test_answers_end_with_their_turn(processor):
    model = make_model(seed=5)
    assistant = Assistant(model, processor)
    whole = answer_batch(assistant, CONVERSATIONS, max_new_tokens=12)
    model.generation_config.eos_token_id = [end := whole[0][4], 2]  # now one answer ends before the others
    ids = answer_batch(assistant, CONVERSATIONS, max_new_tokens=12)
    assert ids == [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert len({len(row) for row in ids}) > 1


def test_sampling_is_handed_on(assistant):
    greedy = answer_batch(assistant, CONVERSATIONS[:1], max_new_tokens=12)
    torch.manual_seed(0)
    drawn = answer_batch(assistant, CONVERSATIONS[:1], max_new_tokens=12, do_sample=True, temperature=5.0)
    assert greedy != drawn


def test_answers_near_the_end_of_the_context_are_those_given_alone(processor):
    lengths = [
        processor.apply_chat_template([one], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for one in CONVERSATIONS
    ]
    longest = max(len(ids[0]) for ids in lengths)
    config = make_config()
    config.text_config.max_position_embeddings = longest + 4
    assistant = Assistant(make_model(config), processor)
    alone = [assistant.answer(one, max_new_tokens=12).token_ids for one in CONVERSATIONS]
    assert answer_batch(assistant, CONVERSATIONS, max_new_tokens=12) == alone
    assert sorted({len(ids) for ids in alone}) == [4, 12]
    config.text_config.max_position_embeddings = longest
    with pytest.raises(ConvLlavaError, match=f"has {longest} tokens, and the model's context holds {longest}"):
        answer_batch(assistant, CONVERSATIONS, max_new_tokens=12)
    with pytest.raises(ConvLlavaError, match="the answer included"):
        likelihoods(assistant, CONVERSATIONS, ["yes"] * 4)


@pytest.mark.parametrize("tokenizer", ["byte-level", "SentencePiece"])
def test_likelihoods_are_the_losses_of_the_tokens_after_the_prompt(assistant, converted_checkpoint, tokenizer):
    if tokenizer == "SentencePiece":
        assistant = load(converted_checkpoint("stage3"), device="cpu", dtype="float32")
    answers = ["yes", "a much longer answer", "B", "two words"]
    found = likelihoods(assistant, CONVERSATIONS, answers)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for conversation, answer, one in zip(CONVERSATIONS, answers, found, strict=True):
        asked = assistant.processor.apply_chat_template([conversation], add_generation_prompt=True, **options)
        turns = [*conversation, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        inputs = assistant.processor.apply_chat_template([turns], **options)
        labels, length = inputs["input_ids"].clone(), asked["input_ids"].shape[1]
        assert (labels[:, :length] == asked["input_ids"]).all()
        labels[:, :length] = -100
        with torch.inference_mode():
            output = assistant.model(**inputs, labels=labels)
        assert one.tokens == labels.shape[1] - length
        assert one.loss == pytest.approx(float(output.loss), rel=1e-4)
        assert one.log_probability == pytest.approx(-float(output.loss) * one.tokens, rel=1e-4)
        assert not one.greedy


def test_the_models_own_answer_is_the_greedy_one(processor):
    model = make_model(seed=5)
    assistant = Assistant(model, processor)
    text = "the sign"
    ids = processor.tokenizer(" " + text, add_special_tokens=False)["input_ids"] + [2]
    position = {"step": 0}

    def say(module, args, output):  # a head that says just this text
        steps = output.shape[1]
        told = [ids[min(position["step"] + step, len(ids) - 1)] for step in range(steps)]
        output.zero_()
        output[:, range(steps), told] = 1.0
        return output

    handle = model.lm_head.register_forward_hook(say)
    try:
        greedy, other = (likelihoods(assistant, CONVERSATIONS[:1], [answer])[0] for answer in (text, "another"))
    finally:
        handle.remove()
    assert greedy.greedy and greedy.tokens == len(ids) and not other.greedy and greedy.loss < other.loss
