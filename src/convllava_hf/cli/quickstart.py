"""`convllava quickstart`: makes, trains and evaluates a miniature ConvLLaVA."""

import argparse
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from ..errors import ConvLlavaError
from ..utils.atomic import check_destination
from .common import require_training, seed


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="make, train and evaluate a miniature ConvLLaVA, in minutes on any machine",
        description="Draw a world of colored shapes and signs; train a small tower and a small language model in it, "
        "join them, and train them in the paper's three stages; then ask the model about scenes that it has not seen. "
        "Nothing is downloaded. The same command resumes an interrupted run.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the model, the report and all between (default: quickstart, or findings)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="of weights, scenes and questions (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="that trains and answers (default: cuda where there is one, else cpu; --findings always takes the cpu)",
    )
    parser.add_argument(
        "--findings",
        action="store_true",
        help="try out what the paper found about towers and resolutions instead: five ways to train, with this seed "
        "and the two after it",
    )
    parser.set_defaults(run=run, registers=False)  # what comes first needs no model, and is seen at once


def run(args: argparse.Namespace) -> int:
    require_training()
    if find_spec("sklearn") is None:
        raise ConvLlavaError("The quickstart needs scikit-learn: pip install 'convllava-hf[quickstart]'")
    if args.output is not None:
        check_destination(args.output, "--output")
    if args.findings and args.device == "cuda":
        raise ConvLlavaError("--device cuda does not go with --findings, which is for a CPU: leave one of them out.")
    return _run_ablations(args.output or Path("findings"), args.seed) if args.findings else _quickstart(args)


def _quickstart(args: argparse.Namespace) -> int:
    from ..miniature.quickstart import open_run, quickstart

    if args.device == "cuda":  # refused before a folder is made
        from ..inference.loading import choose_device

        choose_device(args.device)
    output = args.output or Path("quickstart")
    training = open_run(output, seed=args.seed)
    _announce("A ConvLLaVA in miniature, from nothing", output)
    results = quickstart(training, device=args.device)

    from ..miniature.report import format_table, write_report

    commands = _next_commands(output, results)
    write_report(results, output, commands)
    print(f"\n{format_table(results)}\n")
    print(f"All of it on one page: {output / 'report.html'}\nNext:")
    for command in commands:
        print(f"   {command}")
    return 0


def _run_ablations(output: Path, seed: int) -> int:
    from ..miniature.findings import open_findings, run_ablations

    run = open_findings(output, seed=seed)
    _announce("The paper's findings in miniature", output)
    findings = run_ablations(run)

    from ..miniature.findings_report import write_findings

    page = write_findings(findings, output)
    print()
    for finding in findings["findings"]:
        print(f"{finding['title']}. {finding['conclusion']}")
    print(f"\nTables and figure: {page}")
    return 0


def _announce(what: str, output: Path) -> None:
    print(f"{what}, into {output}. Ctrl-C stops it; the same command resumes it.", flush=True)


def _next_commands(folder: Path, results: dict) -> list[str]:
    """What can be typed now, with the program as it was called; what the last needs is installed before it."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "convllava" else "convllava"
    sample = results["samples"][0]
    commands = [[program, "ask", folder / "model", folder / sample["image"], sample["question"]]]
    if find_spec("gradio") is None:
        commands.append([sys.executable, "-m", "pip", "install", "convllava-hf[demo]"])
    commands.append([program, "demo", folder / "model"])
    return [shlex.join(map(str, words)) for words in commands]
