"""Trains a ConvLLaVA from a recipe; `convllava train` runs this, in one process or in several."""

import logging
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from .data import load_training_data
from .errors import ConvLlavaError, first_line
from .inference.loading import check_checkpoint, load_processor
from .inference.trust import from_checkpoint, pickled_code
from .modeling.modeling_convllava import ConvLlavaForConditionalGeneration
from .training.arguments import LORA_TARGETS, DataArguments, TrainingArguments, check_arguments, make_parser
from .training.disk import checkpoint_bytes, reporting_full_disk
from .training.plotting import save_loss_curve
from .training.recipe_checks import check_model, check_resolution
from .training.recording import save_training_record
from .training.resuming import checkpoint_to_resume
from .training.template_check import check_chat_template
from .training.trainable import format_table, set_trainable, trainable_table
from .training.trainer import ConvLlavaTrainer
from .utils.device_memory import explain_out_of_memory
from .utils.links import check_links


logger = logging.getLogger(__name__)

# Remedies where a device's memory does not suffice.
_SMALLER_MODEL = (
    "set dtype: bfloat16, train an adapter on a model in 4 bits (use_peft, load_in_4bit), or shard the model over "
    "several GPUs (--accelerate_config fsdp2)."
)
_SMALLER_STEP = (
    "Set a smaller per_device_train_batch_size, with more gradient_accumulation_steps for the same batch; let images "
    "be smaller (preset, max_pixels); leave gradient_checkpointing on. If weights, gradients and optimizer states are "
    f"too large: {_SMALLER_MODEL}"
)


def main(
    arguments: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] | None = None
) -> ConvLlavaTrainer:
    """Parses a recipe and the options over it, and trains.

    Args:
        arguments: the command line's, if not given.
        callbacks: of the trainer, for use from Python.

    Raises:
        ConvLlavaError: the recipe asks for what cannot work.
    """
    data, training, model_config = make_parser(prog="convllava train").parse_args_and_config(arguments)
    with reporting_full_disk(training.output_dir):  # the data sets' caches and logs are written as well
        return train(data, training, model_config, callbacks=callbacks)


def train(
    data: DataArguments,
    training: TrainingArguments,
    model_config: ModelConfig,
    callbacks: Sequence[TrainerCallback] | None = None,
) -> ConvLlavaTrainer:
    """Loads, chooses what trains, trains, and saves a checkpoint that the next stage loads."""
    check_arguments(data, training, model_config)
    resume, processor = _prepare(data, training, model_config)
    dataset = load_training_data(
        data.dataset_name,
        split=data.dataset_train_split,
        name=data.dataset_config,
        image_folder=data.image_folder,
        streaming=data.dataset_streaming,
        datasets=data.datasets,
        boxes=data.boxes,
        seed=training.seed,
        bad_samples=data.bad_samples,
    )
    with explain_out_of_memory(_model_name(model_config), training.device, f"Remedies: {_SMALLER_MODEL}"):
        model = _load_model(model_config, training.trust_remote_code)
    if not model_config.use_peft:
        set_trainable(model, training.trainable)
    trainer = _make_trainer(model, processor, dataset, data, training, model_config, callbacks)
    if trainer.is_world_process_zero():
        logger.warning("What trains:\n%s", format_table(trainable_table(trainer.model)))
    _run(trainer, training, resume)
    _save(trainer, data, training, model_config)
    return trainer


def _prepare(data: DataArguments, training: TrainingArguments, model_config: ModelConfig) -> tuple[str | None, Any]:
    """Checks everything that needs no weights; the checkpoint to resume from, and the processor."""
    name = model_config.model_name_or_path
    if name and Path(name).is_dir():
        check_links(name)  # its tokenizer, template and record are saved again
    resume = checkpoint_to_resume(training)
    source = {"revision": model_config.model_revision, "trust_remote_code": training.trust_remote_code}
    check_checkpoint(name, **source)
    if model_config.use_peft and model_config.lora_target_modules is None:
        model_config.lora_target_modules = LORA_TARGETS
    check_model(training, model_config)
    processor = load_processor(name, **source, image_options=data.image_options)
    check_resolution(data.resolution, processor, name)
    check_chat_template(processor, training.assistant_only_loss)
    return resume, processor


