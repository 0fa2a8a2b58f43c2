"""What the miniature's language model learns from: the tokenizer, and scenes in words with questions about them."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import transformers


pytest.importorskip("sklearn")

from helpers.miniature_sight import DetectedThing, answer_of  # noqa: E402

from convllava_hf.miniature import language  # noqa: E402
from convllava_hf.miniature.text_images import text_batches, weighted_loss  # noqa: E402
from convllava_hf.miniature.tokenizer import make_tokenizer  # noqa: E402
from convllava_hf.miniature.world import COLORS, SHAPES, World  # noqa: E402


TURN = re.compile(r"USER: (.*?) ASSISTANT: (.*?)</s>", re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Everything that can be said about 200 scenes that the tokenizer was not made from."""
    rng, said = np.random.default_rng(0), []
    for scene in itertools.islice(World().scenes("test", 7), 200):
        said.append("".join(f" {word}" for words in language.text_image(scene) for word in words))
        for mix in (language.Mix(1, 0, 0), language.Mix(0, 1, 0), language.Mix(0, 0, 1), language.Mix(0, 0, 0)):
            for prompt, answer in language.conversation(scene, rng, mix):
                said += [f" {prompt}", f" {answer}"]
    return said


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turn(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def test_the_tokenizer_round_trips(tokenizer, texts):
    for text in [*texts, "Grüße, 世界!\n\tTwo  blanks 🙂 and <tags> of 3.14159", " ", ""]:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text


def test_every_word_is_one_token(tokenizer, texts):
    """Words with the blank before them, the numbers of a box with the mark beside them, other marks of punctuation."""
    assert_one_token_a_word(tokenizer, texts)


def test_every_word_is_one_token_after_the_image_too(tokenizer, texts):
    """The first question stands at the beginning of a line."""
    assert_one_token_a_word(tokenizer, [text.strip() for text in texts if text.endswith(("?", "."))])


def assert_one_token_a_word(tokenizer, texts: list[str]) -> None:
    for text in texts:
        words = re.findall(r" ?[A-Za-z]+| \[[0-9]\.[0-9]{2},| [0-9]\.[0-9]{2}[,\]]| ?[0-9]| ?[.,:?]", text)
        assert "".join(words) == text
        assert tokenizer.convert_ids_to_tokens(ids_of(tokenizer, text)) == [word.replace(" ", "Ġ") for word in words]


@pytest.mark.slow
@pytest.mark.parametrize("world", [World(), World(thing_sizes=(2, 4), sign_sizes=(2, 3))], ids=["usual", "small"])
def test_every_word_of_the_world_is_known(world):
    tokenizer = make_tokenizer(world)
    words = [" ground", " sign", *(f" {digit}" for digit in range(10))]
    words += [f" {word}" for word in (*COLORS, *SHAPES, "yes", "no", "one", "two", "three")]
    smallest = world.thing_sizes[0]
    words += [f" [{step / 20:.2f}," for step in range(21 - smallest)]  # left edges
    words += [f" {step / 20:.2f}," for step in range(21)]
    words += [f" {step / 20:.2f}]" for step in range(smallest, 21)]  # lower ones
    assert [word for word in words if len(ids_of(tokenizer, word)) != 1] == []
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]


def parts_of(batch) -> list[list[tuple[list[int], list[int], list[float]]]]:
    """Ids, labels and weights of each row's parts: the image, and every question with its answer.

    By the mask alone: a question begins where a position sees nothing of the one before it.
    """
    rows = []
    for ids, labels, weights, mask in zip(
        batch["input_ids"], batch["labels"], batch["weights"], batch["attention_mask"][:, 0], strict=True
    ):
        seen, length = mask == 0, int((ids != 0).sum())  # 0 is <pad>
        first = next(place for place in range(length) if not seen[length - 1, place])  # the last sees but the image
        starts = [0, first, *(place for place in range(first + 1, length) if not seen[place, place - 1])]
        ends = [*starts[1:], length]
        told = (ids.tolist(), labels.tolist(), weights.tolist())
        rows.append([tuple(values[start:end] for values in told) for start, end in zip(starts, ends, strict=True)])
    return rows


@pytest.fixture(scope="module")
def text_batch(tokenizer):
    return next(text_batches(tokenizer, World(), 3, 32))


