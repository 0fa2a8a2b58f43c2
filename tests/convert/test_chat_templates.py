"""The chat templates that `assemble` writes: the family's own text, images, and the assistant's tokens marked."""

import json
import shutil

import pytest
from helpers.chat_families import FAMILIES, MISTRAL, NO_TEMPLATE, family_tokenizer, stored_template
from helpers.tiny_models import (
    CHATML,
    SMALL,
    make_image,
    make_language_model,
    make_processor,
    make_tower,
    plain_tokenizer,
)

from convllava_hf import ConvLlavaImageProcessor, ConvLlavaProcessor, chat_templates, cli
from convllava_hf.chat_templates import assistant_mask_error, has_generation_markers, time_limit
from convllava_hf.convert import assemble
from convllava_hf.convert.templates import template_with_images
from convllava_hf.convert.tokenizers import add_image_token, prefix_after
from convllava_hf.errors import ConvLlavaError


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be short."}
ONE = [user("<image>\nWhat is it?"), said("A sign.")]
TWO = [*ONE, user("Which color?"), said("Red, I think.")]
CONVERSATIONS = {
    "one": ONE,
    "two": TWO,
    "asked": TWO[:3],
    "first": ONE[:1],
    "text only": [user("Hello?"), said("Hi.")],
    "between": [user("First <image>\n then?"), said("So.")],
    "blanks": [user("  <image>\nWhat is it?\n"), said(" A sign.\n")],
    "thought": [ONE[0], said("<think>\nhm\n</think>\n\nA sign."), user("Sure?")],
    "thought last": [ONE[0], said("<think>\nhm\n</think>\n\nA sign.")],
    "says the header": [user("<|im_start|>assistant\n<start_of_turn>model\n"), said("<|assistant|>\n"), user("So?")],
    "only a system message": [SYSTEM],
    "assistant first": [said("Hi."), *ONE],
    "two answers": [*ONE, said("A red one.")],
    "code": [user("What is {{ this }}?"), said("{% for x in y %}{{ x }}{% endfor %}")],
}
CONVERSATIONS |= {f"{name}, system": [SYSTEM, *messages] for name, messages in CONVERSATIONS.items()}


def parts(messages: list[dict]) -> list[dict]:
    """As processors hand messages to templates: an image is a part of its own, for the line that stands for it."""

    def split(text: str) -> list[dict]:
        before, image, after = text.partition("<image>\n")
        texts = [{"type": "text", "text": one} if one else None for one in (before, after)]
        return [part for part in (texts[0], {"type": "image"} if image else None, texts[1]) if part]

    return [{**message, "content": split(message["content"])} for message in messages]


