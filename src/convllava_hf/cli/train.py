"""`convllava train`: training from a recipe, on one device."""

import argparse
from importlib.util import find_spec

from ..errors import ConvLlavaError


_NEEDED = ("datasets", "matplotlib", "peft", "trl", "yaml")


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
        raise ConvLlavaError("Nothing says what to train: convllava train --config RECIPE, or --help for all keys.")
    import transformers
    from packaging.version import Version

    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking or Version(transformers.__version__) < Version("5.18"):
        raise ConvLlavaError(
            f"Training needs transformers 5.18 or newer (this is {transformers.__version__}) and "
            f"{', '.join(lacking) or 'what goes with it'}: pip install 'convllava-hf[train]'"
        )
    from ..train import main

    main(args.arguments)
    return 0