def _make_trainer(
    model,
    processor,
    dataset,
    data: DataArguments,
    training: TrainingArguments,
    model_config: ModelConfig,
    callbacks: Sequence[TrainerCallback] | None,
) -> ConvLlavaTrainer:
    evaluation = _evaluation_data(data, training)
    try:
        with explain_out_of_memory(_model_name(model_config), training.device, f"Remedies: {_SMALLER_MODEL}"):
            trainer = ConvLlavaTrainer(
                model=model,
                args=training,
                train_dataset=dataset,
                eval_dataset=evaluation,
                processing_class=processor,
                callbacks=list(callbacks or ()) or None,
                peft_config=get_peft_config(model_config),
                on_bad_image=data.on_bad_image,
                max_bad_images=data.max_bad_images,
                on_bad_sample=data.on_bad_sample,
                max_bad_samples=data.max_bad_samples,
            )
    except (ImportError, OSError, ValueError) as error:  # of settings that only TRL and transformers know
        if isinstance(error, ConvLlavaError):
            raise
        raise ConvLlavaError(f"The trainer cannot be set up as the recipe says: {first_line(error)}") from error
    if training.merge_adapter and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConvLlavaError(
            "merge_adapter does not work with sharded parameters (FSDP, DeepSpeed): leave it out, and merge the saved "
            "adapter afterwards with peft's merge_and_unload."
        )
    return trainer


def _run(trainer: ConvLlavaTrainer, training: TrainingArguments, resume: str | None) -> None:
    step = f"a training step with {training.per_device_train_batch_size} samples at once"
    try:
        with explain_out_of_memory(step, training.device, _SMALLER_STEP):
            trainer.train(resume_from_checkpoint=resume)
    except pickle.UnpicklingError as error:
        if resume is None:
            raise
        raise ConvLlavaError(pickled_code(resume)) from error


def _model_name(model_config: ModelConfig) -> str:
    return f"the model {model_config.model_name_or_path!r}"


def _evaluation_data(data: DataArguments, training: TrainingArguments):
    """The evaluation data, if the recipe sets `eval_strategy`."""
    if training.eval_strategy == "no":
        return None
    return load_training_data(
        data.eval_dataset_name or data.dataset_name,
        split=data.dataset_test_split,
        name=data.dataset_config,
        image_folder=data.image_folder,
        boxes=data.boxes,
        seed=training.seed,
        bad_samples=data.new_bad_samples(),
    )


def _load_model(model_config: ModelConfig, trust_remote_code: bool):
    dtype = model_config.dtype if model_config.dtype in (None, "auto") else getattr(torch, model_config.dtype)
    try:
        return from_checkpoint(
            ConvLlavaForConditionalGeneration,
            AutoModelForImageTextToText,
            model_config.model_name_or_path,
            trust_remote_code=trust_remote_code,
            revision=model_config.model_revision,
            attn_implementation=model_config.attn_implementation,
            dtype=dtype or torch.float32,
            quantization_config=get_quantization_config(model_config),
        )
    except pickle.UnpicklingError as error:
        raise ConvLlavaError(pickled_code(model_config.model_name_or_path)) from error
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConvLlavaError(
            f"Cannot load the checkpoint {model_config.model_name_or_path!r}: {first_line(error)}"
        ) from error


def _save(
    trainer: ConvLlavaTrainer, data: DataArguments, training: TrainingArguments, model_config: ModelConfig
) -> None:
    trainer.save_model(training.output_dir)
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_loss_curve(
            trainer.state.log_history, Path(training.output_dir) / "loss.png", title=Path(training.output_dir).name
        )
        folders = [Path(training.output_dir)]
        if training.merge_adapter:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            folder = Path(training.output_dir) / "merged"
            with reporting_full_disk(folder, lambda: checkpoint_bytes(merged, adapter=False, states=False)):
                merged.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
            folders.append(folder)
        for folder in folders:
            processes = trainer.accelerator.num_processes
            save_training_record(folder, data, training, model_config, trainer.state, processes)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    try:
        main().end()  # closes trackers and the process group
    except ConvLlavaError as error:
        sys.stderr.write(f"convllava: error: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)
