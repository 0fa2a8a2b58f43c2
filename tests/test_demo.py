"""What is behind the web page: boxes, pictures of strangers, presets, conversations, the Space. Needs no gradio."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import make_picture, make_processor
from demo_models import BOXES, LONG, PLAIN, scripted_assistant
from PIL import Image

from convllava_hf import cli
from convllava_hf.demo import space_files
from convllava_hf.demo.boxes import Box, boxes_in, draw, on_picture
from convllava_hf.demo.examples import write_examples
from convllava_hf.demo.limits import Limits
from convllava_hf.demo.pictures import read_picture
from convllava_hf.demo.presets import Preset, presets, view
from convllava_hf.demo.space import GRADIO_VERSION
from convllava_hf.demo.talk import Conversation, Talker, Turn
from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import Assistant, user_turn


LIMITS = Limits()


# --- boxes


def test_boxes_of_an_answer():
    assert boxes_in(BOXES) == [Box(0.41, 0.44, 0.65, 0.70), Box(0.12, 0.55, 0.31, 0.72)]
    assert boxes_in("[0,0,1,1] then [ .5 , 0.25,1.0, 1. ] and again [0,0,1,1]") == [
        Box(0, 0, 1, 1),
        Box(0.5, 0.25, 1, 1),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "in [1, 2, 3, 4]",
        "[0.1, 0.2, 0.4]",
        "[0.1, 0.2, 0.4, 0.5, 0.6]",
        "[0.4, 0.2, 0.1, 0.5]",
        "[0.1, 0.5, 0.4, 0.5]",
        "[-0.1, 0.2, 0.4, 0.5]",
        "[0.1, 0.2, 0.4, 1.5]",
        "(0.1, 0.2, 0.4, 0.5)",
        "[0.1, 0.2, 0.4, 0.5",
        "[a, b, c, d]",
        "[" * 5000 + "0.1," * 5000,
    ],
)
def test_other_numbers_are_no_boxes(text):
    start = time.perf_counter()
    assert boxes_in(text) == []
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("width", "height"), [(300, 120), (120, 301), (200, 200), (640, 37)])
def test_the_padding_is_undone(width, height):
    """Against the image processor itself: a mark drawn on the picture is found in what the model sees."""
    left, top, right, bottom = width // 4, height // 3, width // 4 + width // 3, height // 3 + height // 2
    picture = Image.new("RGB", (width, height), "black")
    picture.paste((255, 255, 255), (left, top, right, bottom))
    processor = make_processor(768).image_processor
    white = processor(picture, return_tensors="np")["pixel_values"][0].min(axis=0) > 1
    rows, columns = np.where(white)
    seen = Box(columns.min() / 768, rows.min() / 768, (columns.max() + 1) / 768, (rows.max() + 1) / 768)
    found = on_picture(seen, view(processor, Preset("own"), width, height))
    tolerance = 2 * max(width, height) / 768 + 1  # two pixels of the model's view, in pixels of the picture
    for edge, expected in [
        (found.left * width, left),
        (found.top * height, top),
        (found.right * width, right),
        (found.bottom * height, bottom),
    ]:
        assert edge == pytest.approx(expected, abs=tolerance)


def test_a_box_is_cut_at_the_picture_and_gone_in_the_padding():
    wide = view(make_processor().image_processor, Preset("own"), 400, 200)  # the picture is the middle half
    assert on_picture(Box(0, 0, 1, 1), wide) == Box(0, 0, 1, 1)
    assert on_picture(Box(0.5, 0.1, 1, 0.5), wide) == Box(0.5, 0, 1, 0.5)
    assert on_picture(Box(0.2, 0.0, 0.4, 0.25), wide) is None
    assert on_picture(Box(0.2, 0.76, 0.4, 0.9), wide) is None


def test_boxes_are_drawn_where_they_are():
    picture = Image.new("RGB", (400, 200), "white")
    drawn = np.asarray(draw(picture, [Box(0.25, 0.5, 0.75, 1.0)]))
    rows, columns = np.where((drawn != 255).any(axis=-1))
    assert (columns.min(), columns.max()) == (100, 299)
    assert (rows.min(), rows.max()) == (100, 199)
    assert (drawn[120:180, 120:280] == 255).all()  # the inside stays visible
    assert (np.asarray(picture) == 255).all()
    assert max(draw(Image.new("RGB", (5000, 40)), [Box(0, 0, 1, 1)] * 100).size) == 1280


# --- pictures


@pytest.fixture(scope="module")
def bomb(tmp_path_factory):
    """A PNG of 200 million pixels in few bytes."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(path)
    assert path.stat().st_size < 100_000
    return path


