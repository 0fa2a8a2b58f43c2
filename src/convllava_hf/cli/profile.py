"""`convllava profile`: how fast a model is on this machine."""

import argparse
import re

from ..options import LONGEST_SIDE, VISION_BACKENDS, LoadingOptions, add_options, options_from, shortened, whole_number
from ..utils.logging_utils import quiet_unless_tty
from .common import MODEL_HELP


# Of the options of loading; several ways to run the tower are compared.
_LOADING = ("device", "dtype", "quantization", "trust_remote_code")


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "profile",
        help="measure how fast a model is on this machine",
        description="Measure a model on this machine: its vision tower against the machine's rate of matrix products, "
        "the time to the first token and tokens a second, and preprocessing. Prints tables in Markdown.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{MODEL_HELP} (default: random weights of the paper's shape)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        metavar="HEIGHTxWIDTH",
        default=[(768, 768), (1536, 1088), (1536, 1536)],
        help="pixels that the tower sees, multiples of its stride (default: 768x768 1536x1088 1536x1536)",
    )
    parser.add_argument(
        "--vision-backend",
        nargs="+",
        choices=VISION_BACKENDS,
        help="ways to run the tower that are compared (default: fused on a CPU with bfloat16, else eager)",
    )
    parser.add_argument(
        "--text",
        choices=("0.5b", "1.5b", "7b", "tiny"),
        default="0.5b",
        help="size of the language model of random weights; tiny makes the tower small, too (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1, 1024),
        default=1,
        metavar="N",
        help="images in a call of the tower (default: 1)",
    )
    parser.add_argument(
        "--new-tokens",
        type=whole_number(1, 100_000),
        default=16,
        metavar="N",
        help="tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=whole_number(1, 10_000),
        default=3,
        metavar="N",
        help="runs over which medians are taken (default: %(default)s)",
    )
    add_options(parser, LoadingOptions, _LOADING)
    parser.add_argument("--output", metavar="FILE", help="also write all figures as JSON")
    parser.set_defaults(run=run)


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= LONGEST_SIDE for side in sides):
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} is not a size such as 1536x1088 (height x width) with sides up to {LONGEST_SIDE}"
        )
    return sides


def run(args: argparse.Namespace) -> int:
    from ..errors import ConvLlavaError
    from ..profiling.profiler import as_markdown, profile_model
    from ..profiling.tables import check_output_file, write_json

    quiet_unless_tty()
    if args.quantization and not args.model:
        raise ConvLlavaError("--quantization is of a checkpoint's language model: name a checkpoint.")
    if args.output:
        check_output_file(args.output)
    try:
        results = profile_model(
            args.model,
            sizes=args.sizes,
            vision_backends=args.vision_backend,
            text=args.text,
            new_tokens=args.new_tokens,
            repeats=args.repeats,
            batch=args.batch,
            **options_from(args, LoadingOptions, _LOADING),
        )
    except ValueError as error:  # a size that the tower cannot take
        raise ConvLlavaError(str(error)) from error
    print(as_markdown(results))
    if args.output:
        write_json(args.output, results)
    return 0
