"""Trains a ConvLLaVA from a recipe: `accelerate launch -m convllava_hf.train --config recipes/...yaml`."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from transformers import AutoProcessor, TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from . import AutoModelForVision2Seq
from .data import load_training_data
from .errors import ConvLlavaError
from .picture_options import with_picture_options
from .training.arguments import LORA_TARGETS, DataArguments, TrainingArguments, check_arguments, make_parser
from .training.checkpoints import fault_of_checkpoint, last_whole_checkpoint
from .training.curve import save_loss_curve
from .training.record import save_training_record
from .training.trainable import format_table, set_trainable, trainable_table
from .training.trainer import ConvLlavaTrainer


logger = logging.getLogger(__name__)


def main(
    arguments: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] | None = None
) -> ConvLlavaTrainer:
    """Parses a recipe and the options over it, and trains.

    Args:
        arguments: the command line's, if not given.
        callbacks: of the trainer, for whoever calls this from Python.

    Raises:
        ConvLlavaError: the recipe asks for what cannot work.
    """
    try:
        parsed = make_parser(prog="convllava train").parse_args_and_config(arguments)
    except FileNotFoundError as error:
        raise ConvLlavaError(f"There is no recipe at {error.filename!r}: check --config.") from error
    except ConvLlavaError:
        raise
    except IndexError as error:
        raise ConvLlavaError("--config needs the path of a recipe.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConvLlavaError(f"The recipe cannot be used: {error}") from error
    return train(*parsed, callbacks=callbacks)


def train(
    data: DataArguments,
    training: TrainingArguments,
    model_config: ModelConfig,
    callbacks: Sequence[TrainerCallback] | None = None,
) -> ConvLlavaTrainer:
    """Loads, chooses what trains, trains, and saves a checkpoint that the next stage loads."""
    check_arguments(data, training, model_config)
    resume = _checkpoint_to_resume(training)
    processor = AutoProcessor.from_pretrained(
        model_config.model_name_or_path, revision=model_config.model_revision, trust_remote_code=True
    )
    processor = with_picture_options(processor, data.pictures)
    dataset = load_training_data(
        data.dataset_name,
        split=data.dataset_train_split,
        name=data.dataset_config,
        image_folder=data.image_folder,
        streaming=data.dataset_streaming,
        datasets=data.datasets,
        seed=training.seed,
    )
    model = _load_model(model_config)
    if not model_config.use_peft:
        set_trainable(model, training.trainable)
    elif model_config.lora_target_modules is None:
        model_config.lora_target_modules = LORA_TARGETS
    trainer = ConvLlavaTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        eval_dataset=_evaluation_data(data, training),
        processing_class=processor,
        callbacks=list(callbacks or ()) or None,
        peft_config=get_peft_config(model_config),
        on_bad_picture=data.on_bad_picture,
        max_bad_pictures=data.max_bad_pictures,
    )
    if training.merge_adapter and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConvLlavaError(
            "merge_adapter does not work with sharded parameters (FSDP, DeepSpeed): leave it out, and merge the saved "
            "adapter afterwards with peft's merge_and_unload."
        )
    if trainer.is_world_process_zero():
        logger.warning("What trains:\n%s", format_table(trainable_table(trainer.model)))
    trainer.train(resume_from_checkpoint=resume)
    _save(trainer, data, training, model_config)
    return trainer


def _evaluation_data(data: DataArguments, training: TrainingArguments):
    """What the loss is also measured on, where the recipe says so by `eval_strategy`."""
    if training.eval_strategy == "no":
        return None
    return load_training_data(
        data.eval_dataset_name or data.dataset_name,
        split=data.dataset_test_split,
        name=data.dataset_config,
        image_folder=data.image_folder,
        seed=training.seed,
    )


def _load_model(model_config: ModelConfig):
    dtype = model_config.dtype if model_config.dtype in (None, "auto") else getattr(torch, model_config.dtype)
    return AutoModelForVision2Seq.from_pretrained(
        model_config.model_name_or_path,
        revision=model_config.model_revision,
        attn_implementation=model_config.attn_implementation,
        dtype=dtype or torch.float32,
        quantization_config=get_quantization_config(model_config),
    )


def _checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """The checkpoint that the run goes on from, `None` for a fresh run.

    `resume_from_checkpoint` is a checkpoint's folder, or `true` for the last whole one in `output_dir`.

    Raises:
        ConvLlavaError: a fresh run would mix its checkpoints with those of another, or the named one is not whole.
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
        if (fault := fault_of_checkpoint(Path(wanted))) is not None:
            raise ConvLlavaError(
                f"{wanted} cannot be resumed from: {fault}. --resume_from_checkpoint true takes the last whole one."
            )
        return str(wanted)
    found = last_whole_checkpoint(training.output_dir)
    logger.warning(
        "Resuming from %s." if found else "There is no checkpoint in %s yet; starting anew.",
        found or training.output_dir,
    )
    return str(found) if found else None


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
        sys.exit(f"convllava: error: {error}")
