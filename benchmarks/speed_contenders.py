"""The models that are compared: true shapes, random weights, nothing downloaded.

Each kind is a function of a contender's spec, device and dtype that builds the model, and returns a function from a
task to the call that is timed and facts about it (those that are functions are asked after the call).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from convllava_hf.inference.vision_backends import optimize_vision_tower
from convllava_hf.modeling.modeling_convllava import ConvLlavaVisionTower
from convllava_hf.profiling.generation import QUESTION_TOKENS, answer, prompt
from convllava_hf.profiling.measuring import operations
from convllava_hf.profiling.models import built, random_model, text_config, tower_config


IMAGE = 3  # the placeholder's id in every model here
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
QWEN = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}  # wider in the class's defaults
QWEN_TINY = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
CLIP_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def pixels(size, device, dtype, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator).to(device, dtype)


def module_task(module, make, device, dtype, tokens) -> Callable:
    """Of a module that takes pixels. A task: `size` (height, width), and `batch`."""

    @functools.cache
    def counted(shape):
        return operations(make, shape)

    def do(task):
        inputs = pixels(task["size"], device, dtype, task.get("batch", 1))
        return lambda: module(inputs), {"operations": counted(tuple(inputs.shape)), "tokens": tokens(task)}

    return do


def ours_tower(spec, device, dtype):
    config = tower_config(spec["tiny"])
    tower = built(lambda: ConvLlavaVisionTower(config), device, dtype)
    optimize_vision_tower(tower, spec.get("tower", "eager"))

    def tokens(task):
        return task.get("batch", 1) * (task["size"][0] // 64) * (task["size"][1] // 64)

    return module_task(tower, lambda: ConvLlavaVisionTower(config), device, dtype, tokens)


def convnext(spec, device, dtype):
    """transformers' own, called as the original code calls it: for the hidden states of all stages."""
    from transformers import ConvNextModel

    class Original(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ConvNextModel(tower_config(spec["tiny"]))

        def forward(self, images):
            return self.model(images, output_hidden_states=True).hidden_states[-1]

    def tokens(task):
        return task.get("batch", 1) * (task["size"][0] // 64) * (task["size"][1] // 64)

    return module_task(built(Original, device, dtype), Original, device, dtype, tokens)


def clip(spec, device, dtype):
    """CLIP ViT-L/14 with a position for every patch of the task's resolution, all sizes of one model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = CLIP_TINY if spec["tiny"] else CLIP_L

    def make(side, attention):
        config = CLIPVisionConfig(image_size=side, patch_size=14, attn_implementation=attention, **shape)
        return CLIPVisionModel(config)

    @functools.lru_cache(maxsize=1)  # others would count as this one's memory
    def model(side):
        return built(lambda: make(side, "sdpa"), device, dtype)

    model(336)

    @functools.cache
    def counted(shape):  # attention written out, which is what torch's counter knows on tensors without storage
        return operations(lambda: make(shape[-1], "eager"), shape)

    def do(task):
        inputs = pixels(task["size"], device, dtype, task.get("batch", 1))
        tower = model(task["size"][1])
        tokens = task.get("batch", 1) * (task["size"][1] // 14) ** 2
        return lambda: tower(inputs), {"operations": counted(tuple(inputs.shape)), "tokens": tokens}

    return do


def fastvit(spec, device, dtype):
    """FastVLM's tower, with its branches merged, as transformers runs it."""
    import timm

    name = "fastvit_t8" if spec["tiny"] else "fastvit_mci3"

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model(name, pretrained=False, inference_mode=True, num_classes=0)

        def forward(self, images):
            return self.model.forward_features(images)

    def tokens(task):
        return task.get("batch", 1) * (task["size"][0] // 64) * (task["size"][1] // 64)

    return module_task(built(Tower, device, dtype), Tower, device, dtype, tokens)


def answering(model, prepare: Callable[[Any], dict[str, torch.Tensor]], new_tokens: int) -> Callable:
    """Of a whole model: `seconds` are those to the first token. What is returned has the model and `prepare`, too."""

    def do(task):
        inputs = prepare(task)
        taken = []
        facts = {"visual_tokens": int((inputs["input_ids"] == IMAGE).sum()), "prompt": inputs["input_ids"].shape[1]}
        later = {"seconds": lambda: taken[-1][0], "tokens_per_second": lambda: taken[-1][1]}
        return lambda: taken.append(answer(model, inputs, 1 + new_tokens)), {**facts, **later}

    do.model, do.prepare = model, prepare
    return do


def ids(tokens: int, device) -> dict[str, torch.Tensor]:
    """A prompt with so many placeholders, as `prompt` writes it."""
    text = torch.arange(QUESTION_TOKENS) % 100 + 10
    row = torch.cat([text[:8], torch.full((tokens,), IMAGE), text[8:]])[None].to(device)
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def ours(spec, device, dtype):
    model = random_model(spec["text"], device, dtype)
    optimize_vision_tower(model.vision_tower, spec.get("tower", "eager"))

    def prepare(task):
        height, width = task["size"]
        return prompt(model.config, model.config.num_visual_tokens(height, width), pixels(task["size"], device, dtype))

    return answering(model, prepare, spec["new_tokens"])


def loaded(spec, device, dtype):
    """A checkpoint, quantized as `spec["quantization"]` says; its logits for a task go into a file."""
    import warnings
    from pathlib import Path

    from convllava_hf import ConvLlavaForConditionalGeneration
    from convllava_hf.inference.loading import quantization_config

    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # said in every layer of every step
    how = {}
    if spec.get("quantization") == "torchao-8bit":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        how = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    elif "quantization" in spec:
        how = {"quantization_config": quantization_config(spec["quantization"], dtype)}
    model = ConvLlavaForConditionalGeneration.from_pretrained(
        spec["source"], dtype=dtype, device_map={"": device}, **how
    ).eval()

    def prepare(task):
        height, width = task["size"]
        return prompt(model.config, model.config.num_visual_tokens(height, width), pixels(task["size"], device, dtype))

    do = answering(model, prepare, spec["new_tokens"])

    def do_and_keep(task):
        name = f"{spec['name']}.pt"
        with torch.inference_mode():
            torch.save(model(**prepare(task)).logits.float().cpu(), Path(spec["folder"]) / name)
        call, facts = do(task)
        return call, {**facts, "logits": name, "stored": stored(model)}

    return do_and_keep


def stored(model) -> int:
    """Bytes of all weights as they lie in memory, quantized ones packed; without bitsandbytes' scales."""

    def parts(tensor):
        if not hasattr(tensor, "__tensor_flatten__"):
            return [tensor]
        return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]

    whole = [part for tensor in (*model.parameters(), *model.buffers()) for part in parts(tensor)]
    return sum({part.data_ptr(): part.numel() * part.element_size() for part in whole}.values())


def _clip_config(tiny: bool):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(image_size=336, patch_size=14, **(CLIP_TINY if tiny else CLIP_L))


def llava(spec, device, dtype):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=_clip_config(spec["tiny"]), text_config=text_config(spec["text"]), image_token_index=IMAGE
    )
    model = built(lambda: LlavaForConditionalGeneration(config), device, dtype)

    def prepare(task):
        return {**ids(576, device), "pixel_values": pixels((336, 336), device, dtype)}

    return answering(model, prepare, spec["new_tokens"])


def llava_next(spec, device, dtype):
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=_clip_config(spec["tiny"]), text_config=text_config(spec["text"]), image_token_index=IMAGE
    )
    model = built(lambda: LlavaNextForConditionalGeneration(config), device, dtype)

    def prepare(task):
        """672 x 672: the whole at 336, four tiles of 336, and a token at the end of each row of the tiles."""
        tiles = pixels((336, 336), device, dtype, batch=5)[None]
        sizes = torch.tensor([[672, 672]], device=device)
        return {**ids(576 + 48 * 49, device), "pixel_values": tiles, "image_sizes": sizes}

    return answering(model, prepare, spec["new_tokens"])


