"""`convllava train`: training from a recipe, on one device."""

import argparse

from ..errors import ConvLlavaError
from .common import require_training


def register(subparsers) -> None:
    # The keys are those of dataclasses that take seconds to import, so whatever is said here is handed on as it is,
    # `--help` too. A prefix that no argument begins with makes argparse leave the options alone.
    parser = subparsers.add_parser(
        "train",
        help="train from a recipe, on one device",
        usage="convllava train --config RECIPE [--key value ...]",
        add_help=False,
        prefix_chars="\0",
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.arguments:
        raise ConvLlavaError("No recipe was given: convllava train --config RECIPE, or --help for all keys.")
    require_training()
    from ..train import main

    main(args.arguments)
    return 0
