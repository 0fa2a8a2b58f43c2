"""Our class for VLMEvalKit, against a double of its `BaseModel` written after the documented contract."""

import importlib
import sys
import types

import pytest
from helpers.tiny_models import make_image

from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import assistant_turn, load, user_turn


class BaseModel:
    """What VLMEvalKit does before it calls `generate_inner` or `chat_inner`: it makes a list of dicts of any message,
    and refuses types that the model does not name."""

    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, function):
        self.dump_image_func = function

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def _listed(self, message):
        parts = message if isinstance(message, list) else [message]
        listed = []
        for part in parts:
            if isinstance(part, str):
                part = {"type": "image" if part.endswith(".png") else "text", "value": part}
            assert part["type"] in self.allowed_types
            listed.append(part)
        return listed

    def generate(self, message, dataset=None):
        return self.generate_inner(self._listed(message), dataset)

    def chat(self, messages, dataset=None):
        listed = [{**message, "content": self._listed(message["content"])} for message in messages]
        return self.chat_inner(listed, dataset=dataset)


@pytest.fixture
def kit(monkeypatch):
    """The module under test, imported with the double in VLMEvalKit's place."""
    names = ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base", "vlmeval.dataset")
    modules = {name: types.ModuleType(name) for name in names}
    modules["vlmeval.vlm.base"].BaseModel = BaseModel
    modules["vlmeval.dataset"].DATASET_TYPE = lambda name: "MCQ" if name.startswith("MMBench") else "VQA"
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("convllava_hf.evaluation.vlmevalkit", None)
    yield importlib.import_module("convllava_hf.evaluation.vlmevalkit")
    del sys.modules["convllava_hf.evaluation.vlmevalkit"]


@pytest.fixture
def paths(tmp_path) -> list[str]:
    for number in range(2):
        make_image(seed=number).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(2)]


@pytest.fixture
def images() -> list:
    return [make_image(seed=number) for number in range(2)]


@pytest.fixture
def convllava(kit, checkpoint):
    return kit.ConvLlava(str(checkpoint), max_new_tokens=8, device="cpu", dtype="float32")


@pytest.fixture
def answer(checkpoint):
    """What the model answers without VLMEvalKit."""
    assistant = load(checkpoint, device="cpu", dtype="float32")

    def answer(*turns, **image_options):
        return assistant.with_image_options(**image_options).answer(list(turns), max_new_tokens=8).text.strip()

    return answer


def test_messages_are_answered_in_their_order(convllava, answer, paths, images):
    one = [{"type": "image", "value": paths[0]}, {"type": "text", "value": "What is this?"}]
    expected = answer(user_turn("What is this?", images[:1]))
    assert convllava.generate(one) == convllava.generate([paths[0], "What is this?"]) == expected
    assert convllava.generate("No image") == answer(user_turn("No image"))
    assert convllava.INTERLEAVE  # else VLMEvalKit might show the first image alone
    mixed = ["First", paths[0], "then", paths[1], "Which?"]
    expected = answer(user_turn("First<image>then<image>Which?", images))
    assert convllava.generate(mixed) == expected != convllava.generate(["First", paths[1], "then", paths[0], "Which?"])


def test_conversations_go_on(convllava, answer, paths, images):
    first = {"role": "user", "content": [paths[0], "What is this?"]}
    said = {"role": "assistant", "content": "A sign."}
    then = {"role": "user", "content": "Are you sure?"}
    expected = answer(user_turn("What is this?", images[:1]), assistant_turn("A sign."), user_turn("Are you sure?"))
    assert convllava.chat([first, said, then]) == expected != convllava.chat([first])
    system = {"role": "system", "content": "Be brief."}
    assert convllava.chat([system, first]) != convllava.chat([first])


def test_multiple_choice_is_asked_for_a_letter(convllava, answer, paths, images):
    assert convllava.use_custom_prompt("MMBench_DEV_EN") and not convllava.use_custom_prompt("TextVQA_VAL")
    convllava.set_dump_image(lambda line: [paths[line["index"]]])
    line = {"index": 1, "hint": float("nan"), "question": "Which?", "A": "red", "B": "blue", "C": None, "answer": "B"}
    message = convllava.build_prompt(line, dataset="MMBench_DEV_EN")
    text = "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    assert message == [{"type": "image", "value": paths[1]}, {"type": "text", "value": text}]
    assert convllava.build_prompt({**line, "hint": "Look"}, "MMBench_DEV_EN")[1]["value"] == f"Look\n{text}"
    assert convllava.generate(message, dataset="MMBench_DEV_EN") == answer(user_turn(text, images[1:]))


def test_the_size_of_images_is_followed(kit, checkpoint, answer, paths, images):
    small = kit.ConvLlava(str(checkpoint), max_new_tokens=8, device="cpu", dtype="float32", image_options={"size": 64})
    turn = user_turn("What is this?", images[:1])
    assert small.generate([paths[0], "What is this?"]) == answer(turn, size=64) != answer(turn)


def test_what_is_no_image_is_refused(convllava, tmp_path):
    with pytest.raises(ConvLlavaError, match="Cannot read the image"):
        convllava.generate([str(tmp_path / "missing.png"), "What is this?"])
    with pytest.raises(ConvLlavaError, match="holds video"):
        convllava.generate_inner([{"type": "video", "value": "film.mp4"}])
