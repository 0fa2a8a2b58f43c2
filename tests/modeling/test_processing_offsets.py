"""Offsets as lists where transformers goes through them one by one, and the same mask of answers from them."""

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import ask, make_image

from convllava_hf import ConvLlavaProcessor


ANSWERS = ["A cat, black and white.", "Yes, näher: 图.", "It is <b>."]


class WithTensors(ConvLlavaProcessor):
    """The processor as it was: every output a tensor, offsets too."""

    def __call__(self, *args, **kwargs):
        output = super().__call__(*args, **kwargs)
        if "offset_mapping" in output:
            output["offset_mapping"] = torch.as_tensor(output["offset_mapping"])
        return output


def conversation(images: int, answers: list[str]) -> list[dict]:
    chat = ask("What is this?", *[make_image(seed=index) for index in range(images)])
    for answer in answers:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        chat.append({"role": "user", "content": [{"type": "text", "text": "Really?"}]})
    return chat


def batch_of(processor, conversations: list, **kwargs) -> dict:
    options = {"padding": True, **kwargs}
    if not transformers.__version__.startswith("4."):
        options = {"processor_kwargs": options}
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        **options,
    )


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (2, 1)], ids=str)
def test_assistant_masks_are_those_that_tensors_gave(processor, counts, padding_side):
    """And they cover the answers, with images in other turns and texts of other lengths beside them."""
    before = WithTensors(processor.image_processor, processor.tokenizer, processor.chat_template)
    chats = [conversation(count, ANSWERS[index:]) for index, count in enumerate(counts)]
    ours, theirs = (batch_of(one, chats, padding_side=padding_side) for one in (processor, before))
    assert ours.keys() == theirs.keys() and "offset_mapping" not in ours
    for name in ours:
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name
    for index, (ids, mask) in enumerate(zip(ours["input_ids"], ours["assistant_masks"], strict=True)):
        said = processor.tokenizer.decode(ids[torch.as_tensor(mask).bool()])
        assert said == "".join(f" {answer}</s>" for answer in ANSWERS[index:])


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 fails where an answer begins behind the cut"
)
@pytest.mark.parametrize("truncation", [60, 200])
def test_assistant_masks_of_texts_that_are_cut(processor, truncation):
    before = WithTensors(processor.image_processor, processor.tokenizer, processor.chat_template)
    chats = [conversation(0, ANSWERS), conversation(0, ANSWERS[2:])]
    options = {"truncation": True, "max_length": truncation, "padding_side": "right"}
    ours, theirs = (batch_of(one, chats, **options)["assistant_masks"] for one in (processor, before))
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def outputs(processor, **kwargs):
    return processor(
        images=[make_image()] * 2,
        text=["a <image> b <image>", "short"],
        padding=True,
        return_offsets_mapping=True,
        add_special_tokens=False,
        **kwargs,
    )


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_offsets_are_lists_beside_replacements_and_tensors_without(processor, return_tensors):
    both = outputs(processor, return_tensors=return_tensors, return_text_replacement_offsets=True)
    alone = outputs(processor, return_tensors=return_tensors)
    kind = {"pt": torch.Tensor, "np": np.ndarray, None: list}[return_tensors]
    assert type(both["offset_mapping"]) is list and type(both["offset_mapping"][0]) is list
    assert isinstance(alone["offset_mapping"], kind)
    for name in ("input_ids", "attention_mask"):
        assert isinstance(both[name], kind)
        np.testing.assert_array_equal(both[name], alone[name])
    assert [len(row) for row in both["offset_mapping"]] == [len(row) for row in both["input_ids"]]


def test_offsets_beside_replacements_refer_to_the_text_after(processor):
    output = outputs(processor, return_tensors="pt", return_text_replacement_offsets=True)
    text = "a <image> b <image>".replace("<image>", "<image>" * 4)
    pieces = [text[start:end] for start, end in output["offset_mapping"][0]]
    assert "".join(pieces) == text and pieces.count("<image>") == 8


def test_nothing_is_left_out_or_added(processor):
    names = {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    options = {"images": make_image(), "text": "<image>", "return_tensors": "pt"}
    assert set(processor(**options)) == names
    output = processor(**options, return_text_replacement_offsets=True)
    assert set(output) == names | {"text_replacement_offsets"}
    assert output["input_ids"].shape == (1, 4)
