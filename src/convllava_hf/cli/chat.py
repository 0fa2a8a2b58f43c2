"""`convllava chat`: a conversation in the terminal, or piped in line by line."""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator

from ..errors import ConvLlavaError
from ..options import GenerationOptions, options_from
from ..utils.texts import storable
from .common import MODEL_HELP, add_generation_arguments, add_image_arguments, load_assistant, show


HELP = """\
/image PATH  show the model an image (path or URL) with the next question
/reset       forget the conversation and the images
/help        show this list
/quit        leave (so does the end of the input)"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model about images",
        description="Talk with a model about images. Each line is a question; lines that start with a slash are:",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--image", metavar="IMAGE", help="path or URL of an image for the first question")
    add_image_arguments(parser)
    add_generation_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..inference import open_image
    from ..inference.loading import kind_of_checkpoint

    kind_of_checkpoint(args.model, trust_remote_code=args.trust_remote_code)
    images = [open_image(args.image)] if args.image else []
    chat = Chat(load_assistant(args), args, images)
    for line in _lines():
        if not chat.take(line.strip()):
            break
    return 0


class Chat:
    """The conversation so far, and the images that wait for the next question."""

    def __init__(self, assistant, args: argparse.Namespace, images: list):
        self.assistant = assistant.with_prompt_cache()
        self.args = args
        self.images = images
        self.messages = []
        self.forget()

    def forget(self) -> None:
        from ..inference import system_turn

        self.messages = [system_turn(self.args.system)] if self.args.system else []

    def take(self, line: str) -> bool:
        """Acts on one line of input; `False` when it ends the chat."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command == "/image":
                self.show_image(argument.strip())
            elif command == "/reset":
                self.forget()
                self.images = []
            elif command == "/help":
                print(HELP)
            elif command.startswith("/"):
                _say(f"Unknown command {command}; /help lists the commands.")
            elif line:
                self.ask(line)
        except ConvLlavaError as error:
            _say(str(error))
        return True

    def show_image(self, path: str) -> None:
        from ..inference import open_image

        if not path:
            raise ConvLlavaError("/image needs the path or the URL of an image.")
        self.images.append(open_image(path))

    def ask(self, question: str) -> None:
        """Streams the answer. A question that fails or is interrupted leaves the conversation as it was."""
        from ..inference import assistant_turn, user_turn

        turn = user_turn(question, self.images)
        try:
            answer = self.assistant.answer(
                [*self.messages, turn], on_text=show, **options_from(self.args, GenerationOptions)
            )
        except KeyboardInterrupt:
            print()
            raise ConvLlavaError("Interrupted: this question and its answer are dropped.") from None
        print()
        self.messages += [turn, assistant_turn(answer.text)]
        self.images = []


def _lines() -> Iterator[str]:
    """Lines of standard input, with a prompt and editing where it is a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits the line and remembers earlier ones)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A line that is not UTF-8 is refused as a question is, and does not end the chat; a path may be any bytes.
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            yield input(prompt)
        except EOFError:
            if prompt:
                print()
            return


def _say(message: str) -> None:
    print(storable(" ".join(message.split())), file=sys.stderr)
