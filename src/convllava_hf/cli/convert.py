"""`convllava convert`: an original checkpoint into transformers' layout."""

import argparse
import sys

from .common import DTYPES


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of the original code",
        description="Convert a checkpoint of the original ConvLLaVA code into one that transformers loads.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the original checkpoint, or its id on the Hub")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--vision-tower",
        metavar="PATH_OR_ID",
        help="the tower's folder or Hub id (default: SOURCE/vision_tower, else what SOURCE's config names)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: as in SOURCE)")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..convert import convert_checkpoint

    path = convert_checkpoint(
        args.source,
        args.output,
        vision_tower=args.vision_tower,
        dtype=args.dtype,
        overwrite=args.overwrite,
        max_shard_size=args.max_shard_size,
        progress=sys.stderr.isatty(),
    )
    print(f"Wrote {path}. Ask it: convllava ask {path} PICTURE QUESTION")
    return 0
