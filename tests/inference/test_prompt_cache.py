"""Later turns of a conversation: the answers of an assistant that remembers are those of one that does not."""

import argparse

import numpy as np
import pytest
import torch
from helpers.tiny_models import make_config, make_image, make_model, make_processor

from convllava_hf.cli.chat import Chat
from convllava_hf.cli.common import add_generation_arguments, add_image_arguments
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import Assistant, assistant_turn, prompt_cache, system_turn, user_turn


class Watched:
    """An assistant that remembers beside one that does not, and what the first one's tower saw meanwhile."""

    def __init__(self, model, processor):
        self.plain = Assistant(model, processor)
        self.caching = self.plain.with_prompt_cache()
        self.encoded: list[int] = []  # images a call

    def answer(self, messages, **image_options):
        expected = self.plain.with_image_options(**image_options).answer(messages, max_new_tokens=8)
        handle = self.plain.model.vision_tower.register_forward_hook(
            lambda module, args, output: self.encoded.append(len(output.last_hidden_state))
        )
        try:
            answer = self.caching.with_image_options(**image_options).answer(messages, max_new_tokens=8)
        finally:
            handle.remove()
        assert answer.token_ids == expected.token_ids
        assert (answer.text, answer.prompt_tokens) == (expected.text, expected.prompt_tokens)
        assert answer.visual_tokens == expected.visual_tokens
        return answer


@pytest.fixture
def watched(model, processor) -> Watched:
    return Watched(model, processor)


def test_a_conversation_goes_on_where_it_was(watched):
    messages = [user_turn("What is on the sign?", [make_image()])]
    first = watched.answer(messages)
    assert first.reused_tokens == 0 and len(watched.encoded) == 1
    messages += [assistant_turn(first.text), user_turn("And below?")]
    second = watched.answer(messages)
    assert second.reused_tokens >= first.prompt_tokens - 1
    messages += [assistant_turn(second.text), user_turn("And this?", [make_image(seed=1)])]
    third = watched.answer(messages)
    assert third.visual_tokens == 8 and third.reused_tokens >= second.prompt_tokens - 1
    assert watched.encoded == [1, 1]


def test_images_are_told_apart_though_the_words_are_the_same(watched):
    one, other = make_image(), make_image(seed=1)
    answers = [watched.answer([user_turn("What?", [image])]) for image in (one, other, one)]
    assert answers[0].token_ids == answers[2].token_ids != answers[1].token_ids
    assert len(watched.encoded) == 2  # the third time it was known
    assert answers[1].reused_tokens == answers[2].reused_tokens < answers[0].prompt_tokens - 4
    watched.answer([user_turn("What?", [one, other])])
    watched.answer([user_turn("What?", [other, one])])
    watched.answer([user_turn("What?", [one, one])])
    assert len(watched.encoded) == 2


def test_an_image_that_was_drawn_on_is_another(watched):
    image = make_image()
    before = watched.answer([user_turn("What?", [image])])
    image.paste((255, 0, 0), (0, 0, 60, 60))
    assert watched.answer([user_turn("What?", [image])]).token_ids != before.token_ids
    assert len(watched.encoded) == 2


def test_palettes_and_orientation_belong_to_an_image(watched):
    gray = make_image(mode="L")
    indexed = gray.copy()
    indexed.putpalette([level for index in range(256) for level in (index, 255 - index, 128)])
    turned = gray.copy()
    turned.getexif()[0x0112] = 6
    turned.info["exif"] = turned.getexif().tobytes()
    for image in (gray, indexed, turned):
        watched.answer([user_turn("What?", [image])])
    assert len(watched.encoded) == 3


def test_the_same_image_at_another_resolution(watched):
    turn = [user_turn("What?", [make_image()])]
    assert watched.answer(turn, size=64).visual_tokens == 1
    assert watched.answer(turn).visual_tokens == 4
    assert watched.answer(turn, size=64).visual_tokens == 1
    assert len(watched.encoded) == 2


def test_branches_other_systems_and_text_alone(watched):
    image = make_image()
    start = [user_turn("What is on the sign?", [image]), assistant_turn("An exit."), user_turn("Which?")]
    watched.answer(start)
    reused = [
        watched.answer(messages).reused_tokens
        for messages in (
            [start[0], assistant_turn("A door."), start[2]],
            [system_turn("Be brief."), *start],
            [user_turn("What is on the sign?")],
            [user_turn("Tell a story.")],
            start,
            start[:1],
            start,
        )
    ]
    assert watched.encoded == [1]
    assert reused[0] > 4 and reused[1] == 1  # the beginning of the sequence
    assert reused[-1] > reused[-2] > 0


