"""`pipeline("image-text-to-text")`, with images and conversations in every way that it takes them."""

import base64
import functools
import http.server
import threading

import pytest
import torch
from helpers.tiny_models import ask, make_image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline


QUESTION = "What is on the sign?"
TOKENS = 12


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return pipeline("image-text-to-text", model=str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        make_image(60 + 20 * seed, 90 - 20 * seed, seed=seed).save(path)
    return paths


@pytest.fixture(scope="module")
def site(images):
    """The images' address on loopback."""
    handler = functools.partial(_Silent, directory=images[0].parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def generate(model, processor):
    """The text that `generate` gives to one conversation."""

    def generate(messages, **kwargs) -> str:
        options = {"add_generation_prompt": True, **kwargs}
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", **options
        )
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return generate


def answer(pipe, conversation, **kwargs) -> str:
    return pipe(text=conversation, max_new_tokens=TOKENS, do_sample=False, return_full_text=False, **kwargs)[0][
        "generated_text"
    ]


def content(part: dict) -> list[dict]:
    return [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]


def encoded(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


WAYS = {
    "PIL": lambda path, site: {"type": "image", "image": make_image(60, 90, seed=0)},
    "path": lambda path, site: {"type": "image", "path": str(path)},
    "image path": lambda path, site: {"type": "image", "image": str(path)},
    "base64": lambda path, site: {"type": "image", "base64": encoded(path)},
    "data URL": lambda path, site: {"type": "image", "url": f"data:image/png;base64,{encoded(path)}"},
    "URL": lambda path, site: {"type": "image", "url": f"{site}/{path.name}"},
    "OpenAI data": lambda path, site: {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{encoded(path)}"},
    },
    "OpenAI URL": lambda path, site: {"type": "image_url", "image_url": {"url": f"{site}/{path.name}"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_image_given_in_any_way_gets_the_same_answer(pipe, generate, images, site, way):
    expected = generate(ask(QUESTION, make_image(60, 90, seed=0)))
    assert expected != generate(ask(QUESTION, make_image(80, 70, seed=1)))
    assert answer(pipe, content(WAYS[way](images[0], site))) == expected


def test_images_beside_a_prompt(pipe, processor, model, images):
    """The older way, without a conversation."""
    prompt = f"<s>USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = processor(images=str(images[1]), text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found = pipe(images=str(images[1]), text=prompt, max_new_tokens=TOKENS, do_sample=False, return_full_text=False)
    assert found[0]["generated_text"] == expected


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lists_of_conversations(pipe, generate, images, batch_size):
    """Of different lengths, with one image, several and none."""
    conversations = [
        ask(QUESTION, str(images[0])),
        ask("And these two, which are longer?", str(images[1]), str(images[2])),
        ask("No image."),
    ]
    found = pipe(
        text=conversations, max_new_tokens=TOKENS, do_sample=False, return_full_text=False, batch_size=batch_size
    )
    assert [reply[0]["generated_text"] for reply in found] == [generate(messages) for messages in conversations]


def test_full_text_is_the_conversation_with_the_answer(pipe, generate, images):
    conversation = ask(QUESTION, str(images[0]))
    found = pipe(text=conversation, max_new_tokens=TOKENS, do_sample=False)[0]["generated_text"]
    assert found[:-1] == conversation
    assert found[-1] == {"role": "assistant", "content": generate(conversation)}


def test_prefill_continues_the_answer_that_was_begun(pipe, generate, images):
    conversation = ask(QUESTION, str(images[0]))
    conversation.append({"role": "assistant", "content": [{"type": "text", "text": "The sign shows"}]})
    prompt = pipe.processor.apply_chat_template(conversation, continue_final_message=True)
    assert prompt.endswith(f"{QUESTION} ASSISTANT: The sign shows")
    expected = generate(conversation, add_generation_prompt=False, continue_final_message=True)
    assert answer(pipe, conversation) == answer(pipe, conversation, continue_final_message=True) == expected
    assert expected != generate(ask(QUESTION, str(images[0])))


def test_text_alone(pipe, generate):
    assert answer(pipe, ask("Who are you?")) == generate(ask("Who are you?"))


def test_a_streamer_gets_the_answer_in_pieces(pipe, generate, images):
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    whole = answer(pipe, ask(QUESTION, str(images[0])), generate_kwargs={"streamer": streamer})
    assert "".join(streamer) == whole == generate(ask(QUESTION, str(images[0])))


def test_a_model_and_processor_already_loaded_in_another_dtype(checkpoint, images):
    pipe = pipeline(
        "image-text-to-text",
        model=AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16),
        processor=AutoProcessor.from_pretrained(checkpoint),
        device="cpu",
    )
    assert pipe.model.dtype == torch.bfloat16
    assert answer(pipe, ask(QUESTION, str(images[0])))
