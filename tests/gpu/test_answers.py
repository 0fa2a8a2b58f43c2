"""Answers on a GPU, in every way to ask for them, are those that the CPU gives in float32."""

import base64
import functools
import json
import sys

import numpy as np
import pytest
import torch
from helpers.tiny_models import ask, make_image
from transformers import AutoModelForImageTextToText, CompileConfig, pipeline

from convllava_hf import ConvLlavaForConditionalGeneration, cli
from convllava_hf.inference import assistant_turn, load, prompt_inputs, user_turn
from convllava_hf.options import with_image_options

from .devices import CUDA, moved, needs_cuda


pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
QUESTION = "What is on the sign?"
CHATS = [
    ask("What is this?", make_image(seed=1)),
    ask("Compare them in a rather long sentence, please.", make_image(seed=2), make_image(70, 250, seed=3)),
    ask("No image."),
]
TOKENS = 12


@pytest.fixture(scope="module")
def inputs(processor) -> dict:
    return dict(prompt_inputs(processor, CHATS))


def answer(model, inputs, **options) -> torch.Tensor:
    options = {"max_new_tokens": TOKENS, "do_sample": False, **options}
    with torch.no_grad():
        return model.generate(**moved(inputs, model.device), **options)[:, inputs["input_ids"].shape[1] :].cpu()


@pytest.fixture(scope="module")
def greedy(model, inputs) -> torch.Tensor:
    """What the CPU answers."""
    return answer(model, inputs)


