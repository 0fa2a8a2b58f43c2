"""`convllava convert`: an original checkpoint into transformers' layout."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler

from ..options import DTYPES


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint of the original code",
        description="Convert a checkpoint of the original ConvLLaVA code into one that transformers loads. Says which "
        "vision tower it takes, and whether it equals the other one where the checkpoint's shards hold a tower, too.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of the original checkpoint, or its id on the Hub")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--vision-tower",
        metavar="PATH_OR_ID",
        help="the tower's folder or Hub id, or the word shards for the one in SOURCE's shards (default: the one that "
        "the original runs, in SOURCE/vision_tower or where SOURCE's config says; the shards' if that has no weights)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: as in SOURCE)")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..convert import convert_checkpoint

    with messages_shown():
        path = convert_checkpoint(
            args.source,
            args.output,
            vision_tower=args.vision_tower,
            dtype=args.dtype,
            overwrite=args.overwrite,
            max_shard_size=args.max_shard_size,
            progress=sys.stderr.isatty(),
        )
    print(f"Wrote {path}. Ask it: convllava ask {path} IMAGE QUESTION")
    return 0


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Shows on stderr what the conversion logs, such as the tower that it takes: all of it if the block succeeds, and
    if it fails only the warnings, so that the error is not lost among what went well."""
    log = logging.getLogger("convllava_hf.convert")
    level, propagate = log.level, log.propagate
    handler = MemoryHandler(1000, flushLevel=logging.WARNING, target=logging.StreamHandler(), flushOnClose=False)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # or a handler of the root logger would say it twice
    try:
        yield
        handler.flush()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
