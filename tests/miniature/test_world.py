"""The miniature world: what is drawn is read back from the pixels, and every answer follows from what is seen."""

import hashlib
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest


pytest.importorskip("sklearn")

from helpers.fresh_process import run_fresh  # noqa: E402
from helpers.miniature_sight import DetectedThing, answer_of, digits, handwriting_in, place, print_in, see, see_sign  # noqa: E402
from PIL import Image  # noqa: E402

from convllava_hf.errors import ConvLlavaError  # noqa: E402
from convllava_hf.miniature import drawing, language  # noqa: E402
from convllava_hf.miniature.world import COLORS, SHAPES, Scene, Sign, Thing, World  # noqa: E402


SMALL = World(thing_sizes=(2, 4), sign_sizes=(2, 3))
MIX = language.Mix(captions=0.2, grounded_captions=0.2, boxes=0.3)


def scenes(count: int, split: str = "train", seed: int = 0, world: World | None = None) -> list[Scene]:
    return list(itertools.islice((world or World()).scenes(split, seed), count))


@pytest.fixture(scope="module")
def asked() -> dict[str, list[tuple[Scene, language.Question]]]:
    """Questions about 2400 test scenes by kind."""
    rng, found = np.random.default_rng(5), defaultdict(list)
    for scene in scenes(2400, "test", seed=5):
        for question in language.questions(scene, rng):
            found[question.kind].append((scene, question))
    return found


@pytest.mark.parametrize("world, side", [(World(), 256), (World(), 128), (SMALL, 512)], ids=["256", "128", "small"])
def test_what_is_drawn_is_what_the_scene_says(world, side):
    """Colors, shapes and boxes read from the pixels; boxes to within a pixel, as their edges lie between pixels."""
    for scene in scenes(40, seed=1, world=world):
        image = drawing.draw(scene, side)
        assert image.size == (side, side) and image.mode == "RGB"
        seen = sorted(see(image), key=lambda thing: (thing.color, thing.shape))
        things = sorted(scene.things, key=lambda thing: (thing.color, thing.shape))
        assert [(one.color, one.shape) for one in seen] == [(one.color, one.shape) for one in things]
        boxes = [one.box for one in seen] + [see_sign(image)]
        expected = np.array([one.box for one in [*things, scene.sign]]) / 20 * side
        np.testing.assert_allclose(boxes, expected, atol=1)
        empty = np.ones((side, side), bool)
        for left, top, right, bottom in boxes:
            empty[top:bottom, left:right] = False
        assert (np.asarray(image)[empty] == scene.background).all()


@pytest.mark.parametrize("world, side", [(World(), 256), (SMALL, 512)], ids=["256", "small"])
def test_signs_say_their_digit(world, side):
    targets = digits().target
    for scene in scenes(60, seed=2, world=world):
        image = drawing.draw(scene, side)
        if scene.sign.handwriting is None:
            assert print_in(image, see_sign(image)) == scene.sign.digit
        else:
            assert targets[handwriting_in(image, see_sign(image))] == scene.sign.digit


@pytest.mark.slow
def test_splits_show_the_handwriting_of_different_images():
    """By the pixels, and by the images that signs are drawn from, which are all of scikit-learn's."""
    shown = {}
    for split in ("train", "test"):
        signs = [scene for scene in scenes(150, split) if scene.sign.handwriting is not None]
        images = [drawing.draw(scene) for scene in signs]
        shown[split] = {handwriting_in(image, see_sign(image)) for image in images}
        assert len(shown[split]) > 40
    assert not shown["train"] & shown["test"]
    known = {split: [ink.tobytes() for digit in drawing.handwritten_digits(split) for ink in digit] for split in shown}
    assert not set(known["train"]) & set(known["test"])
    assert len(known["train"]) + len(known["test"]) == len(digits().images)
    for split in shown:
        for digit, images in enumerate(drawing.handwritten_digits(split)):
            assert len(images) > 20
            originals = (digits().images[digits().target == digit] * 255 / 16).round()
            assert {ink.tobytes() for ink in images} <= {ink.tobytes() for ink in originals.astype(np.uint8)}