@pytest.fixture(scope="module")
def assistants(checkpoint, device) -> tuple:
    """On the device and on the CPU, both in float32."""
    return tuple(load(checkpoint, device=one, dtype="float32") for one in (device, "cpu"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 4},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_cpu(options, model, model_on, inputs, device):
    if "prompt_lookup_num_tokens" in options:  # one prompt at a time
        inputs = {name: inputs[name][:1] for name in inputs}
        inputs["input_ids"], inputs["attention_mask"] = (
            inputs[name][:, inputs["attention_mask"][0].argmax() :] for name in ("input_ids", "attention_mask")
        )
    found = answer(model_on(device, torch.float32), inputs, **options)
    assert torch.equal(found, answer(model, inputs, **options))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_decode_step_with_a_static_cache(model_on, inputs, greedy, device):
    import copy

    model = copy.deepcopy(model_on(device, torch.float32))
    forward, steps = model.forward, []
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend="inductor" if CUDA else "aot_eager")

    @functools.wraps(forward)
    def step(*args, input_ids=None, pixel_values=None, **kwargs):
        if pixel_values is not None:
            return forward(*args, input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        steps.append(input_ids.shape[1])
        return compiled(*args, input_ids=input_ids, **kwargs)

    model.forward = step
    found = answer(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, greedy)
    assert steps == [1] * (TOKENS - 1)


@pytest.mark.usefixtures("fresh_compiler")
def test_generate_compiles_the_decode_step_by_itself(model_on, inputs, greedy, device):
    """On a GPU as it comes: a static cache is all that is said, and CUDA graphs are made of the step."""
    import copy

    model = copy.deepcopy(model_on(device, torch.float32))
    options = {}
    if not CUDA:
        options["compile_config"] = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
        options["compile_config"]._compile_all_devices = True
    for _ in range(2):
        assert torch.equal(answer(model, inputs, cache_implementation="static", **options), greedy)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_half_precision_is_the_default_on_a_gpu(checkpoint, device):
    assistant = load(checkpoint)
    assert assistant.device.type == device.type
    if CUDA:
        assert assistant.dtype == torch.bfloat16
    reply = assistant.answer([user_turn(QUESTION, [make_image()])], max_new_tokens=TOKENS)
    assert reply.token_ids and reply.visual_tokens == 4


def test_an_assistant_answers_and_streams(assistants):
    ours, theirs = (one.with_image_options(image_aspect_ratio="native") for one in assistants)
    turns, pieces = [user_turn(QUESTION, [make_image(), make_image(40, 90, seed=2)])], []
    options = {"max_new_tokens": TOKENS}
    reply = ours.answer(turns, on_text=pieces.append, **options)
    assert reply.token_ids == theirs.answer(turns, **options).token_ids
    assert "".join(pieces) == reply.text
    calls = []
    short = ours.answer(turns, should_stop=lambda: calls.append(1) or len(calls) == 3, **options)
    assert short.token_ids == reply.token_ids[:3]


def test_sampling(assistants):
    reply = assistants[0].answer([user_turn(QUESTION, [make_image()])], max_new_tokens=TOKENS, temperature=0.7)
    assert 0 < len(reply.token_ids) <= TOKENS


@pytest.mark.parametrize("kind", ["PIL", "tensor"])
def test_a_prompt_cache_answers_as_none(kind, assistants, device):
    """Turns that go on, that branch off, and that bring another image."""
    plain, remembering = assistants[0], assistants[0].with_prompt_cache()
    image = make_image()
    if kind == "tensor":
        image = torch.tensor(np.asarray(image), device=device)
    messages, reused = [user_turn(QUESTION, [image])], []
    for question in (["And below?"], ["And this?", [make_image(70, 250, seed=1)]]):
        expected = plain.answer(messages, max_new_tokens=8)
        found = remembering.answer(messages, max_new_tokens=8)
        assert found.token_ids == expected.token_ids
        reused.append(found.reused_tokens)
        messages += [assistant_turn(found.text), user_turn(*question)]
    for turns in (messages, [*messages[:1], assistant_turn("A door."), *messages[2:]], messages[:1]):
        found, expected = (one.answer(turns, max_new_tokens=8) for one in (remembering, plain))
        assert found.token_ids == expected.token_ids
        reused.append(found.reused_tokens)
    assert reused[0] == 0 and all(reused[1:])
    assert all(one.tokens.device.type == device.type for one in remembering.prompt_cache.images.values())


@needs_cuda
@pytest.mark.parametrize("on_gpu", [1.0, 0.85, 0.3])
def test_an_automatic_device_map(on_gpu, wide, processor):
    """`auto`, and with so little room on the GPU that a part stays on the CPU."""
    whole = AutoModelForImageTextToText.from_pretrained(wide, dtype=torch.float32)
    size = sum(one.nbytes for one in whole.parameters())
    options = {} if on_gpu == 1.0 else {"max_memory": {0: int(on_gpu * size), "cpu": 2**30}}
    split = AutoModelForImageTextToText.from_pretrained(wide, dtype=torch.float32, device_map="auto", **options)
    # A model that fits one device is put there as a whole, without a map.
    places = getattr(split, "hf_device_map", {"": split.device}).values()
    assert {torch.device(place).type for place in places} == ({"cuda"} if on_gpu == 1.0 else {"cuda", "cpu"})
    inputs = prompt_inputs(with_image_options(processor, {"image_aspect_ratio": "native"}), CHATS)
    kwargs = {"suppress_tokens": [3], "eos_token_id": 2, "pad_token_id": 0}
    assert torch.equal(answer(split, inputs, **kwargs), answer(whole, inputs, **kwargs))


@pytest.mark.parametrize(
    "where", ["model.vision_tower.encoder.stages.2.layers.1", "model.vision_tower", "model.language_model", "lm_head"]
)
def test_parts_in_another_place(where, checkpoint, model, inputs, greedy, tmp_path):
    """On the CPU, or without a GPU on disk; a block in the middle of a stage, too."""
    here, elsewhere = (0, "cpu") if CUDA else ("cpu", "disk")
    names = ["lm_head", "model.multi_modal_projector", "model.language_model", "model.vision_tower.embeddings"]
    names += [f"model.vision_tower.encoder.stages.{number}" for number in (0, 1, 3, 4)]
    split_stage = "model.vision_tower.encoder.stages.2"
    names += [f"{split_stage}.{part}" for part in ("downsampling_layer", "layers.0", "layers.1")]
    device_map = {name: elsewhere if name.startswith(where) else here for name in names}
    split = ConvLlavaForConditionalGeneration.from_pretrained(
        checkpoint, device_map=device_map, offload_folder=tmp_path
    )
    split.generation_config = model.generation_config
    given = moved(inputs, torch.device("cuda", 0) if CUDA else CPU)
    with torch.no_grad():
        found = split.generate(**given, max_new_tokens=TOKENS, do_sample=False).cpu()
    assert torch.equal(found[:, inputs["input_ids"].shape[1] :], greedy)


def test_the_pipeline(checkpoint, model, processor, device):
    pipe = pipeline("image-text-to-text", model=str(checkpoint), device=0 if CUDA else "cpu", dtype=torch.float32)
    assert pipe.model.device.type == device.type
    single = {"max_new_tokens": TOKENS, "do_sample": False}
    for chat in CHATS[:2]:
        found = pipe(text=chat, return_full_text=False, generate_kwargs=dict(single))[0]["generated_text"]
        given = prompt_inputs(processor, [chat])
        expected = answer(model, given)[0]
        assert found == processor.decode(expected, skip_special_tokens=True)


def test_the_handler_of_endpoints(checkpoint, image_file, tmp_path, device, monkeypatch):
    from helpers.handler_loading import MODULE, load_handler, make_repository

    folder, before = make_repository(checkpoint, tmp_path / "repository"), list(sys.path)
    try:
        handler = load_handler(folder)
    finally:
        sys.path[:] = before
        sys.modules.pop(MODULE, None)
    assert handler.model.device.type == device.type
    encoded = base64.b64encode(image_file.read_bytes()).decode()
    request = {"inputs": {"image": encoded, "question": QUESTION}, "parameters": {"max_new_tokens": TOKENS}}
    reply = handler(request)
    assert reply["visual_tokens"] == 4 and 0 < reply["generated_tokens"] <= TOKENS
    dtype = torch.bfloat16 if CUDA else torch.float32
    assert handler.model.dtype == dtype
    expected = load(checkpoint, device=device, dtype=dtype).answer(
        [user_turn(QUESTION, [make_image(90, 140)])], max_new_tokens=TOKENS
    )
    assert reply["generated_text"] == expected.text
    monkeypatch.setattr(handler.model, "generate", _full)
    assert handler(request)["status"] == 503


def _full(**kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("quantization", [None, pytest.param("4bit", marks=needs_cuda)])
def test_the_command_ask(quantization, wide, image_file, device, capsys):
    line = ["ask", str(wide), str(image_file), QUESTION, "--device", str(device), "--max-new-tokens", "4"]
    assert cli.main([*line, "--json", *(["--quantization", quantization] if quantization else [])]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"].startswith(device.type) and report["new_tokens"] > 0 and report["visual_tokens"] == 4


def test_the_demo_s_conversation(assistants, image_file, tmp_path):
    """Answers are generated in a thread."""
    from convllava_hf.demo.chat_session import ChatSession, Conversation
    from convllava_hf.demo.limits import Limits

    told = []
    for number, assistant in enumerate(assistants):
        chat_session = ChatSession(assistant, tmp_path / str(number), Limits())
        conversation = Conversation()
        for question in ("What?", "And below?"):
            *_, last = chat_session.ask(
                conversation, str(image_file), question, next(iter(chat_session.presets)), 8, 0.0, lambda: False
            )
            conversation = last.conversation
        told.append([turn.answer for turn in conversation.turns])
    assert told[0] == told[1] and len(told[0]) == 2


@pytest.mark.parametrize(("name", "choice"), [("pope", "letter"), ("mmbench", "likelihood")])
def test_an_evaluation(name, choice, checkpoint, assistants, tmp_path):
    pytest.importorskip("datasets")
    from helpers.benchmark_data import make

    from convllava_hf.evaluation.benchmarks import BENCHMARKS
    from convllava_hf.evaluation.run_settings import Model, Settings
    from convllava_hf.evaluation.runner import evaluate

    path, scores = make(name, tmp_path / "data", samples=6), []
    for number, assistant in enumerate(assistants):
        model = Model(str(checkpoint), lambda assistant=assistant: assistant, torch.float32)
        settings = Settings(batch_size=3, choice=choice)
        _, record, _ = evaluate(BENCHMARKS[name], model, assistant.processor, tmp_path / str(number), path, settings)
        scores.append((record["scores"], record["counts"]))
    assert scores[0] == scores[1]
