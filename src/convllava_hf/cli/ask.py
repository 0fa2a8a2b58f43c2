"""`convllava ask`: one question about one image."""

import argparse
import json

from ..options import GenerationOptions, options_from
from ..utils.texts import storable
from .common import MODEL_HELP, add_generation_arguments, add_image_arguments, load_assistant, show


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "ask",
        help="ask one question about an image",
        description="Ask one question about an image. The answer streams to standard output.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("image", metavar="IMAGE", help="path or URL of an image")
    parser.add_argument("question", metavar="QUESTION", help="put <image> into it to place the image in the text")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the answer and its figures")
    add_image_arguments(parser)
    add_generation_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..inference import open_image, system_turn, user_turn
    from ..inference.loading import kind_of_checkpoint

    # All that can be refused is refused before the weights are read.
    kind_of_checkpoint(args.model, trust_remote_code=args.trust_remote_code)
    messages = [system_turn(args.system)] if args.system else []
    messages.append(user_turn(args.question, [open_image(args.image)]))
    assistant = load_assistant(args)
    answer = assistant.answer(messages, on_text=None if args.json else show, **options_from(args, GenerationOptions))
    if not args.json:
        print()
        return 0
    report = {
        "model": args.model,
        "image": args.image,
        "question": args.question,
        "answer": answer.text,
        "visual_tokens": answer.visual_tokens,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.token_ids),
        "first_token_seconds": round(answer.first_token_seconds, 4),
        "total_seconds": round(answer.seconds, 4),
        "device": str(assistant.device),
        "dtype": str(assistant.dtype).removeprefix("torch."),
    }
    print(storable(json.dumps(report, ensure_ascii=False)))  # a path need not be UTF-8
    return 0