def test_a_question_asked_again_word_for_word(watched):
    turn = [user_turn("What?", [make_image()])]
    first = watched.answer(turn)
    again = watched.answer(turn)
    assert again.reused_tokens == first.prompt_tokens - 1
    assert watched.encoded == [1]


@pytest.mark.parametrize(("text", "keeps"), [("qwen2", True), ("qwen3", True), ("gemma2", False)])
def test_other_language_models(text, keeps, processor):
    """Gemma 2 has layers that see a window of the latest tokens; what they have forgotten cannot be had back."""
    config = make_config(text=text)
    if not keeps:
        config.text_config.sliding_window = 16
    watched = Watched(make_model(config), processor)
    messages = [user_turn("What?", [make_image()])]
    messages += [assistant_turn(watched.answer(messages).text), user_turn("And now?")]
    assert bool(watched.answer(messages).reused_tokens) == keeps
    watched.answer([*messages[:2], user_turn("Or this?")])
    assert watched.encoded == [1]


def test_an_answer_that_was_interrupted_leaves_nothing_wrong(watched):
    class Stop(Exception):
        pass

    def listen(piece):
        raise Stop

    messages = [user_turn("What?", [make_image()])]
    messages += [assistant_turn(watched.answer(messages).text), user_turn("And now?")]
    with pytest.raises(Stop):
        watched.caching.answer(messages, on_text=listen)
    assert watched.answer(messages).reused_tokens == 0
    assert watched.encoded == [1]


def test_an_answer_ended_by_its_reader_is_read_on(watched):
    messages = [user_turn("What?", [make_image()])]
    calls = []
    short = watched.caching.answer(messages, should_stop=lambda: calls.append(1) or len(calls) == 3)
    assert len(short.token_ids) == 3
    messages += [assistant_turn(short.text), user_turn("And now?")]
    assert watched.answer(messages).reused_tokens >= short.prompt_tokens


def test_a_conversation_too_long_is_refused_before_its_images_are_encoded(watched):
    with pytest.raises(ConvLlavaError, match="context holds"):
        watched.caching.answer([user_turn("x " * 600, [make_image()])])
    assert watched.caching.prompt_cache.images == {}


def test_memory_that_runs_out_is_given_back(watched, monkeypatch):
    turn = [user_turn("What?", [make_image()])]
    watched.answer(turn)

    def fail(**kwargs):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(watched.plain.model, "generate", fail)
        with pytest.raises(ConvLlavaError, match="does not hold this conversation"):
            watched.caching.answer(turn)
    assert watched.caching.prompt_cache.images == {}
    assert watched.answer(turn).reused_tokens == 0


def test_images_of_long_ago_are_forgotten(watched, monkeypatch):
    monkeypatch.setattr(prompt_cache, "_IMAGES", 2)
    images = [make_image(seed=seed) for seed in range(3)]
    for image in images:
        watched.answer([user_turn("What?", [image])])
    assert len(watched.caching.prompt_cache.images) == 2
    watched.answer([user_turn("What?", images)])  # all three, of which the first is encoded again
    assert watched.encoded == [1, 1, 1, 1]
    assert len(watched.caching.prompt_cache.images) == 3


def test_arrays_and_tensors_are_images_too(watched):
    array = np.asarray(make_image())
    for image in (array, torch.from_numpy(array.copy()), array.astype(np.float32) / 255):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
        watched.answer([{"role": "user", "content": content}])
    assert len(watched.encoded) == 2  # the tensor is the array


def test_chat_encodes_an_image_once(model, processor, capsys):
    seen = []
    handle = model.vision_tower.register_forward_hook(lambda *args: seen.append(1))
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser)
    add_image_arguments(parser)
    args = parser.parse_args(["--max-new-tokens", "4"])
    chat = Chat(Assistant(model, processor), args, [make_image()])
    try:
        for question in ("What?", "Which?", "Where?"):
            assert chat.take(question)
    finally:
        handle.remove()
    assert len(seen) == 1


def test_sizes_of_one_prompt_may_differ(model):
    """Images are encoded one by one, so what the image processor pads in a batch does not matter."""
    watched = Watched(model, make_processor(192))
    answer = watched.answer([user_turn("Which?", [make_image(), make_image(40, 90, seed=2)])])
    assert answer.visual_tokens == 18
