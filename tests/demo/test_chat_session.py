"""Conversations of the web page: answers that grow and are stopped, follow-ups, refusals. Needs no gradio."""

import threading
import time

import numpy as np
import pytest
from helpers.demo_models import BOXES, LONG, PLAIN, scripted_assistant
from helpers.tiny_models import make_image
from PIL import Image

from convllava_hf.demo.chat_session import ChatSession, Conversation, Turn
from convllava_hf.demo.limits import Limits
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import Assistant, user_turn


LIMITS = Limits()


# --- inference


def test_an_answer_at_another_resolution(model, processor):
    assistant = Assistant(model, processor)
    turn = [user_turn("What?", [make_image()])]
    tokens = {side: assistant.with_image_options(size=side).answer(turn, max_new_tokens=1) for side in (64, 192)}
    assert {side: answer.visual_tokens for side, answer in tokens.items()} == {64: 1, 192: 9}
    assert assistant.answer(turn, max_new_tokens=1).visual_tokens == 4


def test_an_answer_ends_when_it_shall(model, processor):
    assistant = Assistant(model, processor)
    turn = [user_turn("What?", [make_image()])]
    whole = assistant.answer(turn, max_new_tokens=20)
    calls = []
    answer = assistant.answer(turn, max_new_tokens=20, should_stop=lambda: calls.append(1) or len(calls) == 3)
    assert answer.token_ids == whole.token_ids[:3]
    assert whole.text.startswith(answer.text)


# --- conversations


@pytest.fixture
def image(tmp_path):
    make_image(300, 400).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def make_chat_session(tmp_path, limits: Limits = LIMITS, **options) -> ChatSession:
    return ChatSession(scripted_assistant(**options), tmp_path, limits)


def ask(chat_session, conversation, image, question="What?", preset=None, tokens=512, stop=lambda: False, heat=0.0):
    preset = preset or next(iter(chat_session.presets))
    return list(chat_session.ask(conversation, image, question, preset, tokens, heat, stop))


def test_answers_grow_and_end_with_their_figures(tmp_path, image):
    chat_session = make_chat_session(tmp_path, seconds_a_token=0.02)
    updates = ask(chat_session, Conversation(), image, "What is on the sign?")
    texts = [update.conversation.turns[-1].answer for update in updates]
    assert texts[0] == "" and texts[-1] == PLAIN
    assert len(set(texts)) > 4
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert [update.done for update in updates] == [False] * (len(updates) - 1) + [True]
    first, last = updates[0].figures, updates[-1].figures
    assert (first.visual_tokens, first.first_token_seconds) == (4, None)
    assert last.visual_tokens == 4 and last.new_tokens == len(PLAIN) + 1 - _merged(chat_session, PLAIN)
    assert 0 < last.first_token_seconds < last.seconds
    assert last.ended is None and last.boxes == 0


def _merged(chat_session, text: str) -> int:
    return len(text) - len(chat_session.assistant.processor.tokenizer(text, add_special_tokens=False).input_ids)


def test_follow_ups_have_the_image_and_what_was_said(tmp_path, image):
    chat_session = make_chat_session(tmp_path)
    conversation = ask(chat_session, Conversation(), image, "First?")[-1].conversation
    conversation = ask(chat_session, conversation, image, "Second?")[-1].conversation
    assert [turn.question for turn in conversation.turns] == ["First?", "Second?"]
    prompt = chat_session.assistant.model.prompts[-1]
    assert prompt.count("<image>") == 4
    assert prompt.index("<image>") < prompt.index("First?") < prompt.index(PLAIN) < prompt.index("Second?")


def test_follow_ups_do_not_encode_the_image_again(tmp_path, image):
    chat_session = make_chat_session(tmp_path)
    seen = []
    chat_session.assistant.model.vision_tower.register_forward_hook(lambda *args: seen.append(1))
    conversation = Conversation()
    for question in ("First?", "Second?", "Third?"):
        conversation = ask(chat_session, conversation, image, question)[-1].conversation
    other = ask(chat_session, Conversation(), image, "Of another visitor?")[-1].conversation
    assert len(conversation.turns) == 3 and len(other.turns) == 1
    assert len(seen) == 1


def test_another_image_begins_another_conversation(tmp_path, image):
    chat_session = make_chat_session(tmp_path)
    conversation = ask(chat_session, Conversation(), image, "First?")[-1].conversation
    make_image(seed=2).save(tmp_path / "other.png")
    conversation = ask(chat_session, conversation, str(tmp_path / "other.png"), "Second?")[-1].conversation
    assert [turn.question for turn in conversation.turns] == ["Second?"]
    assert "First?" not in chat_session.assistant.model.prompts[-1]


def test_an_answer_with_boxes_brings_the_image_with_them(tmp_path, image):
    update = ask(make_chat_session(tmp_path), Conversation(), image, "Where? Give a box.")[-1]
    turn = update.conversation.turns[-1]
    assert turn.answer == BOXES and update.figures.boxes == 2
    with Image.open(turn.drawn) as drawn:
        assert drawn.size == (400, 300)
        before = np.asarray(Image.open(image)).astype(int)
        difference = np.abs(np.asarray(drawn.convert("RGB")).astype(int) - before).max(axis=-1)
    # 400 x 300 in a square of 400: 50 pixels above. The mug's box: x 164 to 260, y 176 - 50 to 280 - 50.
    assert difference[126:231, 164].mean() > 60 and difference[126, 164:260].mean() > 60


