"""Converted tokenizers give the ids of the original's slow LlamaTokenizer, held against SentencePiece itself."""

import json
import random
import re
import shutil

import pytest
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from convllava_hf import ConvLlavaImageProcessor, ConvLlavaProcessor
from convllava_hf.convert.templates import vicuna_template
from convllava_hf.convert.tokenizers import (
    IMAGE_TOKEN,
    add_image_token,
    load_original_tokenizer,
    make_portable,
    prefix_after,
)
from convllava_hf.errors import ConvLlavaError


FRAGMENTS = (
    *(
        "the",
        "image",
        "What is",
        "USER:",
        "ASSISTANT:",
        "Straße",
        "№ 5",
        "표지판에",
        "안녕",
        "🚲",
        "naïve é",
        "10:42",
        "3.5",
    ),
    *(" ", " ", "  ", "   ", "     ", "\n", "\n\n", "\t", "\u200b", "\u00a0", "▁", "<0x0A>", "<", "s>", "</", "�"),
    *("</s>", "</s>", "<s>", "<unk>"),
)


class OriginalTokenizer:
    """What transformers 4.39's slow LlamaTokenizer and the original's splitting at `<image>` give."""

    def __init__(self, model_file, legacy: bool):
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model_file.read_bytes())
        self.legacy = legacy
        if not legacy:
            proto.normalizer_spec.add_dummy_prefix = False
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(proto.SerializeToString())

    def text(self, text: str) -> list[int]:
        if not self.legacy and text:
            text = "▁" + text.replace("▁", " ")
        ids = []
        sections = [section for section in re.split("(<unk>|<s>|</s>)", text) if section]
        for section in sections:
            special = {"<unk>": 0, "<s>": 1, "</s>": 2}.get(section)
            ids += [special] if special is not None else self.section(section)
        if not self.legacy and sections[1:] and sections[0] == "▁" and sections[1] in ("<unk>", "<s>", "</s>"):
            ids = ids[1:]
        return ids

    def section(self, section: str) -> list[int]:
        if self.legacy or not section.startswith(("▁", " ")):
            return self.model.encode(section)
        # Without the dummy prefix, SentencePiece needs something before a leading blank to keep it.
        return self.model.encode("<unk>" + section)[len(self.model.encode("<unk>")) :]

    def prompt(self, text: str, image: int) -> list[int]:
        ids = [1]
        for index, chunk in enumerate(text.split("<image>")):
            ids += [*([image] if index else []), *self.text(chunk)]
        return ids


@pytest.fixture(scope="module")
def spaced_model(golden, tmp_path_factory):
    """The golden SentencePiece model with pieces of several blanks, which it lacks and Llama's has."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((golden / "checkpoint-stage3" / "tokenizer.model").read_bytes())
    for blanks, score in ((2, 0.5), (4, -5.5), (8, -50.5), (3, -100.5), (7, -101.5)):
        proto.pieces.add(piece="▁" * blanks, score=score, type=1)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    path = tmp_path_factory.mktemp("spaced") / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(params=["golden", "spaced"])
def model_file(request, golden, spaced_model):
    return golden / "checkpoint-stage3" / "tokenizer.model" if request.param == "golden" else spaced_model


def original_folder(tmp_path, model_file, **settings):
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    return tmp_path


def random_prompts(seed: int, count: int, images: bool):
    generator = random.Random(seed)
    fragments = (*FRAGMENTS, *(["<image>"] * 6 if images else []))
    for _ in range(count):
        yield "".join(generator.choices(fragments, k=generator.randint(0, 14)))


FIXED_PROMPTS = (
    "",
    "<image>",
    "<image><image>",
    "<image>\n<image>\nWhat is this?",
    "text<image>",
    "text <image> ",
    "<image></s>",
    "<image> </s>",
    "a</s><image></s>b",
    "</s>leading",
    "  leading blanks<image>  and after",
    "▁<image>▁",
)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_equal_the_originals(tmp_path, model_file, legacy):
    tokenizer = load_original_tokenizer(original_folder(tmp_path, model_file, legacy=legacy))
    original = OriginalTokenizer(model_file, legacy)
    for text in [*FIXED_PROMPTS, *random_prompts(0, 400, images=False)]:
        if IMAGE_TOKEN not in text:
            assert tokenizer(text).input_ids == [1, *original.text(text)], repr(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_with_images_equal_the_originals(tmp_path, model_file, legacy):
    tokenizer = load_original_tokenizer(original_folder(tmp_path, model_file, legacy=legacy))
    original = OriginalTokenizer(model_file, legacy)
    suffix = prefix_after(tokenizer, IMAGE_TOKEN)
    assert suffix == ("" if legacy else " ")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    processor = ConvLlavaProcessor(ConvLlavaImageProcessor(), tokenizer, image_suffix=suffix)
    for text in [*FIXED_PROMPTS, *random_prompts(1, 400, images=True)]:
        [expanded], _ = processor.get_text_with_replacements([text], [IMAGE_TOKEN * 3] * text.count(IMAGE_TOKEN))
        assert with_one_id_an_image(tokenizer(expanded).input_ids, image) == original.prompt(text, -200), repr(text)


def with_one_id_an_image(ids: list[int], image: int) -> list[int]:
    """The original's -200 for three placeholders of ours."""
    found = []
    for index in ids:
        found.append(index)
        if found[-3:] == [image] * 3:
            found[-3:] = [-200]
    return found


