import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import ask, make_image, make_model, make_processor, make_tokenizer
from jinja2.exceptions import TemplateError
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor

from convllava_hf import ConvLlavaImageProcessor, ConvLlavaProcessor


IMAGE = 3  # the placeholder's id in the tiny tokenizer
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def rendered(processor, messages, **kwargs) -> str:
    return processor.apply_chat_template(messages, **kwargs)


def part(kind, value=None) -> dict:
    return {"type": "image"} if kind == "image" else {"type": "text", "text": value}


@pytest.mark.parametrize("side, tokens", [(64, 1), (128, 4), (320, 25)])
def test_each_image_gets_a_placeholder_for_every_visual_token(side, tokens):
    processor = make_processor(side)
    output = processor(images=make_image(), text="Look: <image> there", return_tensors="pt")
    assert (output["input_ids"] == IMAGE).sum() == tokens
    model = make_model()
    assert len(model.get_image_features(output["pixel_values"], output["image_sizes"]).pooler_output[0]) == tokens
    counted = processor._get_num_multimodal_tokens(image_sizes=[(100, 60), (7, 5)])
    assert counted.num_image_tokens == [tokens] * 2 and counted.num_image_patches == [1, 1]


def test_counts_follow_a_size_chosen_per_call(processor):
    output = processor(images=[make_image()] * 2, text="<image><image>", size=192, return_tensors="pt")
    assert (output["input_ids"] == IMAGE).sum() == 18 and output["pixel_values"].shape == (2, 3, 192, 192)
    assert processor._get_num_multimodal_tokens(image_sizes=[(10, 20)], size=192).num_image_tokens == [9]
    nested = processor(
        images=[make_image()] * 2, text="<image><image>", images_kwargs={"size": 192}, return_tensors="pt"
    )
    assert (nested["input_ids"] == IMAGE).sum() == 18


def test_images_of_different_sizes_get_different_counts(processor):
    images = [make_image(64, 64), make_image(128, 128)]
    output = processor(images=images, text="<image> and <image>.", do_resize=False, return_tensors="pt")
    assert (output["input_ids"] == IMAGE).sum() == 1 + 4
    with torch.no_grad():
        assert make_model()(**output).logits.isfinite().all()


def test_template_is_vicunas(processor):
    chat = [
        {"role": "user", "content": [part("image"), part("text", "What is it?")]},
        {"role": "assistant", "content": [part("text", "A cat.")]},
        {"role": "user", "content": "And now?"},
    ]
    expected = f"<s>{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: And now? "
    assert rendered(processor, chat) == expected
    assert rendered(processor, chat, add_generation_prompt=True) == expected + "ASSISTANT:"
    system = [{"role": "system", "content": "Be brief."}, *chat[:1]]
    assert rendered(processor, system) == "<s>Be brief. USER: <image>\nWhat is it? "


@pytest.mark.parametrize(
    "content, expected",
    [
        ([part("text", "Q"), part("image")], "<image>\nQ"),
        ([part("image"), part("image"), part("text", "Q")], "<image>\n<image>\nQ"),
        ([part("image"), part("text", "Q"), part("image")], "<image>\n<image>\nQ"),
        ([part("text", "Look at "), part("image"), part("text", " now")], "Look at <image> now"),
        (
            [part("image"), part("text", "a "), part("image"), part("text", " b"), part("image")],
            "<image>\na <image> b<image>",
        ),
        ([part("image")], "<image>"),
        ([part("image"), part("image"), part("text", "")], "<image>\n<image>"),
        ([part("text", ""), part("image"), part("text", "Q")], "<image>\nQ"),
        ([{"type": "text", "text": "Q", "image": None}], "Q"),
        ("Look at <image> now", "Look at <image> now"),
    ],
)
def test_images_stand_first_unless_between_texts(processor, content, expected):
    text = rendered(processor, [{"role": "user", "content": content}])
    assert text == f"<s>{SYSTEM} USER: {expected} "


def test_unknown_roles_are_refused(processor):
    with pytest.raises(TemplateError, match="role is 'tool'"):
        rendered(processor, [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "x"}])
    with pytest.raises(TemplateError, match="role is 'system'"):
        rendered(processor, [{"role": "user", "content": "Hi"}, {"role": "system", "content": "x"}])


