"""`convllava data`: check a data set before training on it, and look at single samples as the model sees them."""

import argparse
import json
import os
import sys
from importlib.util import find_spec

from ..options import MOST, ImageOptions, options_from, whole_number
from ..utils.atomic import check_destination
from ..utils.logging_utils import quiet_unless_tty
from .common import (
    add_image_arguments,
    add_trust_argument,
    positive_int,
)


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "data",
        help="check a data set, or show a sample of it",
        description="Look at conversations with images before training on them.",
    )
    commands = parser.add_subparsers(title="commands", dest="data_command", metavar="COMMAND", required=True)
    _register_check(commands)
    _register_inspect(commands)


def _register_check(commands) -> None:
    parser = commands.add_parser(
        "check",
        help="count the contents of a data set, and find what is wrong with it",
        description="Read every sample and decode every image. Exit code 1 if something is wrong.",
    )
    _add_source(parser)
    parser.add_argument(
        "--model", metavar="MODEL", help="folder or Hub id of a checkpoint: also count tokens with its processor"
    )
    parser.add_argument(
        "--max-length",
        type=positive_int,
        default=2048,
        metavar="N",
        help="tokens a sample may have, with --model (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=whole_number(1, 256), metavar="N", help="processes (default: one for each CPU, up to 16)"
    )
    parser.add_argument(
        "--examples",
        type=positive_int,
        default=3,
        metavar="N",
        help="how many problems of each kind to show (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--write-clean",
        metavar="NEW",
        help="write the samples without problems to a new .json or .jsonl file; FILE must be one too",
    )
    add_image_arguments(parser)
    add_trust_argument(parser)
    parser.set_defaults(run=run_check)


def _register_inspect(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show one sample as the model will see it",
        description="Show a sample as rendered by the chat template, its tokens with those that count in the loss "
        "marked, and its images after preprocessing.",
    )
    _add_source(parser)
    parser.add_argument("--index", required=True, type=whole_number(0, MOST), metavar="N", help="which sample, from 0")
    parser.add_argument("--model", required=True, metavar="MODEL", help="folder or Hub id of a checkpoint")
    parser.add_argument(
        "--save", metavar="PNG", help="save the image as the model sees it, further ones as NAME-2.png and so on"
    )
    add_image_arguments(parser)
    add_trust_argument(parser)
    parser.set_defaults(run=run_inspect)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="JSON, JSONL or parquet file, a folder of them, or a data set's id on the Hub"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder that image paths are relative to and must stay in (default: FILE's)"
    )
    parser.add_argument("--split", default="train", help="of a data set with splits (default: %(default)s)")
    parser.add_argument("--name", help="configuration of a data set on the Hub")
    parser.add_argument(
        "--boxes",
        choices=("square", "image"),
        default="square",
        help="what its boxes are fractions of, as the recipe will say: the padded square, as in LLaVA's files, or the "
        "image (default: %(default)s)",
    )


def run_check(args: argparse.Namespace) -> int:
    from ..data.checking import check_data
    from ..data.cleaning import CleanFile

    quiet_unless_tty(with_datasets=find_spec("datasets") is not None)
    clean = None if args.write_clean is None else CleanFile(args.file, args.write_clean)
    report = check_data(
        args.file,
        args.images,
        model=args.model,
        split=args.split,
        name=args.name,
        max_length=args.max_length,
        workers=args.workers,
        examples=args.examples,
        image_options=options_from(args, ImageOptions),
        progress=sys.stderr.isatty(),
        trust_remote_code=args.trust_remote_code,
    )
    written = None if clean is None else clean.write(report)
    counts = report.as_dict()
    counts["boxes"] |= {"declared": args.boxes, "warning": report.boxes.warning(args.boxes)}
    if args.json:
        more = {} if clean is None else {"clean_file": args.write_clean, "clean_samples": written}
        print(json.dumps({"file": args.file, "images": args.images, "model": args.model, **counts, **more}))
    else:
        print("\n".join(_table(args, counts)))
        if clean is not None:
            print(f"\nWrote {written:,} of {report.samples:,} samples to {_printable(str(args.write_clean))}")
    return 0 if report.clean else 1


