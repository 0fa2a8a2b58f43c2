"""`transformers serve` with a checkpoint's own code, asked by OpenAI's client as anybody's program would."""

import base64
import io
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import transformers
from helpers.fresh_process import fresh_environment
from helpers.tiny_models import make_image, make_model


pytestmark = pytest.mark.slow

if transformers.__version__.startswith("4."):
    pytest.skip("transformers 4 serves no models of image-text-to-text by remote code", allow_module_level=True)
openai = pytest.importorskip("openai")
for _module in ("fastapi", "uvicorn", "pydantic", "typer"):
    pytest.importorskip(_module)

START_SECONDS = 180
ANSWER_SECONDS = 120
TOKENS = 12


@pytest.fixture(scope="module")
def printable_model(processor):
    """A model that writes printable ASCII alone, so that pieces of a stream are whole characters."""
    model = make_model()
    vocabulary = model.config.text_config.vocab_size
    texts = [processor.tokenizer.decode([token]) for token in range(vocabulary)]
    model.generation_config.suppress_tokens = [
        token for token, text in enumerate(texts) if not (text.isascii() and text.isprintable() and text) or token < 4
    ]
    return model


@pytest.fixture(scope="module")
def folder(printable_model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    printable_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """OpenAI's client of a server process that knows nothing of convllava_hf but what the checkpoint brings."""
    home = tmp_path_factory.mktemp("home")
    (home / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'convllava_hf':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    log = home / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            cwd=home,
            env=fresh_environment(home, PYTHONPATH=str(home)),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = _url_when_healthy(server, log)
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _url_when_healthy(server, log) -> str:
    """Where the server listens, on a port that the system chose and the log tells, once it answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"The server ended with {server.returncode}:\n{log.read_text()[-4000:]}"
        if running := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text()):
            try:
                with urllib.request.urlopen(f"{running[1]}/health", timeout=5) as response:
                    if response.status == 200:
                        return running[1]
            except (urllib.error.URLError, OSError):
                pass
        time.sleep(0.3)
    raise AssertionError(f"No answer within {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def as_url(image) -> dict:
    """An image as OpenAI's API takes it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


SYSTEM = {"role": "system", "content": "You are terse."}
ONE, TWO = make_image(seed=1), make_image(50, 90, seed=2)
CONVERSATIONS = {
    "text only": [{"role": "user", "content": "Who are you?"}],
    "one image": [{"role": "user", "content": [as_url(ONE), text("What is this?")]}],
    "another image": [{"role": "user", "content": [as_url(TWO), text("What is this?")]}],
    "several images": [{"role": "user", "content": [as_url(ONE), as_url(TWO), text("What is this?")]}],
    "system": [SYSTEM, {"role": "user", "content": [as_url(ONE), text("What is this?")]}],
    "several turns": [
        {"role": "user", "content": [as_url(ONE), text("What is this?")]},
        {"role": "assistant", "content": "A sign."},
        {"role": "user", "content": [as_url(TWO), text("And this?")]},
    ],
}


@pytest.fixture(scope="module")
def expected(printable_model, processor) -> dict[str, str]:
    answers = {}
    for name, messages in CONVERSATIONS.items():
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = printable_model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers[name] = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(set(answers.values())) == len(answers), "the conversations must have different answers"
    return answers


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_client_gets_what_generate_gives(client, folder, expected, name):
    answer = client.chat.completions.create(
        model=str(folder), messages=CONVERSATIONS[name], max_tokens=TOKENS, temperature=0
    )
    assert answer.choices[0].message.content == expected[name]
    assert answer.usage.completion_tokens == TOKENS


def test_a_streamed_answer_is_the_same_in_pieces(client, folder, expected):
    stream = client.chat.completions.create(
        model=str(folder), messages=CONVERSATIONS["one image"], max_tokens=TOKENS, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 3
    assert "".join(pieces) == expected["one image"]