@pytest.mark.parametrize("kind", ["video", "input_text"])
def test_parts_that_are_neither_text_nor_image_are_refused(processor, kind):
    with pytest.raises(TemplateError, match=f"part is of type '{kind}'"):
        rendered(processor, [{"role": "user", "content": [{"type": kind}, part("text", "Q")]}])


def test_template_and_processor_call_agree(processor):
    chat = ask("What?", make_image())
    tokenized = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    text = rendered(processor, chat, add_generation_prompt=True)
    called = processor(images=[make_image()], text=text, add_special_tokens=False, return_tensors="pt")
    assert tokenized.keys() == called.keys()
    for name in called:
        assert torch.equal(tokenized[name], called[name])
    assert (tokenized["input_ids"] == 1).sum() == 1  # one beginning of sequence


@pytest.fixture(scope="module")
def beginning() -> ConvLlavaProcessor:
    """A processor whose tokenizer puts `<s>` before every text, as Llama's does."""
    processor = make_processor()
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return processor


def test_a_prompt_that_begins_with_the_beginning_of_a_sequence_gets_no_second_one(beginning):
    image = make_image()
    chat = ask("What?", image)
    one_step = beginning.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    two_steps = beginning(images=image, text=rendered(beginning, chat))["input_ids"]
    assert two_steps == [one_step[0] if isinstance(one_step[0], list) else one_step]
    plain = beginning(text="What?")["input_ids"][0]
    assert plain[0] == 1 and plain.count(1) == 1
    assert beginning(text="<s>What?")["input_ids"] == beginning(text="<s>What?", add_special_tokens=True)["input_ids"]
    assert beginning(text="<s>What?")["input_ids"] == [plain]
    assert beginning(text="What?", add_special_tokens=False)["input_ids"] == [plain[1:]]
    with pytest.raises(ValueError, match=f"Prompt 0 is {len(two_steps[0])} tokens long"):
        beginning(images=image, text=rendered(beginning, chat), truncation=True, max_length=9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": True, "padding_side": "right", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 40, "truncation": True, "return_tensors": "pt"},
        {"padding": "longest", "max_length": 14, "truncation": True},
    ],
    ids=str,
)
def test_prompts_with_and_without_the_beginning_of_a_sequence_in_one_batch(beginning, options):
    """The batch is the one of texts that all come without it."""
    texts = ["What is on <image>", "Why?", "And here, what is on this sign?"]
    options = {
        **options,
        "images": make_image(),
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
        "return_mm_token_type_ids": True,
    }
    expected = beginning(text=texts, **options)
    found = beginning(text=[texts[0], "<s>" + texts[1], texts[2]], **options)
    assert set(found) == set(expected)
    # Of the text that has it, offsets tell of its place, and the mask of special tokens of those that were added.
    for name in set(found) - {"pixel_values", "image_sizes", "offset_mapping", "special_tokens_mask"}:
        assert np.array_equal(_padded(found[name]), _padded(expected[name])), name
    for name in ("offset_mapping", "special_tokens_mask"):
        for row in (0, 2):
            assert np.array_equal(np.asarray(found[name][row]), np.asarray(expected[name][row])), name
        assert len(found[name][1]) == len(expected[name][1])


def _padded(rows) -> np.ndarray:
    rows = [np.asarray(row).tolist() for row in rows]
    width = max(map(len, rows))
    return np.asarray([row + [-1] * (width - len(row)) for row in rows])


def test_threads_get_what_each_gets_alone(processor):
    """Padding is a state of the tokenizer that they share."""
    texts = [["short", "a much longer prompt that has to be padded to"], ["one", "another one"]]
    calls = [
        {"text": texts[index % 2], "padding": padding, "padding_side": side, "return_offsets_mapping": True}
        for index, (padding, side) in enumerate([(True, "left"), (False, "left"), ("max_length", "right")] * 2)
    ]
    calls = [{**call, "max_length": 60} if call["padding"] == "max_length" else call for call in calls]
    expected = [dict(processor(**call)) for call in calls]

    def rounds(start: int) -> list[bool]:
        order = [(start + step) % len(calls) for step in range(150)]
        return [dict(processor(**calls[index])) == expected[index] for index in order]

    with ThreadPoolExecutor(8) as threads:
        assert all(all(equal) for equal in threads.map(rounds, range(8)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_copies_are_whole(processor, copied):
    again = copied(processor)
    chat = ask("What?", make_image())
    options = {"tokenize": True, "return_dict": True, "return_tensors": "np"}
    before, after = (each.apply_chat_template(chat, **options) for each in (processor, again))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_openai_parts_and_strings_are_understood(processor, tmp_path):
    path = tmp_path / "image.png"
    make_image().save(path)
    ours = ask("What?", str(path))
    openai = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": str(path)}},
                {"type": "text", "text": "What?"},
            ],
        }
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    first, second = (processor.apply_chat_template(chat, **options) for chat in (ours, openai))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    text = processor.apply_chat_template([{"role": "user", "content": "Hello"}], **options)
    assert "pixel_values" not in text