def test_questions_about_text_are_tokenized_as_the_chat_template_does(tokenizer, text_batch):
    """An image with any of its questions is a conversation of one turn; what trains is what the assistant says."""
    number = 0
    for image, *asked in parts_of(text_batch):
        assert set(image[1]) == {-100}
        for ids, labels, _ in asked:
            whole = image[0] + ids
            ((prompt, answer),) = TURN.findall(tokenizer.decode(whole))
            told = tokenizer.apply_chat_template(
                turn(prompt, answer), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            assert whole == told["input_ids"]
            masks = told["assistant_masks"][len(image[0]) :]
            assert labels == [token if said else -100 for token, said in zip(ids, masks, strict=True)]
            number += 1
    assert number > 32 * 5


def test_every_answer_weighs_the_same(tokenizer, text_batch):
    """But for boxes, which say four things each, and numbers."""
    for _, *asked in parts_of(text_batch):
        for ids, labels, weights in asked:
            said = tokenizer.decode(ids)
            weight = 4 if said.startswith("Give") else 2 if said.startswith("How many") else 1
            assert sum(weights) == pytest.approx(weight)
            assert [weight > 0 for weight in weights] == [label != -100 for label in labels]


def test_questions_in_a_batch_are_answered_as_if_alone(tokenizer, text_batch):
    """Positions, mask and padding: the loss of a batch is the weighted mean of the model's own of single questions."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    boxes = torch.nn.Linear(language.EDGES, config.hidden_size, bias=False)
    losses, answers_weigh = [], []
    with torch.no_grad():
        told = zip(parts_of(text_batch)[:6], text_batch["beside"], text_batch["edges"], strict=False)
        for (image, *asked), beside, edges in told:
            for ids, labels, weights in asked:
                embed = model.get_input_embeddings()
                embeddings = embed(torch.tensor([image[0] + ids]))
                embeddings[0, : len(image[0])] += boxes(edges[: len(image[0])])
                for place, token in enumerate(beside.tolist()):
                    if token >= 0:
                        embeddings[0, place] += embed.weight[token]
                labels = torch.tensor([image[1] + labels])
                losses.append(model(inputs_embeds=embeddings, labels=labels).loss.item())
                answers_weigh.append(sum(weights))
        some = {name: values[:6] for name, values in text_batch.items()}
        together = weighted_loss(model, boxes, some)
    assert together.item() == pytest.approx(np.average(losses, weights=answers_weigh), abs=1e-4)


def test_text_batches_tell_what_is_asked(tokenizer):
    """Every answer, by other code, from the text image that comes first; no question twice."""
    captions, number = 0, 0
    batch = next(text_batches(tokenizer, World(), 0, 64))
    for (image, *asked), beside, edges in zip(parts_of(batch), batch["beside"], batch["edges"], strict=True):
        first = re.fullmatch(r"<s>USER: (.*)\n", tokenizer.decode(image[0]))[1].split(" ")
        assert len(first) == 16
        cells = slice(-16 - 1 + len(image[0]), len(image[0]) - 1)  # a line break ends the text image
        second = [tokenizer.decode(token).strip() if token >= 0 else "" for token in beside[cells].tolist()]
        there = [bool(word) for word in second]
        assert there == [word != "ground" for word in first] == edges[cells].any(1).tolist()
        assert (beside >= 0).sum() == edges.any(1).sum() == sum(there)  # nothing elsewhere
        told = zip(first, second, edges[cells], strict=True)
        things = [DetectedThing(*words, box_of(edges_of_cell)) for *words, edges_of_cell in told if words[1]]
        (sign,) = [thing for thing in things if thing.color == "sign"]
        things.remove(sign)
        everything = [*things, DetectedThing("", "sign", sign.box)]
        turns = [re.fullmatch(r"(.*) ASSISTANT: (.*)</s>", tokenizer.decode(ids)).groups() for ids, _, _ in asked]
        assert len(dict(turns)) == len(turns)
        for prompt, answer in turns:
            is_caption = prompt.startswith("Describe")
            captions, number = captions + is_caption, number + (not is_caption)
            assert answer_of(prompt, everything if is_caption else things, int(sign.shape), 1) == answer
    assert captions > 5 and number > 300


def test_without_boxes_none_are_told_or_asked_for(tokenizer):
    batch = next(text_batches(tokenizer, World(), 0, 32, boxes=False))
    asked = [tokenizer.decode(ids) for _, *parts in parts_of(batch) for ids, _, _ in parts]
    assert not batch["edges"].any() and not any("box" in text for text in asked)
    assert sum(text.startswith("Describe") for text in asked) > 0


def box_of(edges) -> tuple[float, ...]:
    """Left, top, right and bottom from 0 to 1, by the longest of the waves alone: half of it is the image's side."""
    sines, cosines = edges.reshape(2, 4, -1)
    return tuple((torch.atan2(sines[:, 0], cosines[:, 0]) / math.pi).tolist())
