"""Generation in all the ways that transformers knows."""

import functools

import pytest
import torch
from helpers.tiny_models import ask, make_image, make_model, make_processor
from transformers import CompileConfig, DynamicCache

from convllava_hf import ConvLlavaForConditionalGeneration


CHATS = [
    ask("What is this?", make_image(seed=1)),
    ask("Compare them in a rather long sentence, please.", make_image(seed=2), make_image(seed=3)),
    ask("No image."),
]


def prepare(processor, chats) -> dict:
    texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    images = [part["image"] for chat in chats for part in chat[0]["content"] if part["type"] == "image"]
    return dict(
        processor(images=images or None, text=texts, add_special_tokens=False, return_tensors="pt", padding=True)
    )


@pytest.fixture(scope="module")
def inputs(processor):
    return prepare(processor, CHATS)


def answer(model, inputs, **kwargs) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, **kwargs}
    with torch.no_grad():
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def greedy(model, inputs) -> torch.Tensor:
    return answer(model, inputs)


def greedy_without_generate(model, inputs, steps: int) -> torch.Tensor:
    """The plain definition: the whole sequence anew for every token, no cache, no transformers code around it."""
    inputs = dict(inputs)
    banned = model.generation_config.suppress_tokens
    with torch.no_grad():
        for _ in range(steps):
            logits = model(**inputs, use_cache=False).logits[:, -1]
            logits[:, banned] = -torch.inf
            inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], dim=1)
            inputs["attention_mask"] = torch.cat(
                [inputs["attention_mask"], torch.ones_like(inputs["attention_mask"][:, :1])], dim=1
            )
    return inputs["input_ids"][:, -steps:]


def test_greedy_is_what_the_logits_say(model, inputs, greedy):
    assert torch.equal(greedy, greedy_without_generate(model, inputs, 12))
    assert len({tuple(row.tolist()) for row in greedy}) == 3


def test_batch_equals_one_at_a_time(model, processor, greedy):
    for chat, expected in zip(CHATS, greedy, strict=True):
        assert torch.equal(answer(model, prepare(processor, [chat]))[0], expected)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2), (2, 0)])
def test_images_find_their_prompts_in_any_order(model, processor, greedy, order):
    together = answer(model, prepare(processor, [CHATS[index] for index in order]))
    assert torch.equal(together, greedy[list(order)])


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"past_key_values": "new"},
    ],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_no_cache_changes_the_answer(model, inputs, greedy, options):
    if options.get("past_key_values") == "new":
        options = {"past_key_values": DynamicCache()}
    assert torch.equal(answer(model, inputs, **options), greedy)


def test_beams_and_returned_sequences_keep_their_images(model, processor, inputs):
    """A prompt's beams must see that prompt's images, whatever number of images its neighbors have."""
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        together = answer(model, inputs, **options)
        count = options.get("num_return_sequences", 1)
        for index, chat in enumerate(CHATS):
            alone = answer(model, prepare(processor, [chat]), **options)
            ours = together[index * count : (index + 1) * count]
            length = min(ours.shape[1], alone.shape[1])
            assert torch.equal(ours[:, :length], alone[:, :length])


def test_sampling_draws_from_the_right_distribution(model, inputs, greedy):
    """Cold sampling is greedy; warm sampling with one seed is repeatable and with another differs."""
    cold = answer(model, inputs, do_sample=True, temperature=1e-4, num_return_sequences=2)
    assert torch.equal(cold, greedy.repeat_interleave(2, dim=0))
    torch.manual_seed(1)
    first = answer(model, inputs, do_sample=True, temperature=2.0, top_k=0)
    torch.manual_seed(1)
    assert torch.equal(answer(model, inputs, do_sample=True, temperature=2.0, top_k=0), first)
    assert not torch.equal(answer(model, inputs, do_sample=True, temperature=2.0, top_k=0), first)


def test_placeholder_and_padding_rows_are_never_emitted(inputs):
    model = make_model()
    with torch.no_grad():  # make the placeholder by far the likeliest token
        model.lm_head.weight[3] = 100 * model.lm_head.weight.abs().max()
        model.lm_head.weight[330] = -model.lm_head.weight[3]
    sampled = answer(model, inputs, do_sample=True, max_new_tokens=30)
    assert not torch.isin(sampled, torch.tensor([3, *range(324, 384)])).any()


def test_generation_from_embeddings(model, inputs, greedy):
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
    rest = {name: inputs[name] for name in ("attention_mask", "pixel_values", "image_sizes")}
    with torch.no_grad():
        generated = model.generate(inputs_embeds=embeddings, **rest, max_new_tokens=12, do_sample=False)
        beams = model.generate(inputs_embeds=embeddings, **rest, max_new_tokens=12, do_sample=False, num_beams=3)
    assert torch.equal(generated, greedy)
    assert torch.equal(beams, answer(model, inputs, num_beams=3))


def test_scores_states_and_attentions_can_be_had(model, inputs):
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            output_hidden_states=True,
        )
    assert len(output.scores) == 3 and len(output.hidden_states) == 3
    assert output.hidden_states[0][0].shape[1] == inputs["input_ids"].shape[1]


