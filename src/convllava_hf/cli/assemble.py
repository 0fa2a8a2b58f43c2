"""`convllava assemble`: a new, untrained ConvLLaVA from a tower and a language model."""

import argparse
import sys

from ..options import DTYPES, IMAGE_RANGES, whole_number
from .common import seed


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "assemble",
        help="make a new untrained model from a ConvNeXt and a language model",
        description="Make a new ConvLLaVA from a ConvNeXt tower and a causal language model. The extra stage and the "
        "projector are fresh: the model needs training before it can see.",
    )
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--vision",
        required=True,
        metavar="PATH_OR_ID",
        help="a timm model name or Hub id, a timm checkpoint file, or the folder of a transformers ConvNeXt",
    )
    parser.add_argument(
        "--text", required=True, metavar="PATH_OR_ID", help="a causal language model: a folder or a Hub id"
    )
    parser.add_argument(
        "--resolution",
        type=whole_number(*IMAGE_RANGES["size"]),
        default=1536,
        metavar="PIXELS",
        help="side of the square that images are resized to (default: %(default)s)",
    )
    parser.add_argument(
        "--extra-stage-depth",
        type=whole_number(0, 1000),
        default=6,
        metavar="N",
        help="blocks of the stage added to the tower, 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--extra-stage-width",
        type=whole_number(1, 65536),
        default=3072,
        metavar="CHANNELS",
        help="channels of the stage added to the tower (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: the language model's)")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the fresh weights (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja file to use instead of the language model's own chat template, such as one of TRL's training "
        "variants (default: the language model's, with the assistant's turns marked for training)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..convert import assemble

    path = assemble(
        args.output,
        vision=args.vision,
        text=args.text,
        resolution=args.resolution,
        extra_stage_depth=args.extra_stage_depth,
        extra_stage_width=args.extra_stage_width,
        dtype=args.dtype,
        seed=args.seed,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
        chat_template=args.chat_template,
    )
    print(f"Wrote {path}. It is untrained: its answers mean nothing yet.")
    return 0
