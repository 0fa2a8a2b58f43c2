"""`convllava quickstart`: a miniature ConvLLaVA, made, trained and judged on the spot."""

import argparse
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from ..errors import ConvLlavaError
from .common import require_training


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="make, train and judge a miniature ConvLLaVA, in minutes on any machine",
        description="Draw a world of coloured shapes and signs; train a small tower and a small language model in it, "
        "join them, and train them in the paper's three stages; then ask the model about scenes that it has not seen. "
        "Nothing is downloaded. A run that was interrupted goes on.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("quickstart"),
        metavar="DIR",
        help="folder for the model, the report and all between (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights, scenes and questions (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_training()
    if find_spec("sklearn") is None:
        raise ConvLlavaError("The quickstart needs scikit-learn: pip install 'convllava-hf[quickstart]'")
    from ..miniature.quickstart import open_run, quickstart
    from ..miniature.report import format_table, write_report

    training = open_run(args.output, seed=args.seed)
    print(f"A ConvLLaVA in miniature, from nothing, into {args.output}. Ctrl-C stops it; the same command goes on.")
    results = quickstart(training)
    commands = _next_commands(args.output, results)
    write_report(results, args.output, commands)
    print(f"\n{format_table(results)}\n")
    print(f"All of it on one page: {args.output / 'report.html'}\nNext:")
    for command in commands:
        print(f"   {command}")
    return 0


def _next_commands(folder: Path, results: dict) -> list[str]:
    """What can be typed now, with the program as it was called."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "convllava" else "convllava"
    sample = results["samples"][0]
    words = [program, "ask", folder / "model", folder / sample["picture"], sample["question"]]
    return [shlex.join(map(str, words))]
