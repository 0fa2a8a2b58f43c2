"""`convllava demo`: a web page on which to talk with a model about images."""

import argparse
import socket

from ..errors import ConvLlavaError
from ..options import GenerationOptions, LoadingOptions, options_from, shortened, whole_number
from ..utils.logging_utils import quiet_unless_tty, set_verbosity_error
from .common import MODEL_HELP, add_generation_arguments


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="show a model on a web page",
        description="Show a model on a web page: drop an image, ask, and follow up. Ctrl-C ends it.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument("--port", type=whole_number(1, 65535), help="default: the first free one from 7860 on")
    parser.add_argument(
        "--queue",
        type=whole_number(1, 1000),
        default=16,
        metavar="N",
        help="visitors who may wait while one is answered (default: %(default)s)",
    )
    parser.add_argument(
        "--max-upload",
        type=whole_number(1, 1024),
        default=20,
        metavar="MB",
        help="size of an image's file at most (default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    add_generation_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..demo.limits import Limits
    from ..demo.serving import serve

    _check_host(args.host)
    quiet_unless_tty()
    set_verbosity_error()
    longest = max(Limits.answer_tokens, args.max_new_tokens)  # visitors may choose as much as the command line does
    limits = Limits(queue=args.queue, upload_bytes=args.max_upload * 2**20, answer_tokens=longest)
    serve(
        args.model,
        host=args.host,
        port=args.port,
        limits=limits,
        system=args.system,
        generation={**options_from(args, GenerationOptions), "temperature": min(args.temperature, limits.temperature)},
        **options_from(args, LoadingOptions),
        open_browser=args.open,
        on_ready=lambda url: print(f"The page of {args.model}: {url}\nCtrl-C ends it.", flush=True),
    )
    return 0


def _check_host(host: str) -> None:
    """Refuses a name that does not resolve to an address, before the model is loaded."""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise ConvLlavaError(
            f"--host is {shortened(host)}, which is not an address: 127.0.0.1 shows the page on this machine only, "
            "and 0.0.0.0 lets other machines in."
        ) from error