def test_scenes_are_as_promised():
    drawn = scenes(400) + scenes(100, world=SMALL)
    for scene in drawn:
        kinds = [(thing.color, thing.shape) for thing in scene.things]
        assert 1 <= len(kinds) == len(set(kinds)) <= 4
        assert {color for color, _ in kinds} <= set(COLORS) and {shape for _, shape in kinds} <= set(SHAPES)
        boxes = [one.box for one in [*scene.things, scene.sign]]
        covered = np.zeros((20, 20), int)
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= 20 and 0 <= top < bottom <= 20 and right - left == bottom - top
            covered[top : bottom + 1, left : right + 1] += 1  # with a gap to the right and below
        assert covered.max() == 1
        assert len({place(box, 20) for box in boxes}) == len(boxes)
    for world, some in ((World(), drawn[:400]), (SMALL, drawn[400:])):
        for allowed, sizes in (
            (world.thing_sizes, {one.box[2] - one.box[0] for scene in some for one in scene.things}),
            (world.sign_sizes, {scene.sign.box[2] - scene.sign.box[0] for scene in some}),
        ):
            assert sizes == set(range(allowed[0], allowed[1] + 1))
    written = sum(scene.sign.handwriting is not None for scene in drawn[:400])
    assert abs(written - 200) < 4.5 * math.sqrt(100)
    assert all(scene.sign.handwriting is None for scene in scenes(50, world=World(handwritten=0.0)))


@pytest.mark.slow
def test_no_scene_is_in_both_splits():
    """The split follows from what is in a scene and where, whatever order, paper, pen and number came with it."""
    facts = {}
    for split, number in (("train", 500), ("test", 150)):
        drawn = scenes(number, split)
        for scene in drawn:
            assert scene.split == split
            other = replace(scene, things=scene.things[::-1], counted="ring", background=(1, 2, 3))
            assert other.split == replace(other, sign=replace(scene.sign, handwriting=7)).split == split
        facts[split] = {(frozenset(scene.things), scene.sign.digit, scene.sign.box) for scene in drawn}
    assert not facts["train"] & facts["test"]
    moved = [replace(scene, sign=replace(scene.sign, digit=(scene.sign.digit + 1) % 10)) for scene in scenes(500)]
    share = sum(scene.split == "test" for scene in moved) / 500
    assert abs(share - 1 / 8) < 4.5 * math.sqrt(1 / 8 * 7 / 8 / 500)
    with pytest.raises(ValueError, match="no split 'validation'; expected train or test"):
        next(World().scenes("validation", 0))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_world_in_another_process():
    script = """
        import hashlib, itertools
        import numpy as np
        from convllava_hf.miniature import drawing, language
        from convllava_hf.miniature.tokenizer import make_tokenizer
        from convllava_hf.miniature.world import World

        rng, told = np.random.default_rng(3), hashlib.sha256()
        for scene in itertools.islice(World().scenes("train", 9), 40):
            told.update(repr((scene, language.conversation(scene, rng, language.Mix(0.2, 0.2, 0.3)))).encode())
            told.update(drawing.draw(scene).tobytes())
        told.update(make_tokenizer().backend_tokenizer.to_str().encode())
        result = told.hexdigest()
    """
    from convllava_hf.miniature.tokenizer import make_tokenizer

    rng, told = np.random.default_rng(3), hashlib.sha256()
    for scene in scenes(40, seed=9):
        told.update(repr((scene, language.conversation(scene, rng, MIX))).encode())
        told.update(drawing.draw(scene).tobytes())
    told.update(make_tokenizer().backend_tokenizer.to_str().encode())
    assert run_fresh(script, package=True, env={"PYTHONHASHSEED": "123"}) == told.hexdigest()


def test_other_seeds_and_splits_give_other_scenes():
    streams = [scenes(50, split, seed) for split in ("train", "test") for seed in (0, 1, 2)]
    assert len(set(itertools.chain(*streams))) == 300
    assert scenes(50, "test", 2) == streams[-1]


