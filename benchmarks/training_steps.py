"""Training steps to measure: the recipes' settings, the project's trainer and data loader, made-up data and weights.

What `train_step.py` and the jobs in `gpu_jobs` share. Images are JPEGs of 1024 x 768 pixels.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
STAGES = {
    "1": "stage1_projector",
    "2": "stage2_pretrain",
    "3": "stage3_instruct",
    "lora": "lora",
}
SMALL = {  # a language model for a CPU, with a tower of its own
    "vision": {"depths": [2, 2, 6, 2, 3], "hidden_sizes": [32, 64, 128, 256, 512]},
    "text": {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    | {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 8192},
}
WARM_UP = 2  # steps that are not counted
IMAGES = 8  # files; samples share them
SAMPLES = 512


def make_data(folder: Path, words: Sequence[int]) -> None:
    """Images with structure, so that JPEG has something to do, and conversations about them.

    Args:
        words: of the answers, one number after the other.
    """
    import numpy as np
    from PIL import Image

    from convllava_hf.convert import convert_checkpoint

    convert_checkpoint(GOLDEN / "checkpoint-init", folder / "golden", progress=False)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((1024, 768))
        noise = rng.integers(-12, 12, (768, 1024, 3))
        image = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=90)
    samples = []
    for number in range(SAMPLES):
        turns = [
            {"from": "human", "value": "<image>\nWhat is in the image?"},
            {"from": "gpt", "value": " ".join(["the red sign"] * (words[number % len(words)] // 3))},
        ]
        samples.append({"id": str(number), "image": f"{number % IMAGES}.jpg", "conversations": turns})
    (folder / "samples.json").write_text(json.dumps(samples))


def recipe_of(settings: dict[str, Any]) -> Path:
    """The recipe whose settings a run takes: the 1.5B model's for the smaller Qwen too, else the 7B model's."""
    small = settings["model"] in ("0.5b", "1.5b")
    folder = "convllava-1.5b" if small else "convllava-7b"
    return ROOT / "recipes" / folder / f"{STAGES[settings['stage']]}.yaml"


def make_trainer(settings: dict[str, Any], callbacks: Sequence[Any]):
    """The trainer of a run, made as `convllava train` makes it.

    Args:
        settings: `folder` with what `make_data` made, `model`, `side`, `stage`, `batch`, `steps` that are counted,
            `workers`, `checkpointing` (`None` as the recipe has it), `recipe` (default: by model and stage) and
            `options`, more keys of a recipe.
    """
    import torch
    from trl import get_peft_config

    from convllava_hf.data import load_training_data
    from convllava_hf.training.arguments import make_parser
    from convllava_hf.training.trainable import set_trainable
    from convllava_hf.training.trainer import ConvLlavaTrainer

    folder = Path(settings["folder"])
    data, training, model_config = make_parser().parse_args_and_config(_command(settings, torch.cuda.is_available()))
    dtype = torch.float32 if model_config.dtype in (None, "auto") else getattr(torch, model_config.dtype)
    model, processor = _make_model(settings, folder, training.device, dtype)
    if not model_config.use_peft:
        set_trainable(model, training.trainable)
    return ConvLlavaTrainer(
        model=model,
        args=training,
        train_dataset=load_training_data(data.dataset_name, image_folder=folder),
        processing_class=processor,
        callbacks=list(callbacks),
        peft_config=get_peft_config(model_config),
        on_bad_image=data.on_bad_image,
        on_bad_sample=data.on_bad_sample,
    )


def _command(settings: dict[str, Any], cuda: bool) -> list[str]:
    """A recipe, with what a benchmark has otherwise."""
    values = {
        "dataset_name": Path(settings["folder"]) / "samples.json",
        "output_dir": Path(settings["folder"]) / "out",
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": settings["steps"] + WARM_UP,
        "dataloader_num_workers": settings["workers"],
        "bf16": cuda,
        "use_cpu": not cuda,
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # which would hide that a loss is not finite
        "disable_tqdm": True,
        **settings.get("options", {}),
    }
    if settings.get("checkpointing") is not None:
        values["gradient_checkpointing"] = settings["checkpointing"]
    options = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    return ["--config", str(settings.get("recipe") or recipe_of(settings)), *options]


def _make_model(settings: dict[str, Any], folder: Path, device, dtype):
    """A model of random weights on its device, with the golden checkpoint's tokenizer in the larger vocabulary."""
    from transformers import AutoConfig, ConvNextConfig

    from convllava_hf import ConvLlavaConfig, ConvLlavaForConditionalGeneration, ConvLlavaProcessor
    from convllava_hf.profiling.models import built, text_config, tower_config

    processor = ConvLlavaProcessor.from_pretrained(folder / "golden")
    processor.image_processor.size = {"height": settings["side"], "width": settings["side"]}
    if settings["model"] == "small":
        vision, text = ConvNextConfig(num_stages=5, **SMALL["vision"]), AutoConfig.for_model(**SMALL["text"])
    else:
        vision, text = tower_config(settings["model"] == "tiny"), text_config(settings["model"])
    vision.image_size = settings["side"]
    config = ConvLlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id)
    return built(lambda: ConvLlavaForConditionalGeneration(config), device, dtype), processor


