"""`convllava chat`: a conversation in the terminal, or piped in line by line."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from ..errors import ConvLlavaError
from ..texts import storable
from .common import (
    MODEL_HELP,
    add_generation_arguments,
    add_picture_arguments,
    load_assistant,
    picture_options,
    show,
)


HELP = """\
/image PATH  show the model a picture (path or URL) with the next question
/reset       forget the conversation and the pictures
/help        say this
/quit        leave (so does the end of the input)"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model about pictures",
        description="Talk with a model about pictures. Each line is a question; lines that start with a slash are:",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--image", metavar="IMAGE", help="path or URL of a picture for the first question")
    add_picture_arguments(parser)
    add_generation_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..convert.cache import converted_checkpoint
    from ..inference import open_picture
    from ..loading import kind_of_checkpoint
    from ..picture_options import check_picture_options

    kind_of_checkpoint(args.model, trust_remote_code=args.trust_remote_code)
    pictures = [open_picture(args.image)] if args.image else []
    checkpoint = converted_checkpoint(args.model, trust_remote_code=args.trust_remote_code)
    check_picture_options(checkpoint, picture_options(args))
    chat = Chat(load_assistant(args, checkpoint), args, pictures)
    for line in _lines():
        if not chat.take(line.strip()):
            break
    return 0


class Chat:
    """The conversation so far, and the pictures that wait for the next question."""

    def __init__(self, assistant, args: argparse.Namespace, pictures: list):
        self.assistant = assistant.remembering()
        self.args = args
        self.pictures = pictures
        self.messages = []
        self.forget()

    def forget(self) -> None:
        from ..inference import system_turn

        self.messages = [system_turn(self.args.system)] if self.args.system else []

    def take(self, line: str) -> bool:
        """Act on one line of input; `False` when it ends the chat."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command == "/image":
                self.show_picture(argument.strip())
            elif command == "/reset":
                self.forget()
                self.pictures = []
            elif command == "/help":
                print(HELP)
            elif command.startswith("/"):
                _say(f"There is no command {command}; /help lists them.")
            elif line:
                self.ask(line)
        except ConvLlavaError as error:
            _say(str(error))
        return True

    def show_picture(self, path: str) -> None:
        from ..inference import open_picture

        if not path:
            raise ConvLlavaError("/image needs the path or the URL of a picture.")
        self.pictures.append(open_picture(path))

    def ask(self, question: str) -> None:
        """Stream the answer. A question that fails or is interrupted leaves the conversation as it was."""
        from ..inference import assistant_turn, user_turn

        turn = user_turn(question, self.pictures)
        try:
            answer = self.assistant.answer(
                [*self.messages, turn],
                max_new_tokens=self.args.max_new_tokens,
                temperature=self.args.temperature,
                on_text=show,
                images_kwargs=picture_options(self.args),
            )
        except KeyboardInterrupt:
            print()
            raise ConvLlavaError("Interrupted: this question and its answer are forgotten.") from None
        print()
        self.messages += [turn, assistant_turn(answer.text)]
        self.pictures = []


def _lines() -> Iterator[str]:
    """Lines of standard input, with a prompt and editing where it is a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits the line and remembers earlier ones)
    if hasattr(sys.stdin, "reconfigure"):
        # A line that is not UTF-8 is refused as a question is, and does not end the chat; a path may be of any bytes.
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
