"""`convllava train`: training from a recipe, on one device or, with `--accelerate_config`, on several."""

import argparse

from ..errors import ConvLlavaError
from .common import require_training


def register(subparsers) -> None:
    # The keys are those of dataclasses that take seconds to import, so all arguments are passed on unparsed, `--help`
    # too: argparse takes no argument for an option if none begins with the prefix.
    parser = subparsers.add_parser(
        "train",
        help="train from a recipe, on one device or several",
        usage="convllava train --config RECIPE [--accelerate_config NAME] [--key value ...]",
        add_help=False,
        prefix_chars="\0",
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.arguments:
        raise ConvLlavaError("No recipe was given: convllava train --config RECIPE, or --help for all keys.")
    require_training()
    if any(argument.partition("=")[0] == "--accelerate_config" for argument in args.arguments):
        from ..training.launch import launch

        return launch(args.arguments)
    from ..train import main

    main(args.arguments)
    return 0
