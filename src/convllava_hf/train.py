"""Trains a ConvLLaVA from a recipe: `accelerate launch -m convllava_hf.train --config recipes/...yaml`."""

import logging
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

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
from .training.checkpoints import checkpoint_error, get_last_complete_checkpoint
from .training.disk import checkpoint_bytes, reporting_full_disk
from .training.plotting import save_loss_curve
from .training.recipe_checks import check_model
from .training.recording import save_training_record
from .training.template_check import check_chat_template
from .training.trainable import format_table, set_trainable, trainable_table
from .training.trainer import ConvLlavaTrainer
from .utils.device_memory import explain_out_of_memory
from .utils.links import check_links


logger = logging.getLogger(__name__)

# Remedies where a device's memory does not suffice.
_SMALLER_MODEL = (
    "set dtype: bfloat16, train an adapter on a model in 4 bits (use_peft, load_in_4bit), or shard the model over "
    "several GPUs (recipes/accelerate/fsdp2.yaml)."
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
    if model_config.model_name_or_path and Path(model_config.model_name_or_path).is_dir():
        check_links(model_config.model_name_or_path)  # its tokenizer, template and record are saved again
    resume = _checkpoint_to_resume(training)
    if resume is not None and not training.trust_remote_code:
        _check_pickles(Path(resume), Path(training.output_dir))
    source = {"revision": model_config.model_revision, "trust_remote_code": training.trust_remote_code}
    check_checkpoint(model_config.model_name_or_path, **source)
    if model_config.use_peft and model_config.lora_target_modules is None:
        model_config.lora_target_modules = LORA_TARGETS
    check_model(training, model_config)
    processor = load_processor(model_config.model_name_or_path, **source, image_options=data.image_options)
    check_chat_template(processor, training.assistant_only_loss)
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
    name = f"the model {model_config.model_name_or_path!r}"
    with explain_out_of_memory(name, training.device, f"Remedies: {_SMALLER_MODEL}"):
        model = _load_model(model_config, training.trust_remote_code)
    if not model_config.use_peft:
        set_trainable(model, training.trainable)
    evaluation = _evaluation_data(data, training)
    try:
        with explain_out_of_memory(name, training.device, f"Remedies: {_SMALLER_MODEL}"):
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
    if trainer.is_world_process_zero():
        logger.warning("What trains:\n%s", format_table(trainable_table(trainer.model)))
    step = f"a training step with {training.per_device_train_batch_size} samples at once"
    try:
        with explain_out_of_memory(step, training.device, _SMALLER_STEP):
            trainer.train(resume_from_checkpoint=resume)
    except pickle.UnpicklingError as error:
        if resume is None:
            raise
        raise ConvLlavaError(pickled_code(resume)) from error
    _save(trainer, data, training, model_config)
    return trainer


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


def _checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """The checkpoint to resume from, `None` for a fresh run.

    `resume_from_checkpoint` is a checkpoint's folder, or `true` for the last complete one in `output_dir`.

    Raises:
        ConvLlavaError: a fresh run would mix its checkpoints with those of another, or the named one is incomplete.
    """
    wanted = training.resume_from_checkpoint
    if str(wanted).lower() in ("none", "false"):
        if any(Path(training.output_dir).glob("checkpoint-*")):
            raise ConvLlavaError(
                f"{training.output_dir} holds checkpoints of an earlier run. Pass --resume_from_checkpoint true to go "
                "on with it, or choose another --output_dir."
            )
        return None
    if str(wanted).lower() != "true":
        if (fault := checkpoint_error(Path(wanted))) is not None:
            raise ConvLlavaError(
                f"{wanted} cannot be resumed from: {fault}. --resume_from_checkpoint true takes the last complete one."
            )
        return str(wanted)
    found = get_last_complete_checkpoint(training.output_dir)
    logger.warning(
        "Resuming from %s." if found else "There is no checkpoint in %s yet; starting from the beginning.",
        found or training.output_dir,
    )
    return str(found) if found else None


def _check_pickles(checkpoint: Path, output: Path) -> None:
    """Refuses states that are read as pickles, which can run code, unless they are in this run's own folder.

    What the trainer itself writes is read only as tensors and numbers, or not at all.

    Raises:
        ConvLlavaError: names what holds such states.
    """
    pickled = [
        *checkpoint.rglob("*_0/.metadata"),
        *(path for path in checkpoint.glob("global_step*") if path.is_dir()),
    ]
    if pickled and output.resolve() not in checkpoint.resolve().parents:
        raise ConvLlavaError(
            f"{checkpoint} holds {pickled[0].relative_to(checkpoint)}, states of FSDP or DeepSpeed that can run code "
            "when they are read, and lies outside output_dir. Go on in the folder that it was saved in, or, if you "
            "trust whoever made it, give --trust_remote_code true."
        )


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