def make_clock():
    """A callback that notes how long steps take, and what the counted ones were trained on."""
    import torch
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()

    class Clock(TrainerCallback):
        """Seconds of every counted step, and seconds waited for its batch."""

        def __init__(self):
            self.steps, self.waits, self.batches, self.last, self.counts = [], [], [], None, False

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = self.now()
            self.counts = state.global_step >= WARM_UP
            if self.counts:
                self.waits.append(self.began - self.last)

        def on_step_end(self, args, state, control, **kwargs):
            self.last = self.now()
            if state.global_step > WARM_UP:
                self.steps.append(self.last - self.began)
            if state.global_step == WARM_UP:
                reset_peak(cuda)

        def see(self, module, args, inputs):
            """A forward hook of the model: what is in the batch, without waiting for the device."""
            if self.counts:
                lengths = inputs["attention_mask"].sum(-1).float()
                scored = (inputs["labels"][:, 1:] != -100).sum()
                padded = inputs["attention_mask"].numel()
                self.batches.append((len(inputs["pixel_values"]), padded, lengths.sum(), (lengths**2).sum(), scored))

        def now(self):
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

    return Clock()


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains some steps; see `make_trainer` for the settings.

    Returns:
        `samples` a second, visual `tokens` a second, `peak` memory in bytes, the share of time that `waits` for data,
        the number of `weights` and of those that the run `trains`, `flops` a second by `step_flops`, and of a sample
        its `length` in tokens, those that are `scored` and the share of a batch that is `padding`.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    import torch
    from step_flops import Samples, training_flops

    cuda = torch.cuda.is_available()
    before = 0 if cuda else resident()
    clock = make_clock()
    trainer = make_trainer(settings, [clock])
    trainer.model.register_forward_pre_hook(clock.see, with_kwargs=True)
    try:
        loss = trainer.train().training_loss
    finally:
        _forget_overrides()
    if not math.isfinite(loss):
        raise ArithmeticError(f"The loss is {loss}; expected a finite number.")
    seconds = sum(clock.steps) + sum(clock.waits)
    counted = len(clock.steps) * settings["batch"]
    images, padded, tokens, squares, scored = (float(sum(one)) for one in zip(*clock.batches, strict=True))
    visual = images * trainer.model.config.num_visual_tokens(settings["side"], settings["side"])
    samples = Samples(images, visual, tokens, squares, scored)
    parameters = [one for name, one in trainer.model.named_parameters() if ".original_module." not in name]
    return {
        "samples": counted / seconds,
        "tokens": visual / seconds,
        "flops": training_flops(trainer.model, samples, settings["side"]) / seconds,
        "peak": torch.cuda.max_memory_allocated() if cuda else peak_resident() - before,
        "waits": sum(clock.waits) / seconds,
        "step": sorted(clock.steps)[len(clock.steps) // 2],
        "steps": [round(seconds, 3) for seconds in clock.steps],
        "length": tokens / counted,
        "scored": scored / counted,
        "padding": 1 - tokens / padded,
        "loss": loss,
        "weights": sum(one.numel() for one in parameters),
        "trains": sum(one.numel() for one in parameters if one.requires_grad),
        "weights_dtype": str(next(iter(trainer.model.parameters())).dtype).removeprefix("torch."),
        "autocast": trainer.accelerator.mixed_precision,
        "optimizer": trainer.args.optim.value,
        "checkpointing": trainer.args.gradient_checkpointing,
    }


def measure_loader(settings: dict[str, Any]) -> float:
    """Samples a second that the data loader of a run brings to the device when nothing else is done.

    Args:
        settings: see `make_trainer`; the model is not run.
    """
    arrivals = []
    first = 2 * max(1, settings["workers"])  # what was prepared while processes started is not counted
    for _ in make_trainer(settings, []).get_train_dataloader():
        arrivals.append(time.perf_counter())
        if len(arrivals) > 3 * first:
            break
    return settings["batch"] * (len(arrivals) - 1 - first) / (arrivals[-1] - arrivals[first])


def _forget_overrides() -> None:
    """Lets go of the modules that bitsandbytes keeps for as long as the process lives."""
    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()


def resident() -> int:
    return _status("VmRSS")


def peak_resident() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    """Bytes of this process's memory as Linux counts it; 0 where there is no such count."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak(cuda: bool) -> None:
    """Forgets what the first steps took."""
    import torch

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