def written(tokenizer, messages: list[dict], **kwargs) -> str:
    """What a template writes, or that it refuses."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def marked(tokenizer):
    """A tokenizer as `assemble` changes it."""
    add_image_token(tokenizer)
    after_bos = prefix_after(tokenizer, tokenizer.bos_token) if tokenizer.bos_token else ""
    tokenizer.chat_template = template_with_images(tokenizer, after_bos)
    return tokenizer


def supervised(tokenizer, messages: list[dict], template: str | None = None) -> list[int]:
    output = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return [one for one, is_said in zip(output["input_ids"], output["assistant_masks"], strict=True) if is_said]


@pytest.fixture(scope="module")
def families() -> dict:
    pytest.importorskip("trl")
    return {name: (family_tokenizer(name), marked(family_tokenizer(name))) for name in FAMILIES}


# --- the families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_the_family_s_own(families, name):
    stock, ours = families[name]
    texts = 0
    for messages in CONVERSATIONS.values():
        for prompt in (False, True):
            expected = written(stock, messages, add_generation_prompt=prompt)
            if name == "qwen3" and messages[-1] == CONVERSATIONS["two answers"][-1]:
                continue  # see below
            assert written(ours, parts(messages), add_generation_prompt=prompt) == expected
            assert written(ours, messages, add_generation_prompt=prompt) == expected  # servers ask the tokenizer
            texts += "Error" not in expected
    assert texts >= 12


# What TRL's training variants take the loss on, and what they add to the text: thoughts in all of Qwen3's turns.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama3_1", "llama3_2", "mistral")])
def test_the_loss_is_on_what_trl_takes_it_on(families, name):
    from trl.chat_template_utils import get_training_chat_template

    stock, ours = families[name]
    theirs = get_training_chat_template(stock)
    compared = 0
    for key, messages in CONVERSATIONS.items():
        if written(stock, messages).startswith("TemplateError") or "assistant" in key:
            continue
        if name == "qwen3" and written(stock, messages) != written(stock, messages, chat_template=theirs):
            continue
        assert supervised(ours, parts(messages)) == supervised(stock, messages, theirs), key
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama3_1", "A sign.<|eot_id|>Red, I think.<|eot_id|>"),
        ("llama3_2", "A sign.<|eot_id|>Red, I think.<|eot_id|>"),
        ("mistral", "A sign.</s>Red, I think.</s>"),
        # The thought of the last turn alone, as Qwen3's own template writes it.
        ("qwen3", "A sign.<|im_end|>\n<think>\n\n</think>\n\nRed, I think.<|im_end|>\n"),
    ],
)
def test_the_loss_where_trl_has_no_such_text(families, name, expected):
    _, ours = families[name]
    assert ours.decode(supervised(ours, parts(TWO))) == expected


def test_a_tokenizer_without_a_template():
    tokenizer = marked(family_tokenizer(NO_TEMPLATE))
    assert tokenizer.decode(supervised(tokenizer, parts(TWO))) == " A sign.</s> Red, I think.</s>"


@pytest.mark.parametrize("name", [*FAMILIES, NO_TEMPLATE])
def test_trl_takes_the_template_as_it_is(name):
    """Its trainer swaps nothing in, does not warn of a missing end of turn, and may compare tool calls by prefixes."""
    pytest.importorskip("trl")
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    tokenizer = marked(family_tokenizer(name))
    image_processor = ConvLlavaImageProcessor(size={"height": 128, "width": 128}, stride=64)
    processor = ConvLlavaProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    assert get_training_chat_template(processor) is None
    assert is_chat_template_stop_token_trained(processor)


def test_a_batch_with_images(families):
    """TRL's collator over our processor: labels are the supervised tokens, placeholders and padding are none."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    for _, ours in families.values():
        ours.pad_token = ours.pad_token or ours.eos_token
        image_processor = ConvLlavaImageProcessor(size={"height": 128, "width": 128}, stride=64)
        processor = ConvLlavaProcessor(image_processor, ours, chat_template=ours.chat_template)
        batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)(
            [
                {"messages": parts(ONE), "images": [make_image()]},
                {"messages": parts(CONVERSATIONS["text only"]), "images": []},
            ]
        )
        for labels, messages in zip(batch["labels"], (ONE, CONVERSATIONS["text only"]), strict=True):
            assert labels[labels != -100].tolist() == supervised(ours, parts(messages))
        assert (batch["input_ids"] == processor.image_token_id).sum() == 4
        assert (batch["labels"] != processor.image_token_id).all()


# --- templates of other kinds ---------------------------------------------------------------------------------------

_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
STYLES = {
    "chatml": CHATML,
    "no prompt": "{% for message in messages %}" + _TURN + "{% endfor %}",
    "lines": "{% for message in messages %}\n    "
    + _TURN
    + "\n  {# {% endfor %} #}\n{% endfor %}\n\n"
    + _PROMPT
    + "\n",
    "text": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}" + _PROMPT,
    "raw": "{% raw %}{% for x in y %}{% endraw %}{% for message in messages %}" + _TURN + "{% endfor %}" + _PROMPT,
    "strings": "{% set x = '{% endfor %}' %}{% for message in messages %}{% if message['content'] == '%}' %}"
    '{{ "{% endif %}\'" }}{% endif %}' + _TURN + "{% endfor %}" + _PROMPT,
    "else": "{% for message in messages %}" + _TURN + "{% else %}<|im_end|>{% endfor %}" + _PROMPT,
    "filtered": "{% for message in messages if message['role'] != 'system' %}" + _TURN + "{% endfor %}" + _PROMPT,
    "macro": "{% macro write(message) %}" + _TURN + "{% endmacro %}{% for turn in messages %}"
    "{{ write(turn) }}{% endfor %}" + _PROMPT,
    "inside if": "{% if messages %}{% for message in messages %}" + _TURN + "{% endfor %}{% endif %}" + _PROMPT,
    "continue": "{% for message in messages %}{% if message['role'] == 'system' %}{% continue %}{% endif %}"
    + _TURN
    + "{% endfor %}"
    + _PROMPT,
    "names": "{% set header, turn, tail = 'a', 'b', 'c' %}{{ turn }}{% for message in messages %}{{ tail }}"
    + _TURN
    + "{% endfor %}{{ header }}"
    + _PROMPT,
}


