"""The engine: conversations in batches get the same answers and likelihoods as one at a time."""

import pytest
import torch
from helpers.tiny_models import ask, make_config, make_image, make_model

from convllava_hf.errors import ConvLlavaError
from convllava_hf.evaluation.engine import answer_batch, ask_in_parts, score_batch
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


def token_ids(assistant: Assistant, conversations=CONVERSATIONS, **sampling) -> list[list[int]]:
    return [reply.token_ids for reply in answer_batch(assistant, conversations, max_new_tokens=12, **sampling)]


def test_answers_are_those_given_one_at_a_time(assistant):
    alone = [assistant.answer(conversation, max_new_tokens=12) for conversation in CONVERSATIONS]
    replies = answer_batch(assistant, CONVERSATIONS, max_new_tokens=12)
    assert [reply.token_ids for reply in replies] == [answer.token_ids for answer in alone]
    assert [reply.text for reply in replies] == [answer.text.strip() for answer in alone]
    for count in ("prompt_tokens", "visual_tokens"):
        assert [getattr(reply, count) for reply in replies] == [getattr(answer, count) for answer in alone]
    assert len({reply.text for reply in replies}) == len(replies)
    assert answer_batch(assistant, [], max_new_tokens=12) == []


def test_answers_end_with_their_turn(processor):
    model = make_model(seed=5)
    assistant = Assistant(model, processor)
    whole = token_ids(assistant)
    model.generation_config.eos_token_id = [end := whole[0][4], 2]  # now one answer ends before the others
    ids = token_ids(assistant)
    assert ids == [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert len({len(row) for row in ids}) > 1


def test_sampling_is_handed_on(assistant):
    greedy = token_ids(assistant, CONVERSATIONS[:1])
    torch.manual_seed(0)
    drawn = token_ids(assistant, CONVERSATIONS[:1], do_sample=True, temperature=5.0)
    assert greedy != drawn


def test_answers_near_the_end_of_the_context_are_those_given_alone(processor):
    lengths = [
        processor.apply_chat_template([one], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for one in CONVERSATIONS
    ]
    longest = max(len(ids[0]) for ids in lengths)
    config = make_config()
    config.text_config.max_position_embeddings = longest + 2
    assistant = Assistant(make_model(config), processor)
    alone = [assistant.answer(one, max_new_tokens=12).token_ids for one in CONVERSATIONS]
    assert token_ids(assistant) == alone
    assert sorted({len(ids) for ids in alone}) == [2, 12]
    config.text_config.max_position_embeddings = longest
    with pytest.raises(ConvLlavaError, match=f"has {longest} tokens, and the model's context holds {longest}"):
        answer_batch(assistant, CONVERSATIONS, max_new_tokens=12)
    with pytest.raises(ConvLlavaError, match="the answer included"):
        score_batch(assistant, CONVERSATIONS, [["yes"]] * 4)


@pytest.mark.parametrize("tokenizer", ["byte-level", "SentencePiece"])
def test_likelihoods_are_the_losses_of_the_tokens_after_the_prompt(assistant, converted_checkpoint, tokenizer):
    if tokenizer == "SentencePiece":
        assistant = load(converted_checkpoint("stage3"), device="cpu", dtype="float32")
    options = [["yes"], ["a much longer answer", "no"], ["B", "an answer in words", "C"], ["two words"]]
    replies = score_batch(assistant, CONVERSATIONS, options)
    assert [len(reply.likelihoods) for reply in replies] == [1, 2, 3, 1]
    pairs = zip(CONVERSATIONS, options, strict=True)
    asked_for = [(conversation, option) for conversation, several in pairs for option in several]
    found = [one for reply in replies for one in reply.likelihoods]
    encoded = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for (conversation, answer), one in zip(asked_for, found, strict=True):
        asked = assistant.processor.apply_chat_template([conversation], add_generation_prompt=True, **encoded)
        turns = [*conversation, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        inputs = assistant.processor.apply_chat_template([turns], **encoded)
        labels, length = inputs["input_ids"].clone(), asked["input_ids"].shape[1]
        assert (labels[:, :length] == asked["input_ids"]).all()
        labels[:, :length] = -100
        with torch.inference_mode():
            output = assistant.model(**inputs, labels=labels)
        assert one.log_likelihood == pytest.approx(-float(output.loss), rel=1e-4)
        assert not one.greedy


def test_the_models_own_answer_is_the_greedy_one(processor):
    model = make_model(seed=5)
    assistant = Assistant(model, processor)
    text = "the sign"
    ids = processor.tokenizer(" " + text, add_special_tokens=False)["input_ids"] + [2]
    step = {"next": 0}

    def say(module, args, output):  # a head that says just this text, from the end of the prompt on
        first, count = step["next"], output.shape[1]
        said = [ids[min(first + number, len(ids) - 1)] for number in range(count)]
        step["next"] += count
        output.zero_()
        output[:, range(count), said] = 1.0
        return output

    handle = model.lm_head.register_forward_hook(say)
    try:
        found = []
        for answer in (text, "another", "the"):
            step["next"] = 0
            found += score_batch(assistant, CONVERSATIONS[:1], [[answer]])[0].likelihoods
    finally:
        handle.remove()
    assert [one.greedy for one in found] == [True, False, False]  # "the" is how it begins, and not where it ends
    assert found[0].log_likelihood > max(one.log_likelihood for one in found[1:])


def test_what_memory_does_not_hold_is_asked_in_halves(assistant):
    sizes = []

    def ask(items, most=2):
        sizes.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item.upper() for item in items]

    assert ask_in_parts(assistant, "abcde", ask) == list("ABCDE")
    assert sizes == [5, 2, 3, 1, 2]
    with pytest.raises(ConvLlavaError, match="does not hold one question next to the model in torch.float32"):
        ask_in_parts(assistant, "abcde", lambda items: ask(items, most=0))
    # What does not fit into one batch is not asked at all before it is halved.
    assert ask_in_parts(assistant, "abc", lambda items: None if len(items) > 1 else list(items)) == list("abc")


def test_one_image_that_cannot_be_read_is_named(assistant):
    broken = [*CONVERSATIONS[:2], ask("What is this?", "nowhere/to be found.png")]
    with pytest.raises(ConvLlavaError, match="to be found.png"):
        answer_batch(assistant, broken, max_new_tokens=2)