def test_batches_are_padded_left_and_on_request_right(processor):
    texts = ["short", "a much longer prompt"]
    left = processor(text=texts, padding=True, return_tensors="pt")
    assert left["attention_mask"][0, 0] == 0 and left["attention_mask"][0, -1] == 1
    right = processor(text=texts, padding=True, padding_side="right", return_tensors="pt")
    assert right["attention_mask"][0, 0] == 1 and right["attention_mask"][0, -1] == 0
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    assert ConvLlavaProcessor(ConvLlavaImageProcessor(), tokenizer).tokenizer.padding_side == "left"


ANSWERS = ["A cat, black and white.", "Yes."]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_assistant_masks_cover_the_answers_exactly(processor, images, padding_side):
    def conversation(question, count):
        chat = ask(question, *[make_image()] * count)
        chat.append({"role": "assistant", "content": [part("text", ANSWERS[0])]})
        chat.append({"role": "user", "content": [part("text", "Really?")]})
        chat.append({"role": "assistant", "content": [part("text", ANSWERS[1])]})
        return chat

    options = {"padding": True, "padding_side": padding_side}
    if not transformers.__version__.startswith("4."):
        options = {"processor_kwargs": options}
    output = processor.apply_chat_template(
        [conversation("What is this?", images), conversation("Short?", 0)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        **options,
    )
    expected = " " + "</s> ".join(ANSWERS) + "</s>"
    for ids, mask in zip(output["input_ids"], torch.as_tensor(output["assistant_masks"]), strict=True):
        assert processor.tokenizer.decode(ids[mask.bool()]) == expected
    assert "offset_mapping" not in output and "text_replacement_offsets" not in output


def test_modality_of_every_token(processor):
    output = processor(
        images=[make_image()] * 2,
        text=["<image> a <image>", "text"],
        padding=True,
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    assert torch.equal(output["mm_token_type_ids"] == 1, output["input_ids"] == IMAGE)
    nested = processor(text="text", text_kwargs={"return_mm_token_type_ids": True})
    assert nested["mm_token_type_ids"] == [[0] * len(nested["input_ids"][0])]


def test_replacements_tell_what_went_where(processor):
    text = "a <image> b <image>"
    output = processor(
        images=[make_image()] * 2,
        text=text,
        return_text_replacement_offsets=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    first, second = output["text_replacement_offsets"][0]
    assert first["type"] == "image" and text[slice(*first["span"])] == text[slice(*second["span"])] == "<image>"
    expanded = text.replace("<image>", "<image>" * 4)
    assert expanded[slice(*first["new_span"])] == expanded[slice(*second["new_span"])] == "<image>" * 4
    starts = [
        start
        for (start, _), token in zip(output["offset_mapping"][0], output["input_ids"][0], strict=True)
        if token == IMAGE
    ]
    assert starts == [2 + 7 * index for index in range(4)] + [2 + 28 + 3 + 7 * index for index in range(4)]


def test_offsets_refer_to_the_text_as_passed(processor):
    text = "a <image> b"
    output = processor(images=[make_image()], text=text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [text[slice(*offsets)] for offsets in output["offset_mapping"][0]]
    assert "".join(pieces).replace("<image>" * 4, "<image>") == text and pieces.count("<image>") == 4


def test_suffix_goes_between_an_image_and_ordinary_text_alone():
    processor = make_processor(64, image_suffix="~")
    images = [make_image()] * 5
    expanded, _ = processor.get_text_with_replacements(
        ["<image>a<image><image></s>b<image>\n<image>"], ["<image>"] * 5
    )
    assert expanded == ["<image>~a<image><image></s>b<image>~\n<image>"]
    ids = processor(images=images, text="<image>a<image><image></s>b<image>\n<image>", add_special_tokens=False)
    assert processor.tokenizer.decode(ids["input_ids"][0]) == expanded[0]


def test_suffix_is_not_repeated_where_the_template_wrote_it():
    """A prompt that the template wrote begins with the beginning of a sequence; any other text is a text as it is."""
    processor = make_processor(64, image_suffix="~")
    for begins in ("<s>", ""):
        [expanded], _ = processor.get_text_with_replacements([f"{begins}<image>~a<image>b"], ["<image>"] * 2)
        assert expanded == (f"{begins}<image>~a<image>~b" if begins else "<image>~~a<image>~b")
    processor.chat_template = "{{ messages[0]['content'] }}"
    [expanded], _ = processor.get_text_with_replacements(["<image>~a<image>b"], ["<image>"] * 2)
    assert expanded == "<image>~a<image>~b"


def test_truncation_cuts_text_and_never_an_image(processor):
    text = "<image> is an image that is followed by many words"
    whole = processor(images=make_image(), text=text)["input_ids"][0]
    options = {"images": make_image(), "text": text, "truncation": True}
    cut = processor(**options, max_length=10)["input_ids"][0]
    assert cut == whole[:10] and cut.count(IMAGE) == 4
    message = f"Prompt 0 is {len(whole)} tokens long, 4 of them visual tokens, and truncation to 3 tokens .* only"
    with pytest.raises(ValueError, match=message):
        processor(**options, max_length=3)


@pytest.mark.parametrize(
    "text, images, message",
    [
        ("no place", 1, "0 <image> but 1 images"),
        ("<image>", 0, "1 <image> but 0 images"),
        ("<image><image>", 1, "2 <image> but 1 images"),
        (["<image>", "<image>"], 3, "2 <image> but 3 images"),
    ],
)
def test_numbers_of_images_and_places_must_agree(processor, text, images, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[make_image()] * images or None)


def test_numbers_must_agree_for_every_prompt(processor):
    image = make_image()
    with pytest.raises(ValueError, match="Prompt 0 has 2 <image> but 1 images"):
        processor(text=["<image><image>", "<image>"], images=[[image], [image, image]])
    processor(text=["<image><image>", "text"], images=[[image, image], []])


def test_other_nonsense_is_refused(processor):
    with pytest.raises(ValueError, match="Pass text, images or both"):
        processor()
    for text in (3, [], ["a", 3]):
        with pytest.raises(ValueError, match="list of strings with at least one, not"):
            processor(text=text)
    with pytest.raises(ValueError, match="return_overflowing_tokens"):
        processor(text="x", return_overflowing_tokens=True)
    with pytest.raises(ValueError, match="neither videos nor audio"):
        processor(text="x", videos=[1])


def test_a_tokenizer_without_the_placeholder_is_refused():
    with pytest.raises(ValueError, match="does not know '<photo>'.*add_special_tokens"):
        ConvLlavaProcessor(ConvLlavaImageProcessor(), make_tokenizer(), image_token="<photo>")


def test_images_alone_and_text_alone(processor):
    assert set(processor(images=make_image(), return_tensors="pt")) == {"pixel_values", "image_sizes"}
    assert set(processor(text="x", return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values", "image_sizes"]


def test_survives_saving(processor, tmp_path):
    suffixed = make_processor(image_suffix=" ")
    suffixed.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is ConvLlavaProcessor and again.tokenizer.padding_side == "left"
    chat = ask("What?", make_image())
    options = {"tokenize": True, "return_dict": True, "return_tensors": "np"}
    before, after = (each.apply_chat_template(chat, **options) for each in (suffixed, again))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_placeholders_typed_by_a_user_can_be_made_harmless(processor):
    if not hasattr(type(processor.tokenizer), "_mark_chat_inputs"):
        pytest.skip("this transformers cannot sanitize control tokens")
    chat = ask("I type <image> and </s>.", make_image())
    output = processor.apply_chat_template(chat, tokenize=True, return_dict=True, sanitize_control_tokens=True)
    ids = output["input_ids"][0]
    assert ids.count(IMAGE) == 4 and ids.count(2) == 0
    assert "I type <image> and </s>." in processor.tokenizer.decode(ids)