@pytest.mark.slow
def test_answers_follow_from_the_image():
    """Everything that is asked and said, recomputed from pixels by other code."""
    rng, kinds = np.random.default_rng(0), Counter()
    for scene in scenes(150, "test", seed=3):
        image = drawing.draw(scene)
        things = see(image)
        for question in language.questions(scene, rng):
            kinds[question.kind] += 1
            assert answer_of(question.text, things, scene.sign.digit) == question.answer, question
        everything = [*things, DetectedThing("", "sign", see_sign(image))]
        for mix in (language.Mix(1, 0, 0), language.Mix(0, 1, 0)):
            ((prompt, caption),) = language.conversation(scene, rng, mix)
            assert answer_of(prompt, everything, scene.sign.digit) == caption
        cells = [("ground",)] * 16
        for thing in everything:
            row, column = place(thing.box, 256)
            words = ("sign", str(scene.sign.digit)) if thing.shape == "sign" else (thing.color, thing.shape)
            cells[4 * (row - 1) + column - 1] = words
        assert language.text_image(scene) == cells
    assert min(kinds[kind] for kind in ("reading", "presence", "count", "grounding")) == 150
    assert min(kinds.values()) > 100


@pytest.mark.slow
def test_questions_come_in_the_order_of_their_kinds(asked):
    rng = np.random.default_rng(0)
    for scene in scenes(50):
        order = [language.KINDS.index(question.kind) for question in language.questions(scene, rng)]
        assert order == sorted(set(order))
    assert set(asked) == set(language.KINDS)


def test_conversations_are_captions_or_boxes_or_questions():
    """Whoever has been asked for a thing's box need not look to know that it is there."""
    scene = next(scene for scene in scenes(50) if len(scene.things) == 3)
    boxes = sorted(f"Give the bounding box of the {thing.color} {thing.shape}." for thing in scene.things)
    kinds = [question.text for question in language.questions(scene, np.random.default_rng(0))]
    others = sorted(text[:8] for text in kinds if not text.startswith("Give"))
    rng, number = np.random.default_rng(0), 3000
    about, orders = Counter(), defaultdict(set)
    for _ in range(number):
        prompts = [prompt for prompt, _ in language.conversation(scene, rng, MIX)]
        if prompts[0].startswith("Describe"):
            (what,) = prompts
        elif prompts[0].startswith("Give"):
            what = "boxes"
            assert sorted(prompts) == boxes
        else:
            what = "questions"
            prompts = [prompt[:8] for prompt in prompts]  # what they ask for is drawn anew
            assert sorted(prompts) == others
        about[what] += 1
        orders[what].add(tuple(prompts))
    shares = {
        "Describe the picture.": 0.2,
        "Describe the picture with bounding boxes.": 0.2,
        "boxes": 0.3,
        "questions": 0.3,
    }
    assert set(about) == set(shares)
    for what, share in shares.items():
        assert abs(about[what] / number - share) < 4.5 * math.sqrt(share * (1 - share) / number), what
    assert len(orders["boxes"]) == math.factorial(len(boxes))  # in any order
    assert len(orders["questions"]) == math.factorial(len(others))


def test_boxes_come_after_all_else():
    """As many as the mix says, of different things, and fewer where there are no more."""
    rng = np.random.default_rng(0)
    for scene in scenes(30):
        others = [q.text[:8] for q in language.questions(scene, np.random.default_rng(0)) if q.kind != "grounding"]
        boxes = {f"Give the bounding box of the {thing.color} {thing.shape}." for thing in scene.things}
        prompts = [prompt for prompt, _ in language.conversation(scene, rng, language.Mix(0, 0, 0, boxes_at_end=2))]
        assert sorted(prompt[:8] for prompt in prompts[: len(others)]) == sorted(others)
        last = set(prompts[len(others) :])
        assert last <= boxes and len(last) == len(prompts) - len(others) == min(2, len(boxes))