def test_conversation_goes_on_with_its_cache(model, processor):
    """A second turn on the first one's cache answers as the whole conversation does anew."""
    first = prepare(processor, [CHATS[0]])
    cache = DynamicCache()
    with torch.no_grad():
        turn = model.generate(**first, past_key_values=cache, max_new_tokens=5, do_sample=False)
        more = processor.tokenizer(" USER: And now? ASSISTANT:", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([turn, more["input_ids"]], dim=1)
        mask = torch.ones_like(ids)
        continued = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False
        )
        images = {name: first[name] for name in ("pixel_values", "image_sizes")}
        anew = model.generate(input_ids=ids, attention_mask=mask, **images, max_new_tokens=8, do_sample=False)
    assert torch.equal(continued, anew)


def test_a_further_turn_brings_its_own_image(model, processor):
    """On the first turn's cache, with the new image alone, the answer is that of both images anew."""
    first = prepare(processor, [CHATS[0]])
    image = make_image(seed=9)
    cache = DynamicCache()
    with torch.no_grad():
        turn = model.generate(**first, past_key_values=cache, max_new_tokens=5, do_sample=False)
        more = processor(images=image, text=" USER: <image> And this?", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([turn, more["input_ids"]], dim=1)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        new = {name: more[name] for name in ("pixel_values", "image_sizes")}
        both = {name: torch.cat([first[name], more[name]]) for name in new}
        continued = model.generate(input_ids=ids, past_key_values=cache, **new, **options)
        anew = model.generate(input_ids=ids, **both, **options)
    assert torch.equal(continued, anew)
    unseen = model.generate(input_ids=ids, **{**both, "pixel_values": both["pixel_values"] * 0}, **options)
    assert not torch.equal(unseen, anew)


def test_guessed_tokens_that_repeat_a_placeholder_change_nothing(model, processor, greedy):
    inputs = prepare(processor, CHATS[:1])
    assert torch.equal(answer(model, inputs, prompt_lookup_num_tokens=4)[0], greedy[0])


def test_pixels_go_in_with_the_prompt_alone(model, inputs, monkeypatch):
    calls = []
    forward = model.model.get_image_features
    monkeypatch.setattr(model.model, "get_image_features", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    answer(model, inputs)
    answer(model, inputs, num_beams=2)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_images_encoded_before_answer_alike(model, inputs, options, monkeypatch):
    expected = answer(model, inputs, **options)
    with torch.no_grad():
        encoded = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    monkeypatch.setattr(model.model.vision_tower, "forward", None)  # it must not be called any more
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(answer(model, {**rest, "image_hidden_states": torch.cat(encoded)}, **options), expected)


def test_images_encoded_before_are_for_their_prompts_alone(model, processor, inputs):
    encoded = torch.zeros(3, 32)
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="but the images have 3 visual tokens"):
        answer(model, {**rest, "image_hidden_states": encoded})
    with pytest.raises(ValueError, match="not as both"):
        answer(model, {**inputs, "image_hidden_states": encoded})


@pytest.mark.parametrize("text", ["qwen2", "qwen3", "mistral", "gemma2"])
def test_other_language_models(text):
    processor = make_processor()
    model = make_model(text=text)
    inputs = prepare(processor, CHATS)
    together = answer(model, inputs)
    assert torch.equal(together, greedy_without_generate(model, inputs, 12))
    alone = torch.cat([answer(model, prepare(processor, [chat])) for chat in CHATS])
    assert torch.equal(together, alone)


def test_tied_embeddings_answer_alike_after_loading(tmp_path, inputs):
    model = make_model(tie_word_embeddings=True)
    expected = answer(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(ConvLlavaForConditionalGeneration.from_pretrained(tmp_path), inputs), expected)


def compiled_graphs() -> tuple[int, dict]:
    """Graphs that torch.compile has made since the counters were cleared, and why it broke any."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_decode_step_compiles_without_graph_breaks(inputs, greedy, fresh_compiler):
    model = make_model()
    forward, steps = model.forward, []
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend="aot_eager")

    @functools.wraps(forward)
    def step(*args, input_ids=None, pixel_values=None, **kwargs):
        if pixel_values is not None:
            return forward(*args, input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        steps.append(input_ids.shape[1])
        return compiled(*args, input_ids=input_ids, **kwargs)

    model.forward = step
    assert torch.equal(answer(model, inputs, cache_implementation="static", disable_compile=True), greedy)
    assert steps == [1] * 11
    graphs, breaks = compiled_graphs()
    assert 1 <= graphs <= 2 and not breaks


def test_generate_compiles_the_decode_step_by_itself(inputs, greedy, fresh_compiler):
    """The way of transformers' documentation: a static cache and a compile config given to `generate`."""
    model = make_model()
    options = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    options._compile_all_devices = True  # transformers compiles on accelerators alone otherwise
    assert torch.equal(answer(model, inputs, cache_implementation="static", compile_config=options), greedy)
    graphs, breaks = compiled_graphs()
    assert graphs >= 1 and not breaks