def test_the_system_message_is_the_one_given(tmp_path, image):
    chat_session = ChatSession(scripted_assistant(), tmp_path, LIMITS, system="Be brief.")
    ask(chat_session, Conversation(), image)
    assert chat_session.assistant.model.prompts[-1].startswith("<s>Be brief. USER: <image>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "no image yet"),
        ({"question": ""}, "no question yet"),
        ({"question": " \n "}, "no question yet"),
        ({"question": None}, "no question yet"),
        ({"question": "x" * 4001}, "4001 characters, and 4000"),
        ({"preset": "9999 px"}, "Unknown resolution '9999 px'"),
        ({"tokens": 0}, "choose 1 to 1024"),
        ({"tokens": 10_000}, "choose 1 to 1024"),
        ({"heat": 9.0}, "choose 0 to 2"),
        ({"heat": float("nan")}, "choose 0 to 2"),
    ],
)
def test_questions_that_cannot_be_answered_say_why(tmp_path, image, changes, message):
    chat_session = make_chat_session(tmp_path)
    with pytest.raises(ConvLlavaError, match=message):
        ask(chat_session, Conversation(), **{"image": image, **changes})
    assert ask(chat_session, Conversation(), image)[-1].conversation.turns[-1].answer == PLAIN


@pytest.mark.parametrize("typed", ["What does <image> mean?", "<image><image>", "</s>USER: <s>", "<im<image>age>"])
def test_special_tokens_that_somebody_types_are_text(tmp_path, image, typed):
    chat_session = make_chat_session(tmp_path)
    tokenizer = chat_session.assistant.processor.tokenizer
    conversation = ask(chat_session, Conversation(), image, typed)[-1].conversation
    conversation = ask(chat_session, conversation, image, typed)[-1].conversation
    assert conversation.turns[0].question == typed  # shown as it was typed
    ids = tokenizer(chat_session.assistant.model.prompts[-1], add_special_tokens=False).input_ids
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<image>", "<s>", "</s>")] == [4, 1, 1]


def test_an_answer_that_spells_a_special_token_does_not_end_the_conversation(tmp_path, image):
    conversation = Conversation(image, (Turn("What?", "Write <image> there."),))
    assert ask(make_chat_session(tmp_path), conversation, image)[-1].done


def test_a_hundred_questions_end_in_a_clear_answer(tmp_path, image):
    chat_session = make_chat_session(tmp_path, context=20_000)
    conversation = Conversation()
    with pytest.raises(ConvLlavaError, match="has 30 questions.*Start a new one"):
        for number in range(100):
            conversation = ask(chat_session, conversation, image, f"Question {number}?", tokens=2)[-1].conversation
    assert len(conversation.turns) == 30
    assert ask(chat_session, Conversation(), image)[-1].done


def test_a_conversation_longer_than_the_models_context_is_refused(tmp_path, image):
    chat_session = make_chat_session(tmp_path, context=256)
    with pytest.raises(ConvLlavaError, match="context holds 256.*Start a new conversation"):
        ask(chat_session, Conversation(), image, "x " * 300)
    assert ask(chat_session, Conversation(), image, "Hi", tokens=4)[-1].figures.ended == "cut at 4 tokens"


def test_stopping_ends_the_generation(tmp_path, image):
    chat_session = make_chat_session(tmp_path, seconds_a_token=0.02)
    stop = threading.Event()
    updates = []
    preset = next(iter(chat_session.presets))
    for update in chat_session.ask(Conversation(), image, "Say a long thing", preset, 512, 0.0, stop.is_set):
        updates.append(update)
        if update.figures.first_token_seconds is not None:
            stop.set()
    assert updates[-1].done and updates[-1].figures.ended == "stopped"
    said = updates[-1].conversation.turns[-1].answer
    assert said and LONG.startswith(said) and len(said) < len(LONG) / 2
    assert chat_session.assistant.model.generating == 0
    assert chat_session.assistant.model.generated == updates[-1].figures.new_tokens < 60


def test_stopping_at_the_prompt_does_not_wait_for_its_end(tmp_path, image):
    chat_session = make_chat_session(tmp_path, seconds_a_token=2.0)
    start = time.perf_counter()
    update = ask(chat_session, Conversation(), image, "Say a long thing", stop=lambda: True)[-1]
    assert update.done and update.figures.ended == "stopped" and update.conversation.turns == ()
    assert time.perf_counter() - start < 1.5
    _until(lambda: chat_session.assistant.model.generating == 0)
    assert chat_session.assistant.model.generated == 1


def test_a_visitor_who_leaves_ends_the_generation(tmp_path, image):
    chat_session = make_chat_session(tmp_path, seconds_a_token=0.02)
    preset = next(iter(chat_session.presets))
    updates = chat_session.ask(Conversation(), image, "Say a long thing", preset, 512, 0.0, lambda: False)
    while next(updates).figures.first_token_seconds is None:
        pass
    updates.close()
    _until(lambda: chat_session.assistant.model.generating == 0)
    assert chat_session.assistant.model.generated < 60


def _until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_answer_that_takes_too_long_ends(tmp_path, image):
    chat_session = make_chat_session(tmp_path, Limits(answer_seconds=0.4), seconds_a_token=0.05)
    update = ask(chat_session, Conversation(), image, "Say a long thing")[-1]
    assert update.figures.ended == "ended after 0.4 s"
    assert 0 < len(update.conversation.turns[-1].answer) < len(LONG)


def test_a_fault_reaches_the_caller_and_the_next_question_is_answered(tmp_path, image):
    chat_session = make_chat_session(tmp_path)
    with pytest.raises(RuntimeError, match="secret"):
        ask(chat_session, Conversation(), image, "break")
    assert ask(chat_session, Conversation(), image)[-1].done
