"""Which checkpoint a run goes on from, and whether it may be read."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConvLlavaError
from .checkpoints import checkpoint_error, get_last_complete_checkpoint


if TYPE_CHECKING:
    from .arguments import TrainingArguments

logger = logging.getLogger(__name__)


def checkpoint_to_resume(training: "TrainingArguments") -> str | None:
    """The checkpoint to resume from, `None` for a fresh run.

    `resume_from_checkpoint` is a checkpoint's folder, or `true` for the last complete one in `output_dir`.

    Raises:
        ConvLlavaError: a fresh run would mix its checkpoints with those of another, or the named one is incomplete or
            holds states that can run code.
    """
    checkpoint = _wanted_checkpoint(training)
    if checkpoint is not None and not training.trust_remote_code:
        check_pickles(checkpoint, Path(training.output_dir))
    return None if checkpoint is None else str(checkpoint)


def _wanted_checkpoint(training: "TrainingArguments") -> Path | None:
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
        return Path(wanted)
    found = get_last_complete_checkpoint(training.output_dir)
    logger.warning(
        "Resuming from %s." if found else "There is no checkpoint in %s yet; starting from the beginning.",
        found or training.output_dir,
    )
    return found


def check_pickles(checkpoint: Path, output: Path) -> None:
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