def random_content(generator) -> list[dict] | str:
    """A message: a text, with `<image>` written in it or not, or parts."""
    texts = ["".join(generator.choices((*FRAGMENTS, IMAGE_TOKEN), k=generator.randint(0, 4))) for _ in range(5)]
    if generator.random() < 0.2:
        return texts[0]
    parts = [{"type": "text", "text": text} for text in texts] + [{"type": "image"}] * 3
    return generator.choices(parts, k=generator.randint(0, 5))


def random_conversation(generator) -> list[dict]:
    roles = [["system"], [], []][generator.randrange(3)] + ["user", "assistant"] * generator.randint(1, 2) + ["user"]
    return [{"role": role, "content": random_content(generator)} for role in roles]


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_conversations_equal_the_originals(tmp_path, model_file, legacy):
    """The template alone writes what the original's tokenizing piece by piece amounts to: no suffix is needed."""
    tokenizer = load_original_tokenizer(original_folder(tmp_path, model_file, legacy=legacy))
    original = OriginalTokenizer(model_file, legacy)
    blank = prefix_after(tokenizer, IMAGE_TOKEN)
    template, image = vicuna_template(blank, after_image=blank), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    processors = [
        ConvLlavaProcessor(ConvLlavaImageProcessor(), tokenizer, chat_template=template, image_suffix=suffix)
        for suffix in {"", blank}
    ]
    generator = random.Random(4)
    for _ in range(200):
        messages, prompted = random_conversation(generator), generator.random() < 0.5
        rendered = processors[0].apply_chat_template(messages, add_generation_prompt=prompted)
        bare = vicuna_template("", after_image="")
        prompt = processors[0].apply_chat_template(messages, bare, add_generation_prompt=prompted).removeprefix("<s>")
        for processor in processors:
            replacements = [IMAGE_TOKEN * 3] * rendered.count(IMAGE_TOKEN)
            [expanded], _ = processor.get_text_with_replacements([rendered], replacements)
            ids = tokenizer(expanded, add_special_tokens=False).input_ids
            assert with_one_id_an_image(ids, image) == original.prompt(prompt, -200), repr(prompt)


def test_what_a_user_types_stays_a_text(tmp_path, model_file):
    """transformers marks control tokens in messages, and takes the marks away after rendering."""
    tokenizer = load_original_tokenizer(original_folder(tmp_path, model_file, legacy=False))
    if not hasattr(type(tokenizer), "_mark_chat_inputs"):
        pytest.skip("this transformers cannot sanitize control tokens")
    processor = ConvLlavaProcessor(
        ConvLlavaImageProcessor(), tokenizer, chat_template=vicuna_template(), image_suffix=" "
    )
    messages = [{"role": "user", "content": "I type <image> here and <image>there"}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, sanitize_control_tokens=True)
    ids = inputs["input_ids"][0] if isinstance(inputs["input_ids"][0], list) else inputs["input_ids"]
    assert "I type <image> here and <image>there" in tokenizer.decode(ids)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="transformers 5 has no slow tokenizers")
@pytest.mark.parametrize("legacy", [True, False])
def test_ids_equal_the_slow_tokenizers(tmp_path, model_file, legacy):
    folder = original_folder(tmp_path, model_file, legacy=legacy)
    slow = transformers.LlamaTokenizer.from_pretrained(folder)
    tokenizer = load_original_tokenizer(folder)
    for text in [*FIXED_PROMPTS, *random_prompts(2, 200, images=False)]:
        if IMAGE_TOKEN not in text:
            assert tokenizer(text).input_ids == slow(text).input_ids, repr(text)


def test_decoding_equals_sentencepiece(tmp_path, model_file):
    """Any ids, with bytes that are no UTF-8 among them, as generating gives them."""
    tokenizer = load_original_tokenizer(original_folder(tmp_path, model_file, legacy=False))
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    generator = random.Random(3)
    for text in random_prompts(3, 100, images=False):
        ids = model.encode(text)
        assert tokenizer.decode(ids) == model.decode(ids)
    for _ in range(200):
        ids = [generator.randrange(3, len(model)) for _ in range(12)]
        # Of a character cut short, SentencePiece shows every byte, and others show one mark.
        assert re.sub("�+", "�", tokenizer.decode(ids)) == re.sub("�+", "�", model.decode(ids))
    for text in ("<0x0A>", "a<0x41>", "\n🚲\n\n", "é", "ß", "ÿĀń"):
        ids = model.encode(text)
        assert tokenizer.decode(ids) == model.decode(ids) == text