def fast_vlm(spec, device, dtype):
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    config = FastVlmConfig(text_config=text_config(spec["text"]), image_token_index=IMAGE)
    model = built(lambda: FastVlmForConditionalGeneration(config), device, dtype)

    def prepare(task):
        height, width = task["size"]
        tokens = (height // 64) * (width // 64)
        return {**ids(tokens, device), "pixel_values": pixels(task["size"], device, dtype)}

    return answering(model, prepare, spec["new_tokens"])


def qwen2_5_vl(spec, device, dtype):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = text_config(spec["text"]).to_dict()
    heads = text["num_attention_heads"]
    half = text["hidden_size"] // heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads")
    shape = {name: text[name] for name in names}
    config = Qwen2_5_VLConfig(
        text_config={**shape, "num_attention_heads": heads, "rope_parameters": rope, "tie_word_embeddings": True},
        vision_config={**(QWEN_TINY if spec["tiny"] else QWEN), "out_hidden_size": text["hidden_size"]},
        image_token_id=IMAGE,
        vision_start_token_id=4,
        vision_end_token_id=5,
    )
    model = built(lambda: Qwen2_5_VLForConditionalGeneration(config), device, dtype)

    def prepare(task):
        """Sides are multiples of 28; a patch is 14 x 14 pixels of two frames, a token four patches."""
        rows, columns = (2 * round(side / 28) for side in task["size"])
        patches = torch.randn(rows * columns, 3 * 2 * 14 * 14).to(device, dtype)
        text = ids(rows * columns // 4, device)
        kinds = (text["input_ids"] == IMAGE).int()
        grid = torch.tensor([[1, rows, columns]], device=device)
        return {**text, "mm_token_type_ids": kinds, "pixel_values": patches, "image_grid_thw": grid}

    return answering(model, prepare, spec["new_tokens"])


KINDS = {
    one.__name__: one
    for one in (ours_tower, convnext, clip, fastvit, ours, llava, llava_next, fast_vlm, qwen2_5_vl, loaded)
}