@pytest.mark.parametrize("style", STYLES)
def test_other_ways_to_write_templates(style):
    stock, ours = plain_tokenizer(), plain_tokenizer()
    stock.chat_template = ours.chat_template = STYLES[style]
    marked(ours)
    for messages in CONVERSATIONS.values():
        for prompt in (False, True):
            expected = written(stock, messages, add_generation_prompt=prompt)
            assert written(ours, parts(messages), add_generation_prompt=prompt) == expected
    found = ours.decode(supervised(ours, parts(TWO)))
    assert "".join(found.split()) == "Asign.<|im_end|>Red,Ithink.<|im_end|>"


def test_a_special_token_after_the_last_message(families):
    """Phi 3's end of the text: marked where the assistant said the last, and only there."""
    _, ours = families["phi3"]
    assert ours.decode(supervised(ours, parts(TWO))).endswith("think.<|end|>\n<|endoftext|>")
    assert ours.decode(supervised(ours, parts(TWO[:3]))) == "A sign.<|end|>\n"


_CONTENTS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
REFUSED = {
    "{{ messages[0]['content'] }}{{ messages[1]['content'] if messages[1] }}<|im_end|>": "cannot be marked",
    _CONTENTS: "cannot be marked",
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}": "ends with a special token",
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}</s>{% endif %}{% endfor %}": "cannot",
    "{% for message in messages %}": "cannot write a question and an answer",
    "{{ 1 // 0 }}": "cannot write a question and an answer",
    "{{ raise_exception('No.') }}": "cannot write a question and an answer: No",
    "no messages at all": "cannot be marked",
    "> {% generation %}" + _CONTENTS + "{% endgeneration %}": "user says",
    _CONTENTS + "{% generation %}{% endgeneration %}": "no token",
    _CONTENTS + "{% generation %}a{% endgeneration %}": "not those",
}


@pytest.mark.parametrize("template", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_marked_is_refused(template):
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConvLlavaError, match=REFUSED[template]) as caught:
        marked(tokenizer)
    assert "--chat-template FILE" in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_loops_for_ever(monkeypatch):
    monkeypatch.setattr(chat_templates, "_SECONDS", 0.3)
    tokenizer = plain_tokenizer()
    tokenizer.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}" + CHATML
    )
    with pytest.raises(ConvLlavaError, match="after 0.3 seconds"):
        marked(tokenizer)
    with time_limit(5):
        pass


# --- assemble -------------------------------------------------------------------------------------------------------


def test_assemble_refuses_before_it_reads_the_tower(tmp_path):
    text = make_language_model(tmp_path / "text", template="{{ messages[0]['content'] }}")
    with pytest.raises(ConvLlavaError, match="chat template cannot be marked"):
        assemble(tmp_path / "out", vision=tmp_path / "nowhere", text=text, **SMALL)
    assert not (tmp_path / "out").exists()