TEXTS = (
    "It says 2,418.50 in total.",
    "A street, a bicycle and a clock.\nThe weather is sunny.",
    "Straße № 5 — 표지판 🚲 end",
    "a  b\n\nc",
    "The sign\tsays go",
)
STOPS = ("\n", ".", "sunny", "clock.", " is", "🚲", "표지", "\n\n", "go", "№ 5", "\t", "ß")


@pytest.mark.parametrize("stop", STOPS)
def test_generation_stops_at_any_string(tmp_path, golden, stop):
    """transformers' own criterion, held against the text of every prefix of the ids."""
    if not stop.isascii() and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 does not read tokens of bytes")
    folder = original_folder(tmp_path, golden / "checkpoint-stage3" / "tokenizer.model", legacy=False)
    tokenizer = load_original_tokenizer(folder)
    criterion = StopStringCriteria(tokenizer, [stop])
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        lengths = range(1, len(ids) + 1)
        expected = [n for n in lengths if stop in tokenizer.decode(ids[:n])]
        found = [n for n in lengths if criterion(torch.tensor([ids[:n]]), None)[0]]
        assert found[:1] == expected[:1], (text, found, expected)


def test_other_tools_know_how_the_vocabulary_writes_bytes(tmp_path, golden):
    """They read it from the decoder's steps: `<0x0A>` for a byte, and no alphabet of bytes. outlines reads Replace
    too, and refuses patterns that are not strings."""
    tokenizer = load_original_tokenizer(golden / "checkpoint-stage3")
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]["decoders"]
    usual = [step for step in steps if step["type"] != "Sequence"]
    assert [step["type"] for step in usual] == ["Replace", "ByteFallback", "Fuse", "Strip"]
    assert usual[0] == {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def test_llguidance_takes_the_tokenizer(golden):
    llguidance = pytest.importorskip("llguidance.hf")
    tokenizer = load_original_tokenizer(golden / "checkpoint-stage3")
    theirs = llguidance.from_tokenizer(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(theirs.decode_bytes([index]) for index in ids).decode() == f" {text}"


def test_saved_tokenizer_is_taken_as_it_is(tmp_path, model_file):
    tokenizer = load_original_tokenizer(original_folder(tmp_path, model_file, legacy=False, model_max_length=777))
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    make_portable(saved)
    config = json.loads((saved / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["extra_special_tokens"] == {"image_token": "<image>"}
    (saved / "config.json").write_text('{"model_type": "llama"}')
    for loaded in (AutoTokenizer.from_pretrained(saved), PreTrainedTokenizerFast.from_pretrained(saved)):
        assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert (loaded.padding_side, loaded.model_max_length, loaded.pad_token) == ("left", 777, "<unk>")
        assert loaded.image_token == "<image>"
        assert set(loaded("a").keys()) == {"input_ids", "attention_mask"}
        again = tmp_path / "again"
        loaded.save_pretrained(again)
        assert (
            PreTrainedTokenizerFast.from_pretrained(again)("a <image>b").input_ids == tokenizer("a <image>b").input_ids
        )


def test_special_tokens(tmp_path, golden):
    tokenizer = load_original_tokenizer(golden / "checkpoint-stage3")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.convert_tokens_to_ids("<image>") == 640 and len(tokenizer) == 641
    assert tokenizer.decode([640, 2], skip_special_tokens=True) == ""


def test_added_tokens_keep_their_ids(tmp_path, golden):
    folder = original_folder(tmp_path, golden / "checkpoint-stage3" / "tokenizer.model", pad_token="[PAD]")
    (folder / "added_tokens.json").write_text('{"[PAD]": 640, "<im_patch>": 641}')
    tokenizer = load_original_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<im_patch>")) == (640, 641)
    assert tokenizer.convert_tokens_to_ids("<image>") == 642
    (folder / "added_tokens.json").write_text('{"[PAD]": 650}')
    with pytest.raises(ConvLlavaError, match="'\\[PAD\\]' the id 650"):
        load_original_tokenizer(folder)


def test_missing_and_broken_models(tmp_path, golden):
    with pytest.raises(ConvLlavaError, match="has no tokenizer.model"):
        load_original_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff no model")
    with pytest.raises(ConvLlavaError, match="no SentencePiece model"):
        load_original_tokenizer(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((golden / "checkpoint-stage3" / "tokenizer.model").read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ConvLlavaError, match="unlike the SentencePiece models"):
        load_original_tokenizer(tmp_path)


def test_add_image_token_is_idempotent(tmp_path, golden):
    tokenizer = load_original_tokenizer(golden / "checkpoint-stage3")
    assert add_image_token(tokenizer) == add_image_token(tokenizer) == 640 and len(tokenizer) == 641