def test_pictures_are_read_upright_in_rgb_and_bounded(tmp_path):
    sideways = make_picture(60, 100)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    sideways.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg", LIMITS).size == (60, 100)
    make_picture(50, 50, mode="RGBA").save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png", LIMITS).mode == "RGB"
    Image.new("RGB", (9000, 100)).save(tmp_path / "c.png")
    assert read_picture(tmp_path / "c.png", LIMITS).size == (4096, 46)


def test_a_small_picture_is_untouched(tmp_path):
    picture = make_picture(300, 400)
    picture.save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", LIMITS).tobytes() == picture.tobytes()


def test_too_many_pixels_are_refused_before_they_are_decoded(bomb, tmp_path):
    start = time.perf_counter()
    with pytest.raises(ConvLlavaError, match="too large.*50 million"):
        read_picture(bomb, LIMITS)
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    with pytest.raises(ConvLlavaError, match="10000 x 6000 pixels, and this page takes 50 million"):
        read_picture(tmp_path / "large.png", LIMITS)
    assert time.perf_counter() - start < 2


def test_files_that_are_no_pictures_are_refused_without_naming_their_place(tmp_path):
    make_picture().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    files = {
        "text.jpg": b"no picture at all",
        "empty.png": b"",
        "half.png": whole[: len(whole) // 2],
        "header.png": whole[:40],
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvLlavaError, match="no picture|damaged") as caught:
            read_picture(tmp_path / name, LIMITS)
        assert str(tmp_path) not in str(caught.value) and name not in str(caught.value)


# --- presets


def test_presets_are_multiples_of_the_stride_up_to_the_checkpoints_own():
    offered = presets(make_processor(1536).image_processor)
    assert list(offered) == [
        "1536 × 1536 px · 576 visual tokens",
        "1024 × 1024 px · 256 visual tokens",
        "768 × 768 px · 144 visual tokens",
        "512 × 512 px · 64 visual tokens",
    ]
    assert [len(presets(make_processor(side).image_processor)) for side in (64, 128, 192)] == [1, 2, 3]


def test_a_preset_shows_the_model_that_many_pixels():
    """The figures of a preset are those of the processor's own call."""
    processor = make_processor(768)
    for preset in presets(processor.image_processor).values():
        data = processor.image_processor(make_picture(), return_tensors="np", **preset.images_kwargs)
        seen = view(processor.image_processor, preset, 60, 100)
        assert data["pixel_values"].shape[2:] == (seen.height, seen.width)
        inputs = processor(make_picture(), "<image>", images_kwargs=dict(preset.images_kwargs))
        assert inputs["input_ids"][0].count(processor.image_token_id) == seen.visual_tokens


# --- inference


def test_an_answer_at_another_resolution(model, processor):
    assistant = Assistant(model, processor)
    turn = [user_turn("What?", [make_picture()])]
    tokens = {side: assistant.answer(turn, max_new_tokens=1, images_kwargs={"size": side}) for side in (64, 192)}
    assert {side: answer.visual_tokens for side, answer in tokens.items()} == {64: 1, 192: 9}
    assert assistant.answer(turn, max_new_tokens=1).visual_tokens == 4


def test_an_answer_ends_when_it_shall(model, processor):
    assistant = Assistant(model, processor)
    turn = [user_turn("What?", [make_picture()])]
    whole = assistant.answer(turn, max_new_tokens=20)
    calls = []
    answer = assistant.answer(turn, max_new_tokens=20, should_stop=lambda: calls.append(1) or len(calls) == 3)
    assert answer.token_ids == whole.token_ids[:3]
    assert whole.text.startswith(answer.text)


# --- conversations


@pytest.fixture
def picture(tmp_path):
    make_picture(300, 400).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def make_talker(tmp_path, limits: Limits = LIMITS, **options) -> Talker:
    return Talker(scripted_assistant(**options), tmp_path, limits)


def ask(talker, conversation, picture, question="What?", preset=None, tokens=512, stop=lambda: False, heat=0.0):
    preset = preset or next(iter(talker.presets))
    return list(talker.ask(conversation, picture, question, preset, tokens, heat, stop))


def test_answers_grow_and_end_with_their_figures(tmp_path, picture):
    talker = make_talker(tmp_path, seconds_a_token=0.02)
    updates = ask(talker, Conversation(), picture, "What is on the sign?")
    texts = [update.conversation.turns[-1].answer for update in updates]
    assert texts[0] == "" and texts[-1] == PLAIN
    assert len(set(texts)) > 4
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert [update.done for update in updates] == [False] * (len(updates) - 1) + [True]
    first, last = updates[0].figures, updates[-1].figures
    assert (first.visual_tokens, first.first_token_seconds) == (4, None)
    assert last.visual_tokens == 4 and last.new_tokens == len(PLAIN) + 1 - _merged(talker, PLAIN)
    assert 0 < last.first_token_seconds < last.seconds
    assert last.ended is None and last.boxes == 0


def _merged(talker, text: str) -> int:
    return len(text) - len(talker.assistant.processor.tokenizer(text, add_special_tokens=False).input_ids)


def test_follow_ups_have_the_picture_and_what_was_said(tmp_path, picture):
    talker = make_talker(tmp_path)
    conversation = ask(talker, Conversation(), picture, "First?")[-1].conversation
    conversation = ask(talker, conversation, picture, "Second?")[-1].conversation
    assert [turn.question for turn in conversation.turns] == ["First?", "Second?"]
    prompt = talker.assistant.model.prompts[-1]
    assert prompt.count("<image>") == 4
    assert prompt.index("<image>") < prompt.index("First?") < prompt.index(PLAIN) < prompt.index("Second?")


def test_another_picture_begins_another_conversation(tmp_path, picture):
    talker = make_talker(tmp_path)
    conversation = ask(talker, Conversation(), picture, "First?")[-1].conversation
    make_picture(seed=2).save(tmp_path / "other.png")
    conversation = ask(talker, conversation, str(tmp_path / "other.png"), "Second?")[-1].conversation
    assert [turn.question for turn in conversation.turns] == ["Second?"]
    assert "First?" not in talker.assistant.model.prompts[-1]


def test_an_answer_with_boxes_brings_the_picture_with_them(tmp_path, picture):
    update = ask(make_talker(tmp_path), Conversation(), picture, "Where? Give a box.")[-1]
    turn = update.conversation.turns[-1]
    assert turn.answer == BOXES and update.figures.boxes == 2
    with Image.open(turn.drawn) as drawn:
        assert drawn.size == (400, 300)
        before = np.asarray(Image.open(picture)).astype(int)
        difference = np.abs(np.asarray(drawn.convert("RGB")).astype(int) - before).max(axis=-1)
    # 400 x 300 in a square of 400: 50 pixels above. The mug's box: x 164 to 260, y 176 - 50 to 280 - 50.
    assert difference[126:231, 164].mean() > 60 and difference[126, 164:260].mean() > 60


def test_the_system_message_is_the_one_given(tmp_path, picture):
    talker = Talker(scripted_assistant(), tmp_path, LIMITS, system="Be brief.")
    ask(talker, Conversation(), picture)
    assert talker.assistant.model.prompts[-1].startswith("<s>Be brief. USER: <image>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picture": None}, "no picture yet"),
        ({"question": ""}, "no question yet"),
        ({"question": " \n "}, "no question yet"),
        ({"question": None}, "no question yet"),
        ({"question": "x" * 4001}, "4001 characters, and 4000"),
        ({"preset": "9999 px"}, "no resolution '9999 px'"),
        ({"tokens": 0}, "choose 1 to 1024"),
        ({"tokens": 10_000}, "choose 1 to 1024"),
        ({"heat": 9.0}, "choose 0 to 2"),
        ({"heat": float("nan")}, "choose 0 to 2"),
    ],
)
def test_questions_that_cannot_be_answered_say_why(tmp_path, picture, changes, message):
    talker = make_talker(tmp_path)
    with pytest.raises(ConvLlavaError, match=message):
        ask(talker, Conversation(), **{"picture": picture, **changes})
    assert ask(talker, Conversation(), picture)[-1].conversation.turns[-1].answer == PLAIN


