"""What a training recipe costs, counted and not measured: `python benchmarks/recipe_cost.py` prints the tables of
docs/train.md. Models are built without weights, so it takes seconds and no memory to speak of.
"""

import logging

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration
from convllava_hf.training.arguments import LORA_TARGETS
from convllava_hf.training.trainable import set_trainable


TEXT_TOKENS = 300  # of a sample: an assumption
SAMPLES = {1: 2.0e6, 2: 2.9e6, 3: 0.665e6}  # arXiv 2405.15738, table 15
PEAK, UTILIZATION = 312e12, 0.4  # an A100's dense bfloat16 rate; the share of it is an assumption
TRAINABLE = {
    1: ["projector", "vision_tower.stages.4"],
    2: ["projector", "vision_tower.stages.[2-4]", "language_model", "lm_head"],
    3: ["projector", "language_model", "lm_head"],
}
QWEN2_5_1_5B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def empty_model(text: dict | None = None) -> ConvLlavaForConditionalGeneration:
    """A model of the recipes without weights: with Vicuna-7B's shape, or with that of `text`."""
    config = None if text is None else AutoConfig.for_model(**text)
    with torch.device("meta"):
        return ConvLlavaForConditionalGeneration(ConvLlavaConfig(text_config=config)).eval()


def forward_flops(model, side: int) -> dict[str, float]:
    """Operations of one forward pass over one image and its text, by part of the model."""
    core = model.model
    tokens = (side // core.vision_tower.stride) ** 2
    positions = torch.zeros(1, tokens + TEXT_TOKENS, model.config.text_config.hidden_size, device="meta")
    features = torch.zeros(tokens, model.config.vision_config.hidden_sizes[-1], device="meta")
    with FlopCounterMode(display=False, depth=4) as counter, torch.no_grad():
        core.vision_tower(torch.zeros(1, 3, side, side, device="meta"))
    counts = counter.get_flop_counts()
    flops = {
        f"stage {index}": float(sum(counts[f"ConvLlavaVisionTower.encoder.stages.{index}"].values()))
        for index in range(len(core.vision_tower.encoder.stages))
    }
    flops["stem"] = counter.get_total_flops() - sum(flops.values())
    for name, run in (
        ("projector", lambda: core.multi_modal_projector(features)),
        ("language model", lambda: model.lm_head(core.language_model(inputs_embeds=positions).last_hidden_state)),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        flops[name] = float(counter.get_total_flops())
    return flops


def training_flops(forward: dict[str, float], stage: int) -> float:
    """Operations of a training step on one sample.

    A part before everything that trains costs its forward pass. Behind that, checkpointing repeats the forward pass,
    and the backward pass costs as much again for the activations and, where weights train, for these.
    """
    first = {1: 4, 2: 2, 3: 5}[stage]
    total = forward["stem"] + 4 * forward["projector"] + (3 if stage == 1 else 4) * forward["language model"]
    return total + sum((4 if index >= first else 1) * forward[f"stage {index}"] for index in range(5))


def state_bytes(model, stage: int, trained: int, frozen: int) -> float:
    """Bytes of weights, gradients and optimizer states, with so many for a trained and a frozen weight."""
    parts = set_trainable(model, TRAINABLE[stage])
    trainable = sum(part.trainable for part in parts)
    return trainable * trained + (sum(part.total for part in parts) - trainable) * frozen


def adapter_bytes(text: dict | None = None, bits: int = 16) -> float:
    """Bytes of weights, gradients and optimizer states with LoRA as the recipes have it.

    What trains is in float32 (in bfloat16, the adapter alone, where the language model is quantized) with AdamW.

    Args:
        bits: of a weight of the language model's layers; all others have 16.
    """
    model = empty_model(text)
    config = LoraConfig(r=64, target_modules=LORA_TARGETS, modules_to_save=["multi_modal_projector"])
    quantized = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if ".layers." in name and name.endswith("_proj.weight")
    )
    frozen = sum(weight.numel() for weight in model.parameters())
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    return quantized * bits / 8 + (frozen - quantized) * 2 + trained * (16 if bits == 16 else 8)


def cost_table() -> list[str]:
    lines = ["| | stage 1 | stage 2 | stage 3 | all three |", "|---|---:|---:|---:|---:|"]
    for label, text, sides in (("7B", None, (768, 1024, 1536)), ("1.5B", QWEN2_5_1_5B, (768,))):
        model = empty_model(text)
        for side in sides:
            forward = forward_flops(model, side)
            each = {stage: training_flops(forward, stage) for stage in SAMPLES}
            hours = {stage: each[stage] * SAMPLES[stage] / (PEAK * UTILIZATION) / 3600 for stage in SAMPLES}
            cells = [f"{each[stage] / 1e12:.1f} / {hours[stage]:.0f} h" for stage in SAMPLES]
            lines.append(f"| {label}, {side} px | {' | '.join(cells)} | {sum(hours.values()):.0f} h |")
    return lines


def memory_table() -> list[str]:
    lines = ["| | stage 1 | stage 2 | stage 3 |", "|---|---:|---:|---:|"]
    big, small = empty_model(), empty_model(QWEN2_5_1_5B)
    for label, model, trained, frozen, devices in (
        ("7B, float32, one GPU or DDP", big, 16, 4, 1),
        ("7B, float32, each of 8 GPUs with FSDP2 or ZeRO-3", big, 16, 4, 8),
        ("1.5B, float32", small, 16, 4, 1),
        ("1.5B, bfloat16 and 8-bit states", small, 6, 2, 1),
    ):
        cells = [f"{state_bytes(model, stage, trained, frozen) / devices / 1e9:.1f}" for stage in SAMPLES]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def adapter_table() -> list[str]:
    lines = ["| | LoRA | QLoRA |", "|---|---:|---:|"]
    for label, text in (("7B", None), ("1.5B", QWEN2_5_1_5B)):
        cells = [f"{adapter_bytes(text, bits) / 1e9:.1f}" for bits in (16, 4)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(
        "\n".join(
            [
                "TFLOP for a sample / hours of one A100:",
                *cost_table(),
                "",
                "GB:",
                *memory_table(),
                "",
                *adapter_table(),
            ]
        )
    )