CLASSES = {"reading": 10, "color": 6, "shape": 5, "presence": 2, "count": 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind, classes", CLASSES.items())
def test_no_constant_answer_is_right_often(asked, kind, classes):
    """Nor one that knows the question's text: each answer is as likely as any other, within 4.5 deviations."""
    by_text = defaultdict(Counter)
    for _, question in asked[kind]:
        by_text[question.text][question.answer] += 1
        by_text["any"][question.answer] += 1
    assert len(by_text["any"]) == classes
    for text, answers in by_text.items():
        number = answers.total()
        deviation = 4.5 * math.sqrt(1 / classes * (1 - 1 / classes) / number)
        assert max(answers.values()) / number < 1 / classes + deviation, text


@pytest.mark.slow
def test_answers_do_not_follow_from_how_much_there_is(asked):
    """The number of things says nothing about presence, color, shape or digit."""
    for kind in ("reading", "color", "shape", "presence"):
        by_number = defaultdict(Counter)
        for scene, question in asked[kind]:
            by_number[len(scene.things)][question.answer] += 1
        for answers in by_number.values():
            share, number = 1 / CLASSES[kind], answers.total()
            assert max(answers.values()) / number < share + 4.5 * math.sqrt(share * (1 - share) / number)


def best_constant_box(asked) -> tuple[float, int]:
    """How many of the true boxes the best of all square boxes on the grid overlaps by half, and how many there are."""
    truths = np.array([json.loads(question.answer) for _, question in asked["grounding"]])
    squares = [(x, y, x + s, y + s) for s in range(3, 12) for x in range(21 - s) for y in range(21 - s)]
    squares = np.array(squares) / 20
    top_left = np.maximum(truths[:, None, :2], squares[None, :, :2])
    bottom_right = np.minimum(truths[:, None, 2:], squares[None, :, 2:])
    shared = (bottom_right - top_left).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (truths, squares)]
    right = shared >= 0.5 * (areas[0][:, None] + areas[1][None] - shared)
    return right.mean(0).max(), len(truths)


@pytest.mark.slow
def test_no_constant_box_is_right_often(asked):
    share, number = best_constant_box(asked)
    assert share < 0.05 + 4.5 * math.sqrt(0.05 * 0.95 / number)


@pytest.mark.slow
def test_half_of_what_is_absent_is_made_of_what_is_there(asked):
    """Else "is there a red square" could be answered by looking for anything red."""
    mixed = Counter()
    for scene, question in asked["presence"]:
        color, shape = question.text[:-1].split()[-2:]
        kinds = {(thing.color, thing.shape) for thing in scene.things}
        if question.answer == "no" and len({c for c, _ in kinds}) * len({s for _, s in kinds}) > len(kinds):
            both = color in {c for c, _ in kinds} and shape in {s for _, s in kinds}
            mixed[both] += 1
    assert mixed[True] / mixed.total() > 0.5


def test_unknown_shapes_are_refused():
    image = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="no shape 'star'"):
        drawing.draw_thing(image, Thing("red", "star", (0, 0, 10, 10)), 3.2)


def test_without_scikit_learn_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConvLlavaError, match="scikit-learn.*: pip install"):
        drawing.handwritten_digits.__wrapped__("train")


def test_signs_of_any_size_are_drawn_within_their_box():
    for size in (1, 2, 5, 20):
        for handwriting in (None, 3):
            image = Image.new("RGB", (100, 100), (90, 90, 91))
            drawing.draw_sign(image, Sign(8, (0, 0, size, size), handwriting), 5, "train")
            changed = (np.asarray(image) != (90, 90, 91)).any(-1)
            assert changed[: 5 * size, : 5 * size].all() and changed.sum() == (5 * size) ** 2


@pytest.mark.parametrize("sizes", [{"thing_sizes": (7, 8)}, {"sign_sizes": (4, 9)}, {"sign_sizes": (5, 4)}], ids=str)
def test_worlds_without_room_are_refused(sizes):
    with pytest.raises(ValueError, match=r"would not fit.*expected a smallest of 1 to 6 and a largest up to 8"):
        World(**sizes)