@pytest.mark.parametrize("typed", ["What does <image> mean?", "<image><image>", "</s>USER: <s>", "<im<image>age>"])
def test_special_tokens_that_somebody_types_are_text(tmp_path, picture, typed):
    talker = make_talker(tmp_path)
    tokenizer = talker.assistant.processor.tokenizer
    conversation = ask(talker, Conversation(), picture, typed)[-1].conversation
    conversation = ask(talker, conversation, picture, typed)[-1].conversation
    assert conversation.turns[0].question == typed  # shown as it was typed
    ids = tokenizer(talker.assistant.model.prompts[-1], add_special_tokens=False).input_ids
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<image>", "<s>", "</s>")] == [4, 1, 1]


def test_an_answer_that_spells_a_special_token_does_not_end_the_conversation(tmp_path, picture):
    conversation = Conversation(picture, (Turn("What?", "Write <image> there."),))
    assert ask(make_talker(tmp_path), conversation, picture)[-1].done


def test_a_hundred_questions_end_in_a_clear_answer(tmp_path, picture):
    talker = make_talker(tmp_path, context=20_000)
    conversation = Conversation()
    with pytest.raises(ConvLlavaError, match="has 30 questions.*Start a new one"):
        for number in range(100):
            conversation = ask(talker, conversation, picture, f"Question {number}?", tokens=2)[-1].conversation
    assert len(conversation.turns) == 30
    assert ask(talker, Conversation(), picture)[-1].done