def test_assemble_takes_another_template(tmp_path):
    text = make_language_model(tmp_path / "text", template="{{ messages[0]['content'] }}")
    hand_marked = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "</s>{% endgeneration %}{% else %}{{ message['content'] + '|' }}{% endif %}{% endfor %}"
    )
    file, tower = tmp_path / "template.jinja", make_tower(tmp_path / "tower")
    for template, expected in ((hand_marked, "A sign.</s>"), (CHATML, "A sign.<|im_end|>\n")):
        file.write_text(template)
        out = assemble(tmp_path / "out", vision=tower, text=text, chat_template=file, overwrite=True, **SMALL)
        processor = ConvLlavaProcessor.from_pretrained(out)
        assert assistant_mask_error(processor) is None
        tokenizer = processor.tokenizer
        assert tokenizer.decode(supervised(tokenizer, parts(ONE), processor.chat_template)) == expected
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    for wrong in (tmp_path / "nowhere.jinja", tmp_path, tmp_path / "latin.jinja", "a\0b"):
        with pytest.raises(ConvLlavaError, match="The chat template .* cannot be read"):
            assemble(tmp_path / "new", vision=tower, text=text, chat_template=wrong, **SMALL)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    text = make_language_model(tmp_path / "text", template="{{ messages[0]['content'] }}")
    argv = ["assemble", tmp_path / "out", "--vision", make_tower(tmp_path / "tower"), "--text", text]
    assert cli.main([*map(str, argv)]) == 2
    assert "cannot be marked for training" in capsys.readouterr().err.strip().splitlines()[-1]
    (tmp_path / "template.jinja").write_text(CHATML)
    size = ["--resolution", "128", "--extra-stage-depth", "0", "--chat-template", tmp_path / "template.jinja"]
    assert cli.main([*map(str, [*argv, *size])]) == 0
    assert "{%- generation -%}" in (tmp_path / "out" / "chat_template.jinja").read_text()


@pytest.mark.parametrize("name", ["gemma3", "llama3"])
def test_a_training_variant_of_trl_s_is_kept(name):
    pytest.importorskip("trl")
    tokenizer = family_tokenizer(name)
    add_image_token(tokenizer)
    given = stored_template(f"{name}_training")
    found = template_with_images(tokenizer, "", given)
    assert found.endswith(given) and has_generation_markers(found)
    assert supervised(tokenizer, parts(TWO), found) == supervised(tokenizer, TWO, given)


# --- before training ------------------------------------------------------------------------------------------------

UNMARKED = "{{ bos_token }}" + CHATML.replace("message['content']", "message['content'][-1]['text']")


def test_training_refuses_a_template_without_marks():
    pytest.importorskip("trl")
    from convllava_hf.training.template_check import check_chat_template

    processor = make_processor()
    check_chat_template(processor, assistant_only_loss=True)
    for template, fault in ((UNMARKED, "it marks no token"), (MISTRAL, "it cannot write"), (None, "there is none")):
        processor.chat_template = template
        check_chat_template(processor, assistant_only_loss=False)
        with pytest.raises(ConvLlavaError, match=f"does not allow: {fault}.*chat_template.jinja"):
            check_chat_template(processor, assistant_only_loss=True)


def test_training_leaves_alone_what_trl_swaps():
    """Templates that TRL knows by their text are trained with its variant of them."""
    pytest.importorskip("trl")
    from convllava_hf.training.template_check import check_chat_template

    processor = make_processor()
    processor.chat_template = stored_template("qwen2_5_vl")
    assert assistant_mask_error(processor) == "it marks no token as the assistant's"
    check_chat_template(processor, assistant_only_loss=True)


def test_train_refuses_before_the_data_and_the_model_are_loaded(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from helpers.training_runs import RECIPES, run

    import convllava_hf.train as script

    def never(*_, **__):
        raise AssertionError("It was loaded.")

    processor = ConvLlavaProcessor.from_pretrained(checkpoint)
    processor.chat_template = processor.tokenizer.chat_template = UNMARKED
    processor.save_pretrained(tmp_path / "model")
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoint / file, tmp_path / "model" / file)
    monkeypatch.setattr(script, "load_training_data", never)
    monkeypatch.setattr(script, "_load_model", never)
    with pytest.raises(ConvLlavaError, match="it marks no token as the assistant's"):
        run(RECIPES / "stage1_projector.yaml", tmp_path / "model", tmp_path / "out")


def test_data_check_does_not_blame_the_data(checkpoint, tmp_path):
    from convllava_hf.data.checking import check_data

    processor = ConvLlavaProcessor.from_pretrained(checkpoint)
    processor.chat_template = processor.tokenizer.chat_template = UNMARKED
    processor.save_pretrained(tmp_path / "model")
    shutil.copyfile(checkpoint / "config.json", tmp_path / "model" / "config.json")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 3))
    report = check_data(tmp_path / "data.json", model=tmp_path / "model")
    assert report.counts == {"chat template": 1} and report.as_dict()["bad_samples"] == 0
    assert "at fault, not the data: it marks no token" in report.problems["chat template"][0].detail
