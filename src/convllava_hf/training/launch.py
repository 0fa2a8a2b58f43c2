"""Starts one process per device for `convllava train --accelerate_config`, as `trl sft` does."""

import subprocess
from argparse import Namespace
from collections.abc import Sequence
from importlib.resources import files
from typing import NoReturn

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..errors import ConvLlavaError, first_line
from .arguments import make_parser
from .recipe import split_option


OPTION = "--accelerate_config"
_MODULE = "convllava_hf.train"
# What accelerate raises on settings that do not go together, or for which a package is missing.
_REFUSALS = (ValueError, TypeError, ImportError, AssertionError, OSError, yaml.YAMLError)


def launch(arguments: Sequence[str]) -> int:
    """Trains in the processes that an accelerate config describes, and returns the exit code of the first to fail.

    Args:
        arguments: those of `convllava train`, with `--accelerate_config` and options of `accelerate launch`.

    Raises:
        ConvLlavaError: there is no such config, an option is unknown, or the processes cannot be started.
    """
    launched = launch_arguments(arguments)
    try:
        launch_command(launched)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except SignalException as error:
        return 128 + error.sigval
    except _REFUSALS as error:
        raise ConvLlavaError(f"accelerate cannot start the processes: {first_line(error)}") from error
    return 0


def launch_arguments(arguments: Sequence[str]) -> Namespace:
    """The arguments of `accelerate launch`; every option that `convllava train` knows goes to the processes.

    Raises:
        ConvLlavaError: there is no such config, or an option is unknown to both.
    """
    config, rest = split_option(OPTION, list(arguments))
    parser = make_parser()
    for_accelerate = parser.unknown_options(rest)
    launcher = launch_command_parser()
    launcher.error = _refuse
    known = {option: action.dest for action in launcher._actions for option in action.option_strings}
    for word in for_accelerate:
        name = word.partition("=")[0]
        if name.startswith("-") and name not in known:
            raise ConvLlavaError(parser.unknown_key(name.lstrip("-"), "The options have", known.values()))
    launched = launcher.parse_args(
        [*_config_file(config), *for_accelerate, "-m", _MODULE, *_without(rest, for_accelerate)]
    )
    if launched.training_script != _MODULE:
        raise ConvLlavaError(f"{launched.training_script!r} is not an option: options begin with --.")
    return launched


def _config_file(name: str | None) -> list[str]:
    try:
        return resolve_accelerate_config_argument([OPTION, name or ""])
    except ValueError as error:
        known = sorted(one.name.removesuffix(".yaml") for one in files("trl.accelerate_configs").iterdir())
        raise ConvLlavaError(
            f"{OPTION} is {name!r}; expected a file that `accelerate config` wrote, or one of "
            f"{', '.join(one for one in known if not one.startswith('__'))}."
        ) from error


def _without(words: Sequence[str], removed: Sequence[str]) -> list[str]:
    """The words but for `removed`, which are among them in the same order."""
    left, kept = list(removed), []
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            kept.append(word)
    return kept


def _refuse(message: str) -> NoReturn:
    raise ConvLlavaError(f"The options for accelerate cannot be used: {message}")