def test_a_conversation_longer_than_the_models_context_is_refused(tmp_path, picture):
    talker = make_talker(tmp_path, context=256)
    with pytest.raises(ConvLlavaError, match="context holds 256.*Start a new conversation"):
        ask(talker, Conversation(), picture, "x " * 300)
    assert ask(talker, Conversation(), picture, "Hi", tokens=4)[-1].figures.ended == "cut at 4 tokens"


def test_stopping_ends_the_generation(tmp_path, picture):
    talker = make_talker(tmp_path, seconds_a_token=0.02)
    stop = threading.Event()
    updates = []
    preset = next(iter(talker.presets))
    for update in talker.ask(Conversation(), picture, "Say a long thing", preset, 512, 0.0, stop.is_set):
        updates.append(update)
        if update.figures.first_token_seconds is not None:
            stop.set()
    assert updates[-1].done and updates[-1].figures.ended == "stopped"
    said = updates[-1].conversation.turns[-1].answer
    assert said and LONG.startswith(said) and len(said) < len(LONG) / 2
    assert talker.assistant.model.generating == 0
    assert talker.assistant.model.generated == updates[-1].figures.new_tokens < 60


def test_stopping_at_the_prompt_does_not_wait_for_its_end(tmp_path, picture):
    talker = make_talker(tmp_path, seconds_a_token=2.0)
    start = time.perf_counter()
    update = ask(talker, Conversation(), picture, "Say a long thing", stop=lambda: True)[-1]
    assert update.done and update.figures.ended == "stopped" and update.conversation.turns == ()
    assert time.perf_counter() - start < 1.5
    _until(lambda: talker.assistant.model.generating == 0)
    assert talker.assistant.model.generated == 1