def run_inspect(args: argparse.Namespace) -> int:
    from ..data.inspecting import inspect_sample, save_images

    quiet_unless_tty(with_datasets=find_spec("datasets") is not None)
    if args.save:
        check_destination(args.save, "--save")
    options = options_from(args, ImageOptions)
    seen = inspect_sample(
        args.file,
        args.images,
        args.index,
        args.model,
        split=args.split,
        name=args.name,
        image_options=options,
        boxes=args.boxes,
        trust_remote_code=args.trust_remote_code,
    )
    paths = save_images(seen, args.save) if args.save else []
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"Sample {seen.index}" + (f" ({_printable(seen.id)})" if seen.id else ""))
    print("\nText", _printable(seen.text, keep="\n"), sep="\n")
    print(
        f"\nTokens: {len(seen.tokens)}, of them {seen.visual} visual; a loss is taken on {seen.supervised}, "
        + ("in color" if color else "in [[ ]]")
    )
    print(_marked(seen.tokens, color))
    for number, image in enumerate(seen.images):
        (height, width), (seen_height, seen_width) = image.size, image.seen
        print(f"\nImage {number + 1}: {_printable(image.name)}")
        print(f"{width} x {height} pixels, seen as {seen_width} x {seen_height}: {image.tokens} visual tokens")
        for count, box in enumerate(image.boxes, 1):
            print(f"Box {count}: [{', '.join(f'{edge:.3f}' for edge in box)}] of what is seen")
        if paths:
            drawn = ", with the boxes drawn on it" if image.boxes else ""
            print(f"Saved as {paths[number]}{drawn}")
    if not seen.images:
        print("\nNo images" + (": nothing was saved" if args.save else ""))
    return 0


def _table(args: argparse.Namespace, report: dict) -> list[str]:
    counts = [("samples", report["samples"]), ("  text only", report["text_only"]), ("turns", report["turns"])]
    counts.append(("images", report["images"]))
    boxes = report["boxes"]
    if boxes["boxes"]:
        counts += [("boxes", boxes["boxes"]), ("  samples with", boxes["samples"])]
        counts += [(f"  {name}", boxes[name]) for name in ("thousandths", "unclear") if boxes[name]]
    if tokens := report["tokens"]:
        counts += [
            ("tokens", tokens["total"]),
            ("  visual", tokens["visual"]),
            ("  with loss", tokens["supervised"]),
            ("  longest sample", tokens["longest"]),
            ("  mean sample", round(tokens["total"] / max(1, tokens["samples"]))),
        ]
    width = max(len(name) for name, _ in counts) + 2
    lines = [_printable(args.file), *(f"{name:<{width}}{count:>14,}" for name, count in counts), ""]
    if boxes["boxes"]:
        lines += [*_about_boxes(boxes), ""]
    if report["ok"]:
        return [*lines, "Nothing wrong was found."]
    lines.append(f"{report['bad_samples']:,} of {report['samples']:,} samples have something wrong:")
    width = max(len(problem["kind"]) for problem in report["problems"])
    for problem in report["problems"]:
        for number, example in enumerate(problem["examples"]):
            head = f"{problem['count']:>8,}  {problem['kind']:<{width}}" if number == 0 else " " * (width + 10)
            where = "" if example["sample"] is None else f"sample {example['sample']}"
            where += f" ({_printable(example['id'])}): " if example["id"] is not None else ": " if where else ""
            lines.append(f"{head}  {where}{_printable(example['detail'])}")
        if (more := problem["count"] - len(problem["examples"])) > 0:
            lines.append(f"{' ' * (width + 12)}and {more:,} more")
    if not tokens:
        lines += ["", "With --model, lengths and what a loss is taken on are checked as well."]
    return lines


def _about_boxes(boxes: dict) -> list[str]:
    """What the boxes look like, and what to do about it."""
    looks = {"square": "fractions of the padded square", "image": "fractions of the image"}.get(boxes["looks_like"])
    if looks is None:
        lines = ["The boxes themselves do not show whether they are fractions of the padded square or of the image."]
    else:
        lines = [f"The boxes look like {looks}."]
    if boxes["unclear"]:
        lines.append(
            f"{boxes['unclear']:,} boxes are in samples with images of different shapes: nothing says which image "
            "they belong to, and they are trained on as they are."
        )
    return [*lines, *([f"Warning: {boxes['warning']}"] if boxes["warning"] else [])]


def _marked(tokens: list, color: bool) -> str:
    """Tokens between bars, runs of supervised ones marked, runs of an image's placeholders counted."""
    start, end = ("\033[1;32m", "\033[0m") if color else ("[[", "]]")
    pieces, position = [], 0
    while position < len(tokens):
        token, run = tokens[position], 1
        while token.visual and position + run < len(tokens) and tokens[position + run].visual:
            run += 1
        text = _printable(token.text.replace(" ", "▁").replace("\n", "\\n"))
        text = text + (f" x {run}" if run > 1 else "")
        before = position > 0 and tokens[position - 1].supervised
        after = position + run < len(tokens) and tokens[position + run].supervised
        if token.supervised:
            text = (start if not before else "") + text + (end if not after else "")
        pieces.append(text)
        position += run
    return "|".join(pieces)


def _printable(text: str, keep: str = "") -> str:
    """Text of others without what could steer a terminal."""
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )
