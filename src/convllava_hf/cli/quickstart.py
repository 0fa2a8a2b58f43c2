"""`convllava quickstart`: convert a checkpoint of the original code, ask about a picture, and check the answer."""

import argparse
import json
import sys
from pathlib import Path

from .common import errors_alone, quiet_unless_watched


CASE = "tall-ocr"


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="see the main job end to end, in a checkout",
        description="Convert a tiny checkpoint of the original code, ask it about a picture, and compare the answer "
        "with the one that the original code gave.",
    )
    parser.add_argument(
        "--golden",
        type=Path,
        default=Path("tests/golden"),
        metavar="FOLDER",
        help="the original's checkpoint, pictures and answers (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), metavar="FOLDER", help="folder to write (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    case = json.loads((args.golden / "inference.json").read_text(encoding="utf-8"))[CASE]
    quiet_unless_watched()
    errors_alone()
    from ..convert import convert_checkpoint
    from ..inference import load, open_picture, user_turn

    checkpoint, model = args.golden / "checkpoint-stage3", args.out / "model"
    picture = args.golden / "images" / case["images"][0]
    question = case["turns"][0][1].removeprefix("<image>\n")

    print(f"1. Converting {checkpoint} from the original's layout to transformers': {model}")
    convert_checkpoint(checkpoint, model, overwrite=True, progress=False)
    print("2. Loading it on the CPU in float32, as the original's answer was computed")
    assistant = load(model, device="cpu", dtype="float32")
    print(f"3. Asking about {picture}: {question!r}")
    expected = case["generated"]
    answer = assistant.answer([user_turn(question, [open_picture(picture)])], max_new_tokens=len(expected))

    print(f"\n   {answer.text}\n")
    if answer.token_ids != expected:
        print(f"This is NOT what the original code generated, which was:\n\n   {case['text']}")
        return 1
    program = sys.argv[0] if Path(sys.argv[0]).name == "convllava" else "convllava"
    print(
        f"The same {len(expected)} tokens that the original code generated.\n"
        "The weights are tiny and random, so the words mean nothing. Ask it yourself:\n"
        f"   {program} ask {model} {picture} {question.splitlines()[0]!r}"
    )
    return 0