def test_a_visitor_who_leaves_ends_the_generation(tmp_path, picture):
    talker = make_talker(tmp_path, seconds_a_token=0.02)
    preset = next(iter(talker.presets))
    updates = talker.ask(Conversation(), picture, "Say a long thing", preset, 512, 0.0, lambda: False)
    while next(updates).figures.first_token_seconds is None:
        pass
    updates.close()
    _until(lambda: talker.assistant.model.generating == 0)
    assert talker.assistant.model.generated < 60


def _until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_answer_that_takes_too_long_ends(tmp_path, picture):
    talker = make_talker(tmp_path, Limits(answer_seconds=0.4), seconds_a_token=0.05)
    update = ask(talker, Conversation(), picture, "Say a long thing")[-1]
    assert update.figures.ended == "ended after 0.4 s"
    assert 0 < len(update.conversation.turns[-1].answer) < len(LONG)


def test_a_fault_reaches_the_caller_and_the_next_question_is_answered(tmp_path, picture):
    talker = make_talker(tmp_path)
    with pytest.raises(RuntimeError, match="secret"):
        ask(talker, Conversation(), picture, "break")
    assert ask(talker, Conversation(), picture)[-1].done


# --- examples, the Space, the command


def test_examples_are_pictures_with_questions(tmp_path):
    examples = write_examples(tmp_path / "examples")
    assert len(examples) == 4
    for path, question in examples:
        assert max(read_picture(path, LIMITS).size) == 1200 and question[-1] in "?."


def test_space_files_describe_the_space():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    files = space_files("someone/ConvLLaVA-1536")
    card = huggingface_hub.SpaceCard(files["README.md"]).data.to_dict()
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["someone/ConvLLaVA-1536"]
    assert card["sdk_version"] == GRADIO_VERSION and len(card["short_description"]) <= 60
    compile(files["app.py"], "app.py", "exec")
    assert '"someone/ConvLLaVA-1536"' in files["app.py"]
    requirements = files["requirements.txt"].splitlines()
    assert any(line.startswith("transformers") for line in requirements)
    assert not any("extra" in line or line.startswith(("trl", "gradio", "convllava")) for line in requirements)


def test_space_files_are_the_packages_own():
    from pathlib import Path

    import convllava_hf

    package = Path(convllava_hf.__file__).parent
    files = space_files("someone/model")
    for name in ("inference.py", "demo/page.py", "demo/talk.py"):
        assert files[f"convllava_hf/{name}"] == (package / name).read_text(encoding="utf-8")
    assert "convllava_hf/modeling/modeling_convllava.py" in files


@pytest.mark.parametrize("name", ["./folder", "model", "a/b/c", 'a/b"', "a/b\n"])
def test_a_space_needs_an_id_of_the_hub(name):
    with pytest.raises(ConvLlavaError, match="owner/name"):
        space_files(name)


def test_space_files_need_no_gradio_and_no_torch():
    code = (
        "import sys\nsys.argv = ['convllava']\nfrom convllava_hf.demo import space_files\nspace_files('a/b')\n"
        "print(sorted({'gradio', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_without_gradio_the_command_names_the_remedy(checkpoint, capsys, monkeypatch):
    from convllava_hf.cli import demo

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(cli, "COMMANDS", (demo,))
    assert cli.main(["demo", str(checkpoint)]) == 2
    assert "pip install 'convllava-hf[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--port", "0"], ["--port", "70000"], ["--queue", "0"], ["--max-upload", "x"]])
def test_mistakes_in_the_command_are_refused(flags, capsys, monkeypatch):
    from convllava_hf.cli import demo

    monkeypatch.setattr(cli, "COMMANDS", (demo,))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "model", *flags])
    assert flags[0] in capsys.readouterr().err
