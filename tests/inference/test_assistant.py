"""Loading for inference and answering: devices, dtypes, refusals, streaming."""

import copy
import json
import shutil
import socket

import pytest
import torch
from helpers.tiny_models import make_image

from convllava_hf.errors import ConvLlavaError
from convllava_hf.inference import (
    Assistant,
    assistant_turn,
    load,
    open_image,
    system_turn,
    user_turn,
)
from convllava_hf.inference.assistant import _AnswerStream
from convllava_hf.inference.loading import check_checkpoint, choose_device, choose_dtype


@pytest.fixture(scope="module")
def assistant(checkpoint) -> Assistant:
    return load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def turn() -> dict:
    return user_turn("What is on the sign?", [make_image()])


def test_load_puts_the_model_where_and_as_asked(checkpoint):
    assistant = load(checkpoint, device="cpu", dtype="bfloat16")
    assert assistant.device == torch.device("cpu")
    assert {parameter.dtype for parameter in assistant.model.parameters()} == {torch.bfloat16}
    assert not assistant.model.training
    assert assistant.answer([user_turn("Hello", [make_image()])], max_new_tokens=2).token_ids


def test_answer_is_what_generate_gives(assistant, turn):
    """Against the plain calls that a user of transformers would write."""
    inputs = assistant.processor.apply_chat_template(
        [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = assistant.model.generate(**inputs, max_new_tokens=12, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    answer = assistant.answer([turn], max_new_tokens=12)
    assert answer.token_ids == expected.tolist()
    assert answer.text == assistant.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.visual_tokens == 4  # 128 x 128 pixels at stride 64
    assert 0 < answer.first_token_seconds <= answer.seconds


def test_pieces_of_a_stream_make_the_whole_text(assistant, turn):
    pieces = []
    answer = assistant.answer([turn], max_new_tokens=24, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 1


def test_exception_of_the_listener_reaches_the_caller(assistant, turn):
    class Stop(Exception):
        pass

    def listen(piece: str) -> None:
        raise Stop

    with pytest.raises(Stop):
        assistant.answer([turn], max_new_tokens=24, on_text=listen)


def test_stream_keeps_blanks_after_line_breaks_and_whole_characters():
    class Bytes:
        def decode(self, token_ids, **kwargs):
            return bytes(token_ids).decode("utf-8", errors="replace")

    pieces = []
    stream = _AnswerStream(Bytes(), pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in "if x:\n    é🚲".encode():
        stream.put(torch.tensor([byte]))
    assert "".join(pieces) == "if x:\n    é🚲"
    assert pieces[-2:] == ["é", "🚲"]
    stream.put(torch.tensor([0xC3]))  # half a character at the very end is shown as what it is
    stream.end()
    assert pieces[-1] == "\N{REPLACEMENT CHARACTER}"


def test_temperature_draws(assistant, turn):
    torch.manual_seed(1)
    drawn = {tuple(assistant.answer([turn], max_new_tokens=8, temperature=5.0).token_ids) for _ in range(4)}
    assert len(drawn) > 1


def test_greedy_in_spite_of_sampling_in_the_generation_config(assistant, turn, monkeypatch):
    expected = assistant.answer([turn], max_new_tokens=8).token_ids
    sampling = copy.deepcopy(assistant.model.generation_config)
    sampling.update(do_sample=True, temperature=9.0, top_p=0.9)
    monkeypatch.setattr(assistant.model, "generation_config", sampling)
    assert all(assistant.answer([turn], max_new_tokens=8).token_ids == expected for _ in range(3))


def test_conversations_have_a_system_message_and_several_turns(assistant, turn):
    prompts = []

    class Recording:
        tokenizer = assistant.processor.tokenizer

        def apply_chat_template(self, messages, **kwargs):
            prompts.append(assistant.processor.apply_chat_template(messages, add_generation_prompt=True))
            return assistant.processor.apply_chat_template(messages, **kwargs)

    messages = [system_turn("Be brief."), turn, assistant_turn("An exit."), user_turn("Which?")]
    Assistant(assistant.model, Recording()).answer(messages, max_new_tokens=1)
    ((prompt,),) = prompts
    assert prompt == (
        "<s>Be brief. USER: <image>\nWhat is on the sign? ASSISTANT: An exit.</s>USER: Which? ASSISTANT:"
    )


def test_answer_ends_at_the_context_and_a_full_context_is_refused(assistant):
    limit = assistant.model.config.get_text_config().max_position_embeddings

    def prompt_tokens(words: int) -> int:
        return assistant.answer([user_turn("a " * words)], max_new_tokens=1).prompt_tokens

    per_word, alone = prompt_tokens(2) - prompt_tokens(1), prompt_tokens(1)
    room = 5
    answer = assistant.answer([user_turn("a " * (1 + (limit - room - alone) // per_word))], max_new_tokens=10_000)
    assert room <= limit - answer.prompt_tokens < room + per_word
    assert len(answer.token_ids) <= limit - answer.prompt_tokens
    with pytest.raises(ConvLlavaError, match=f"context holds {limit}"):
        prompt_tokens(limit)


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("What?", 1, ["image", "What?"]),
        ("What?", 2, ["image", "image", "What?"]),
        ("What?", 0, ["What?"]),
        ("", 1, ["image"]),
        ("Look at <image> and say.", 1, ["Look at ", "image", " and say."]),
        ("<image>\nWhat?", 1, ["image", "What?"]),
        ("<image>\n<image>\nWhich?", 2, ["image", "image", "Which?"]),
        ("Is <image> like <image>?", 2, ["Is ", "image", " like ", "image", "?"]),
    ],
)
def test_images_stand_first_or_where_the_text_says(text, images, expected):
    turn = user_turn(text, [make_image(seed=index) for index in range(images)])
    assert [part.get("text", part["type"]) for part in turn["content"]] == expected


@pytest.mark.parametrize(("text", "images"), [("<image> and <image>", 1), ("<image>", 0), ("a <image>", 2)])
def test_images_and_places_that_differ_are_refused(text, images):
    with pytest.raises(ConvLlavaError, match=f"{text.count('<image>')} times and comes with {images} images"):
        user_turn(text, [make_image()] * images)


def test_open_image(tmp_path):
    image = make_image()
    image.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").tobytes() == image.tobytes()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:-2000])
    for name in ("missing.png", "text.png", "half.png", "."):
        with pytest.raises(ConvLlavaError, match="Cannot read the image") as caught:
            open_image(tmp_path / name)
        assert str(tmp_path) in str(caught.value)


def test_url_that_does_not_answer(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening: connections are refused
        with pytest.raises(ConvLlavaError, match="Cannot read the image 'http://"):
            open_image(f"http://127.0.0.1:{taken.getsockname()[1]}/a.png")


def test_folders_that_are_no_convllava_are_refused_by_name(tmp_path, golden):
    with pytest.raises(ConvLlavaError, match=r"no folder .*nowhere"):
        check_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConvLlavaError, match="no config.json"):
        check_checkpoint(tmp_path)
    with pytest.raises(ConvLlavaError, match="is a file"):
        check_checkpoint(golden / "inference.json")
    with pytest.raises(ConvLlavaError, match="convllava convert"):
        check_checkpoint(golden / "checkpoint-stage3")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConvLlavaError, match="model_type 'llama'"):
        check_checkpoint(tmp_path)
    for broken in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ConvLlavaError, match=r"config\.json (is not valid JSON|does not hold a JSON object)"):
            check_checkpoint(tmp_path)


def test_ids_of_the_hub_are_looked_up_there(tmp_path, monkeypatch):
    """Offline, as the tests are, the lookup ends in a refusal that names the id; no network is touched."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvLlavaError, match="no model with that id could be read from the Hub"):
        check_checkpoint("nobody/no-such-convllava")


def test_incomplete_and_damaged_weights_are_refused(checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConvLlavaError, match="Cannot load the checkpoint"):
        load(damaged, device="cpu")
    weights.unlink()
    with pytest.raises(ConvLlavaError, match="Cannot load the checkpoint"):
        load(damaged, device="cpu")


def test_a_damaged_tokenizer_is_refused(checkpoint, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConvLlavaError, match="Cannot load the checkpoint"):
        load(damaged, device="cpu")


@pytest.mark.parametrize(
    "name", ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_checkpoint_without_a_part_of_its_processor_is_refused(name, checkpoint, tmp_path):
    partial = tmp_path / "partial"
    shutil.copytree(checkpoint, partial)
    (partial / name).unlink()
    with pytest.raises(ConvLlavaError, match=f"is incomplete: {name} is missing"):
        load(partial, device="cpu")


def test_missing_tensors_are_refused(checkpoint, tmp_path):
    """transformers itself would only warn and let the model answer with random weights."""
    from safetensors.torch import load_file, save_file

    partial = tmp_path / "partial"
    shutil.copytree(checkpoint, partial)
    tensors = load_file(partial / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    del tensors[name]
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConvLlavaError, match=name):
        load(partial, device="cpu")


def test_devices(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    with pytest.raises(ConvLlavaError, match="'toaster' cannot be used"):
        choose_device("toaster")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConvLlavaError, match="'cuda' cannot be used"):
        choose_device("cuda")


def test_dtypes(monkeypatch):
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert choose_dtype(cpu, "float16") is torch.float16
    assert choose_dtype(cpu, torch.float64) is torch.float64
    with pytest.raises(ConvLlavaError, match="'int3'"):
        choose_dtype(cpu, "int3")
    for has_bfloat16, on_cpu, on_cuda in [
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.float32, torch.float16),
    ]:
        capabilities = {"avx512_bf16": has_bfloat16}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=has_bfloat16: found)
        assert choose_dtype(cpu) is on_cpu
        assert choose_dtype(cuda) is on_cuda
    assert choose_dtype(mps) is torch.float16


def test_unknown_quantization_is_refused(checkpoint):
    with pytest.raises(ConvLlavaError, match="'2bit': choose one of 4bit, 8bit"):
        load(checkpoint, device="cpu", quantization="2bit")


def test_quantization_without_bitsandbytes_names_the_remedy(checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ConvLlavaError, match=r"pip install 'convllava-hf\[quantization\]'"):
        load(checkpoint, device="cpu", quantization="4bit")
